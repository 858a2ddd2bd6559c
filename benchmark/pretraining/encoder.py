"""Makes the encoder of portraits, trained through a frozen text-to-image model.

Of a picture it gives a row of the token table, and tokens for keys and values beside the text's (IP-Adapter).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import atomic_write
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.image_branch import ImageBranch
from dualcl.benchmark.models.row_encoder import WEIGHTS, RowEncoder, fresh_encoder
from dualcl.benchmark.models.text_to_image import BaseConfig, TextToImage
from dualcl.benchmark.pretraining.portraits import drawing_hash
from dualcl.benchmark.pretraining.stages import Order, Say, Schedule, card_text, train
from dualcl.benchmark.pretraining.text_to_image import to_input, write_card
from dualcl.datasets.drawing.people import Person, sample_person
from dualcl.datasets.drawing.portrait_captions import CLASS_NOUN, sample_kind
from dualcl.datasets.drawing.portraits import IDENTITY, SIZE, draw_portrait, sample_setting


@dataclass(frozen=True)
class EncoderRecipe:
    """How `portraits-encoder` is trained; `pull` of the rows is PhotoVerse's, `drop` IP-Adapter's.

    That is the share of samples without the text, without the picture, and without both.
    """

    persons: int = 4000
    per_person: int = 4
    test_persons: int = 200
    steps: int = 3600
    batch: int = 16
    lr: float = 1e-3
    pull: float = 0.01
    ema: float = 0.998
    drop: float = 0.05
    n_tokens: int = 1
    image_tokens: int = 4
    base: str = "portraits-diffusion"

    def __post_init__(self) -> None:
        if self.per_person < 2:
            raise UserError(f"per_person={self.per_person}: what is read and what is drawn must differ; give 2 or more")


def someone(seed: int, part: str, index: int) -> Person:
    """A person of no stream."""
    who = sample_person(numpy_generator(seed, "portraits", part, index), "pretraining")
    return Person("", 0, tuple((name, who[name]) for name in IDENTITY))


def pictures(seed: int, part: str, persons: int, each: int) -> Tensor:
    """uint8 (persons, each, 48, 48, 3): expression, shirt and what is around change, as in a stream."""
    out = np.empty((persons, each, SIZE, SIZE, 3), dtype=np.uint8)
    for i in range(persons):
        person = someone(seed, part, i)
        for j in range(each):
            rng = numpy_generator(seed, "portraits", part, i, "picture", j)
            out[i, j] = draw_portrait(person.picture(rng), sample_setting(rng))
    return torch.from_numpy(out)


class GivenRows(nn.Module):
    """The frozen token table, and behind it rows that are set anew for each batch."""

    def __init__(self, base: Any, size: int) -> None:
        super().__init__()
        self.base, self.size = base, size
        self.rows: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen table; libraries ask an embedding for its weight."""
        table: Tensor = self.base.weight
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> embeddings (..., D)."""
        base: Tensor = self.base(ids.clamp(max=self.size - 1))
        if self.rows is None:
            return base
        given = F.embedding((ids - self.size).clamp(min=0), self.rows)
        return torch.where((ids >= self.size)[..., None], given.to(base.dtype), base)


class GivenImages:
    """Picture tokens that are set anew for each batch."""

    def __init__(self, branch: ImageBranch) -> None:
        self.branch = branch
        self.tokens: Tensor | None = None

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The batch's own (B, n, D), or those of no picture."""
        return self.branch.none().expand(len(prompts), -1, -1) if self.tokens is None else self.tokens

    def on(self, network: nn.Module) -> contextlib.AbstractContextManager[None]:
        """`ImageBranch.on`, with weight 1."""
        return self.branch.on(network, 1.0)


