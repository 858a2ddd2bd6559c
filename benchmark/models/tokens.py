"""New words of a text encoder: each concept's rows are their own small parameter, the table stays frozen."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import AddedToken

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import check_text, read_json
from dualcl.benchmark.models.text_to_image import Vocabulary


def table_hash(table: Tensor) -> str:
    """sha256 of an embedding table's bits."""
    return hashlib.sha256(table.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


#: what an exported model is, in its folder
CARD = "dualcl.json"


@dataclass(frozen=True)
class Word:
    """How a concept is written: its placeholder, the tokens that it stands for, and the concept's name."""

    placeholder: str
    tokens: tuple[str, ...]
    name: str


def exported_card(model: str) -> dict[str, Any] | None:
    """The card of a merged export in the directory `model`; None for other models. UserError for a damaged one."""
    path = Path(model) / CARD
    if not path.is_file():
        return None
    try:
        card: dict[str, Any] = read_json(path)
        card_words(card)
        return {**card, "run": {**card["run"]}, "base": {**card["base"]}} if card["kind"] == "merged" else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the card of an exported model ({error!r}); export again") from None


def card_words(card: Mapping[str, Any]) -> list[Word]:
    """The concepts that an exported model knows."""
    return [Word(str(c["placeholder"]), tuple(map(str, c["words"])), str(c["name"])) for c in card["concepts"]]


def as_read(tokenizer: Any, text: str) -> str:
    """The text as the tokenizer reads it: CLIP's composes Unicode and lower-cases."""
    check_text(text, "a placeholder or prompt")
    normalizer = tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text))


def expand(tokenizer: Any, prompt: str, words: Sequence[Sequence[str]]) -> tuple[str, list[int]]:
    """The prompt with all tokens of a concept where its first stands alone, and the concepts it holds, in their order.

    The tokenizer alone says where a concept is: `TOY1` may be one, `toy12` none.
    """
    check_text(prompt, "a prompt")
    known = tokenizer.get_added_vocab()
    rows = [[known.get(token) for token in tokens] for tokens in words]
    owner = {row: i for i, own in enumerate(rows) for row in own if row is not None}
    read = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    parts, end, held = [], 0, []
    for at, (row, (start, stop)) in enumerate(zip(read.input_ids, read.offset_mapping, strict=True)):
        if (i := owner.get(row)) is None:
            continue
        held.append(i)
        if row == rows[i][0] and read.input_ids[at : at + len(rows[i])] != rows[i]:
            parts += [prompt[end:start], " ".join(words[i])]
            end = stop
    return "".join([*parts, prompt[end:]]), list(dict.fromkeys(held))