class Prompts:
    """Prompts with words whose rows, and picture tokens, are a batch's own."""

    def __init__(self, model: TextToImage, batch: int, n_tokens: int) -> None:
        vocabulary, self.model = model.vocabularies[0], model
        self.images: GivenImages | None = None
        self.words = [[f"<given{i}-{k}>" for k in range(n_tokens)] for i in range(batch)]
        self.given = GivenRows(vocabulary.encoder.get_input_embeddings(), len(vocabulary.tokenizer))
        vocabulary.tokenizer.add_tokens([word for own in self.words for word in own])
        vocabulary.encoder.set_input_embeddings(self.given)

    def read_images(self, branch: ImageBranch) -> None:
        """From now on the model reads a branch's tokens beside the text."""
        self.model.images = self.images = GivenImages(branch)

    def predicted(
        self, noisy: Tensor, times: Tensor, kinds: Sequence[str | None], rows: Tensor | None, tokens: Tensor | None
    ) -> Tensor:
        """What the model predicts under "a KIND of" the words of rows (B, n_tokens, D) and picture tokens (B, n, D).

        Without rows under "a KIND of a person", without a kind under no text.
        """
        prompts = [f"a {kind} of a {CLASS_NOUN}" for kind in kinds]
        if rows is not None:
            self.given.rows = rows.flatten(0, 1)
            prompts = [f"a {kind} of {' '.join(own)}" for kind, own in zip(kinds, self.words, strict=False)]
        prompts = [prompt if kind else "" for prompt, kind in zip(prompts, kinds, strict=True)]
        if self.images is not None:
            self.images.tokens = tokens
        predicted = self.model.predict(noisy, times, self.model.encode_text(prompts))
        self.given.rows = None
        return predicted


def make_encoder(folder: Path, seed: int, recipe: EncoderRecipe, command: str, say: Say) -> dict[str, Any]:
    """Trains the encoder, or goes on, and writes the folder portraits_encoder."""
    model, key = load(BaseConfig(model=recipe.base)), ("portraits", "encoder")
    table = model.vocabularies[0].encoder.get_input_embeddings().weight.detach().float()
    table = table[: len(model.vocabularies[0].tokenizer)]
    prompts = Prompts(model, max(recipe.batch, recipe.test_persons), recipe.n_tokens)
    say(f"drawing {recipe.persons} persons x {recipe.per_person} pictures")
    images = pictures(seed, "encoder", recipe.persons, recipe.per_person)
    mean, std = _latents(model, images)
    drawn = torch_generator(seed, *key, "init")
    encoder = fresh_encoder(table, recipe.n_tokens, drawn, model.network, recipe.image_tokens).requires_grad_(True)
    branch = _branch(encoder)
    prompts.read_images(branch)
    order = Order(recipe.persons, recipe.batch, seed, *key)

    def loss(step: int) -> Tensor:
        who, rng = order(step), numpy_generator(seed, *key, "pairs", step)
        # what is read and what is drawn are two pictures, or the encoder would copy one
        pairs = torch.from_numpy(np.stack([rng.choice(recipe.per_person, 2, replace=False) for _ in who]))
        generator = torch_generator(seed, *key, "noise", step)
        noisy, times, target = _noised(model, mean[who, pairs[:, 1]], std[who, pairs[:, 1]], generator)
        kinds, drop = [sample_kind(rng) for _ in who], rng.uniform(size=len(who)) / max(recipe.drop, 1e-9)
        embedded = encoder(to_input(images[who, pairs[:, 0]]))
        rows = encoder.rows(embedded)
        # [0, 1): no text, [1, 2): no picture, [2, 3): neither
        seen = torch.from_numpy((drop < 1) | (drop >= 3)).float()[:, None]
        texts = [kind if 1 <= d < 2 or d >= 3 else None for kind, d in zip(kinds, drop, strict=True)]
        predicted = prompts.predicted(noisy, times, texts, rows, branch.tokens(seen * embedded))
        return F.mse_loss(predicted, target) + recipe.pull * rows.abs().mean()

    told = {k: v for k, v in asdict(recipe).items() if k not in ("steps", "test_persons")}
    told |= {"seed": seed, "drawing": drawing_hash(), "base": model.info.weights_sha256}
    schedule = Schedule(recipe.steps, recipe.lr, weight_decay=0.01, ema=recipe.ema)
    average = train(folder / "state" / "encoder.safetensors", told, encoder, loss, schedule, say)
    # what is measured is what is saved
    average.load_state_dict({k: v.half().float() for k, v in average.state_dict().items()})
    weights = save({k: v.half().contiguous() for k, v in average.state_dict().items()})
    card = {
        "name": "portraits-encoder",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "width": average.width,
        "n_tokens": recipe.n_tokens,
        "image_tokens": recipe.image_tokens,
        "layers": _branch(average).sizes,
        "base": recipe.base,
        "base_sha256": model.info.weights_sha256,
        "pictures": recipe.persons * recipe.per_person,
        "command": command,
        "seed": seed,
        "drawing": drawing_hash(),
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in average.parameters()),
        "measured": _measured(average, prompts, seed, recipe),
        "versions": {"torch": torch.__version__},
    }
    target = folder / "portraits_encoder"
    with atomic_write(target / WEIGHTS) as handle:
        handle.write(weights)
    write_card(target, card, _card_text(card))
    say(json.dumps(card["measured"]))
    return card