class ConceptTokens(nn.Module):
    """Stands in for the token embedding of a vocabulary's text encoder: the frozen table, then rows of concepts.

    A concept has `n_tokens` rows (n_tokens, D) in float32, a Parameter of its own: no optimiser ever holds the table or
    an earlier concept's rows, so neither gradients nor weight decay can reach them. With several tokens a placeholder
    `<c1>` stands for `<c1> <c1>_1 <c1>_2`, the convention of diffusers' `load_textual_inversion`.
    """

    def __init__(self, vocabulary: Vocabulary, n_tokens: int = 1, earlier: Sequence[Word] = ()) -> None:
        super().__init__()
        #: concepts that the model knew before
        self.earlier = list(earlier)
        embedding = vocabulary.encoder.get_input_embeddings()
        self.tokenizer = vocabulary.tokenizer
        self.n_tokens = n_tokens
        self.base = embedding
        self.base_size = len(self.tokenizer)
        if embedding.num_embeddings < self.base_size:
            raise UserError(
                f"the tokenizer has {self.base_size} tokens, the text encoder {embedding.num_embeddings}; "
                "they are of different models"
            )
        self.base_hash = table_hash(embedding.weight)
        self.rows = nn.ParameterList()
        self.placeholders: list[str] = []
        self.train(embedding.training)
        vocabulary.encoder.set_input_embeddings(self)

    @property
    def weight(self) -> Tensor:
        """The frozen table; libraries ask an embedding for its weight."""
        return self.base.weight

    def table(self) -> Tensor:
        """The pretrained rows, then those of the concepts (n, D), in the precision of the former."""
        return torch.cat([self.weight[: self.base_size], *(r.to(self.weight.dtype) for r in self.rows)])

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> embeddings (..., D)."""
        base: Tensor = self.base(ids.clamp(max=self.base_size - 1))
        if not len(self.rows):
            return base
        new = ids >= self.base_size
        rows = torch.cat(list(self.rows))
        learnt = F.embedding((ids - self.base_size).clamp(min=0), rows)
        return torch.where(new[..., None], learnt.to(base.dtype), base)

    def words(self, concept: int) -> list[str]:
        """The tokens of a concept, the placeholder first."""
        return self._names(self.placeholders[concept])

    def _names(self, placeholder: str) -> list[str]:
        return [placeholder, *(f"{placeholder}_{i}" for i in range(1, self.n_tokens))]

    def add(
        self,
        placeholder: str,
        init: Literal["random", "word"],
        word: str,
        generator: torch.Generator,
        *,
        rename: bool = True,
    ) -> nn.Parameter:
        """Adds a concept's tokens and returns their rows, shape (n_tokens, D).

        Random rows are normal with the table's mean and standard deviation, per dimension. A placeholder that the
        vocabulary has is renamed (`<c1>` to `<c1-2>`), or refused with `rename=False`. Raises UserError also when
        `word` is not one token.
        """
        check_text(placeholder, "concept.placeholder")
        check_text(word, "a class noun")
        if not rename:
            self.check_free(placeholder)
        placeholder = name = as_read(self.tokenizer, placeholder)
        tried = 1
        while self._taken(name):
            tried += 1
            name = re.sub(r">?$", f"-{tried}>" if placeholder.endswith(">") else f"-{tried}", placeholder, count=1)
        table = self.base.weight.detach().float()[: self.base_size]
        if init == "word":
            start = table[self.word_id(word)].repeat(self.n_tokens, 1)
        else:
            noise = torch.empty(self.n_tokens, table.shape[1]).normal_(generator=generator).to(table.device)
            start = table.mean(0) + table.std(0) * noise
        self.placeholders.append(name)
        rows = nn.Parameter(start.clone())
        self.rows.append(rows)
        words = self.words(len(self.placeholders) - 1)
        # one without brackets is no part of another word
        whole = any(c.isalnum() or c == "_" for c in (name[0], name[-1]))
        if self.tokenizer.add_tokens([AddedToken(w, single_word=whole) for w in words]) != self.n_tokens:
            raise UserError(f"the tokenizer did not take {', '.join(words)}; choose another concept.placeholder")
        return rows

    def check_free(self, placeholder: str) -> None:
        """Raises UserError when the vocabulary has the placeholder."""
        if self._taken(placeholder):
            raise UserError(f"the vocabulary has {placeholder!r} already; choose another concept.placeholder")

    def _taken(self, placeholder: str) -> bool:
        vocabulary, added = self.tokenizer.get_vocab(), self.tokenizer.get_added_vocab()
        taken = {*vocabulary, *(as_read(self.tokenizer, token) for token in added)}
        # a whole word is there with its end marked
        return any(w in taken or f"{w}</w>" in taken for w in self._names(as_read(self.tokenizer, placeholder)))

    def check_exports(self, placeholders: Sequence[str]) -> None:
        """Raises UserError for placeholders that diffusers' pipelines, given what is exported, would read otherwise."""
        pipeline, stock = TextualInversionLoaderMixin(), copy.deepcopy(self.tokenizer)
        older = [token for token in self.tokenizer.get_added_vocab() if token not in stock.all_special_tokens]

        def ids(text: str) -> list[int]:
            found: list[int] = stock(pipeline.maybe_convert_prompt(text, stock), add_special_tokens=False).input_ids
            return found

        before = [ids(token) for token in older]
        names = [self._names(as_read(stock, placeholder)) for placeholder in placeholders]
        stock.add_tokens([token for own in names for token in own])
        wanted = [stock.convert_tokens_to_ids(own) for own in names]
        for placeholder, own, rows in zip(placeholders, names, wanted, strict=True):
            if ids(placeholder) == rows:
                continue
            mend = f"write it {own[0]!r}" if own[0] != placeholder else "choose another, such as <c{number}>"
            raise UserError(
                f"concept.placeholder: {placeholder!r} with {self.n_tokens} tokens is not what the model's tokenizer "
                f"reads, and exports would lack some of them; {mend}"
            )
        if len({row for rows in wanted for row in rows}) != len(names) * self.n_tokens:
            raise UserError(
                f"concept.placeholder: two concepts would share a token ({', '.join(placeholders[:2])}, ...)"
            )
        if ids(" ".join(own[0] for own in names)) != [row for rows in wanted for row in rows]:
            raise UserError(
                f"concept.placeholder: of {placeholders[0]!r} to {placeholders[-1]!r} one is a part of another, and "
                f"with {self.n_tokens} tokens each, exports would mix them up; write it in <brackets>"
            )
        if before != [ids(token) for token in older]:
            raise UserError(
                f"concept.placeholder: {placeholders[0]!r} changes how a word that the model knows is read; choose "
                "another"
            )

    def word_id(self, word: str) -> int:
        """Token id of a word; UserError when it is not one token of the pretrained vocabulary."""
        if not word:
            raise UserError("concept.init=word needs a class noun of every concept; give one, or concept.init=random")
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] >= self.base_size:
            raise UserError(
                f"concept.init=word: {word!r} is {len(ids)} tokens of this model, not one of its words; choose another "
                "noun, or concept.init=random"
            )
        return int(ids[0])

    def expand(self, prompt: str) -> str:
        """The prompt with every placeholder followed by its further tokens."""
        single = all(len(tokens) == 1 for tokens in self._all())
        return prompt if single else expand(self.tokenizer, prompt, self._all())[0]

    def used(self, prompt: str) -> list[int]:
        """Concepts whose placeholder the prompt holds."""
        return sorted(i for i in expand(self.tokenizer, prompt, self._all())[1] if i < len(self.placeholders))

    def _all(self) -> list[Sequence[str]]:
        return [*(self._names(name) for name in self.placeholders), *(word.tokens for word in self.earlier)]

    def next_free(self, template: str, count: int) -> list[str]:
        """The first `count` words of a template with {number} behind those that the model knew before."""
        numbered = re.compile(re.escape(as_read(self.tokenizer, template)).replace(r"\{number\}", "([0-9]{1,9})", 1))
        taken = [numbered.fullmatch(as_read(self.tokenizer, word.placeholder)) for word in self.earlier]
        first = 1 + max((int(match[1]) for match in taken if match), default=0)
        return [template.replace("{number}", str(first + i)) for i in range(count)]

    def check_table(self) -> None:
        """Raises RuntimeError when a bit of the pretrained table has changed."""
        if table_hash(self.base.weight) != self.base_hash:
            raise RuntimeError("the pretrained token table has changed")

    def rows_state(self) -> dict[str, Tensor]:
        """The rows by concept."""
        return {f"rows.{i}": r.detach() for i, r in enumerate(self.rows)}

    @torch.no_grad()
    def load_rows(self, state: Mapping[str, Tensor]) -> None:
        """Restores `rows_state` of concepts that were added."""
        for i, rows in enumerate(self.rows):
            rows.copy_(state[f"rows.{i}"])