def _branch(encoder: RowEncoder) -> ImageBranch:
    if encoder.branch is None:
        raise UserError("an encoder without image tokens is not made here; give image_tokens of 1 or more")
    return encoder.branch


def _latents(model: TextToImage, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of latents, (persons, pictures, C, h, w)."""
    parts = [model.encode_images(to_input(chunk)) for chunk in images.flatten(0, 1).split(64)]
    mean, std = (torch.cat(column).unflatten(0, images.shape[:2]) for column in zip(*parts, strict=True))
    return mean, std


def _noised(model: TextToImage, mean: Tensor, std: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(noised latents, times, target) of latents."""
    clean = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    times = model.draw_times(len(mean), generator)
    noisy, target = model.noised(clean, noise, times)
    return noisy, times, target


@torch.no_grad()
def _measured(encoder: RowEncoder, prompts: Prompts, seed: int, recipe: EncoderRecipe) -> dict[str, Any]:
    """Denoising errors of other persons' last pictures under their own rows, another's, and under "a person"."""
    images = pictures(seed, "encoder-test", recipe.test_persons, recipe.per_person)
    embedded = torch.stack([encoder.embed(own).mean(0) for own in images[:, :-1]])
    rows, branch = encoder.rows(embedded), _branch(encoder)
    prompts.read_images(branch)
    tokens = branch.tokens(embedded)
    mean, std = _latents(prompts.model, images[:, -1:])
    generator = torch_generator(seed, "portraits", "encoder", "test")
    noisy, times, target = _noised(prompts.model, mean[:, 0], std[:, 0], generator)
    kinds = ["portrait"] * recipe.test_persons
    given = {
        "own": (rows, tokens),
        "another": (rows.roll(1, 0), tokens.roll(1, 0)),
        "own_words": (rows, None),
        "own_images": (None, tokens),
        "plain": (None, None),
    }
    errors = {k: float(F.mse_loss(prompts.predicted(noisy, times, kinds, *g), target)) for k, g in given.items()}
    return {"n": recipe.test_persons, **{name: round(error, 5) for name, error in errors.items()}}


def _card_text(card: Mapping[str, Any]) -> str:
    recipe, measured = card["recipe"], card["measured"]
    paragraphs = [
        f"Reads a portrait as the suite draws them and gives rows of {card['base']}'s token table ({card['n_tokens']}) "
        f"to stand for the person, and {card['image_tokens']} tokens that every cross-attention reads beside the text, "
        "with keys and values of their own (IP-Adapter's, in diffusers' layers): a convolutional network and that "
        f"branch, {card['parameters']:,} parameters; float16 safetensors. "
        "For the method `encoder`; it shares nothing with the judge, which measures.",
        f"Made by `{card['command']}`: {card['pictures']} drawings of {recipe['persons']} persons, none of a stream; "
        f"{recipe['steps']} steps of {recipe['batch']} on the denoising error of another picture of the same person, "
        f"the model frozen ({card['base_sha256'][:12]}); without the text, the picture or both in "
        f"{recipe['drop']:.0%} of the samples each; seed {card['seed']}, torch {card['versions']['torch']}.",
        f"Denoising error of {measured['n']} other persons under their own word and image tokens {measured['own']}, "
        f"under another person's {measured['another']}, under the word alone {measured['own_words']}, under the image "
        f"tokens with the caption of any person {measured['own_images']}, under that caption alone {measured['plain']} "
        "(stored weights).",
        "Not for anything but this suite: it has seen nothing except drawn portraits.",
    ]
    return card_text("portraits-encoder", paragraphs)
