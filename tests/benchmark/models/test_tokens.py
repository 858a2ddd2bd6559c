"""New words: only the newest concept's rows ever move; placeholders, initialisation, prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.tokens import ConceptTokens
from dualcl.benchmark.runs.step import make_optimizer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_of(diffusion: Any, n_tokens: int = 1, *names: str) -> ConceptTokens:
    """The model's tokens with a random concept under each name."""
    tokens = ConceptTokens(diffusion.vocabularies[0], n_tokens)
    for i, name in enumerate(names):
        tokens.add(name, "random", "", seeded(i))
    return tokens


# --- what trains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 2, 3])
def test_only_the_newest_concepts_tokens_move_and_each_of_them_does(sd_run: Callable[..., Any], n_tokens: int) -> None:
    run = sd_run(
        "finetune",
        f"concept.n_tokens={n_tokens}",
        "data.concepts=3",
        "train.optimizer=adamw",
        "method.weight_decay=0.1",
        "method.lr=0.01",
        "method.head_lr=0.1",
    )
    tokens = run.domain.tokens
    table = tokens.base.weight.detach().clone()
    for task in range(3):
        shared = run.begin(task)
        before = [rows.detach().clone() for rows in tokens.rows]
        assert [tuple(rows.shape) for rows in tokens.rows] == [(n_tokens, table.shape[1])] * (task + 1)
        optimizer = make_optimizer(run.train, run.groups(shared), run.device)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert [any(p is rows for p in held) for rows in tokens.rows] == [False] * task + [True]
        assert tokens.base.weight.data_ptr() not in {p.data_ptr() for p in held}
        decay = [g["weight_decay"] for g in optimizer.param_groups if any(p is tokens.rows[task] for p in g["params"])]
        assert decay == [0]
        for batch in run.domain.batches(task, 0):
            run.step(batch, optimizer, 1.0, "a test")
            assert bool((tokens.rows[task].grad.abs().sum(1) > 0).all())
        assert torch.equal(tokens.base.weight, table)
        for older, kept in zip(tokens.rows[:task], before, strict=False):
            assert torch.equal(older, kept)
            assert older.grad is None
        assert bool((tokens.rows[task] != before[task]).any(1).all())
        run.domain.check_tokens()


def test_a_changed_bit_of_the_table_or_of_an_older_token_is_found(sd_run: Callable[..., Any]) -> None:
    domain = sd_run("textual_inversion").domain
    domain.begin_task(0)
    domain.begin_task(1)
    domain.check_tokens()
    with torch.no_grad():
        domain.tokens.rows[1] += 1  # the one being learnt
        domain.check_tokens()
        kept = domain.tokens.rows[0][0, 3].item()
        domain.tokens.rows[0][0, 3] = kept * (1 + 2e-7)
        with pytest.raises(RuntimeError, match="token of concept 1"):
            domain.check_tokens()
        domain.tokens.rows[0][0, 3] = kept
        domain.check_tokens()
        domain.tokens.base.weight[5, 0] *= 1 + 2e-7
    with pytest.raises(RuntimeError, match="table"):
        domain.check_tokens()


def test_rows_come_back_bit_for_bit(diffusion: Any, loaded_sd: Any) -> None:
    import copy

    one = tokens_of(diffusion, 2, "<c1>", "<c2>")
    other = ConceptTokens(copy.deepcopy(loaded_sd).vocabularies[0], 2)
    for i, name in enumerate(("<c1>", "<c2>")):
        other.add(name, "random", "", seeded(10 + i))
    state = {k: v.clone() for k, v in one.rows_state().items()}
    assert not torch.equal(state["rows.0"], other.rows[0])
    other.load_rows(state)
    assert all(torch.equal(a, b) for a, b in zip(one.rows, other.rows, strict=True))


# --- embedding --------------------------------------------------------------------------------------------------------


def test_ids_get_the_rows_of_their_own_concept_and_words_their_old_ones(diffusion: Any) -> None:
    prompts = ["a photo of a cat", "a symbol"]
    before = diffusion.encode_text(prompts).states
    tokens = tokens_of(diffusion, 3, "<c1>", "<c2>", "<c3>")
    assert torch.equal(diffusion.encode_text(prompts).states, before)
    ids = diffusion.vocabularies[0].ids([tokens.expand("<c3> and <c1>, a symbol")])
    found = tokens(ids)[0]
    new = [i for i, token in enumerate(ids[0].tolist()) if token >= tokens.base_size]
    assert [int(ids[0, i]) - tokens.base_size for i in new] == [6, 7, 8, 0, 1, 2]
    assert torch.equal(found[new], torch.cat([tokens.rows[2], tokens.rows[0]]))
    old = [i for i in range(len(found)) if i not in new]
    assert torch.equal(found[old], tokens.base.weight[ids[0, old]])


def test_a_text_encoder_of_another_model(diffusion: Any) -> None:
    diffusion.tokenizer.add_tokens(["<more>"])
    with pytest.raises(UserError, match="different models"):
        ConceptTokens(diffusion.vocabularies[0])


# --- placeholders -----------------------------------------------------------------------------------------------------


def test_a_placeholder_that_is_taken_is_renamed(diffusion: Any) -> None:
    diffusion.tokenizer.add_tokens(["<c1>", "<c1-2>"])
    diffusion.text_encoder.resize_token_embeddings(len(diffusion.tokenizer))
    tokens = tokens_of(diffusion, 1, "<c1>", "<c2>")
    assert tokens.placeholders == ["<c1-3>", "<c2>"]
    # what the model knew as <c1> it still does, and the new concept is another word
    ids = diffusion.vocabularies[0].ids(["<c1> <c1-3> <c2>"])[0, 1:4]
    assert ids.tolist() == [tokens.base_size - 2, tokens.base_size, tokens.base_size + 1]


def test_a_second_token_that_is_taken_renames_them_all(diffusion: Any) -> None:
    diffusion.tokenizer.add_tokens(["<c1>_1"])
    diffusion.text_encoder.resize_token_embeddings(len(diffusion.tokenizer))
    tokens = tokens_of(diffusion, 2, "<c1>")
    assert tokens.words(0) == ["<c1-2>", "<c1-2>_1"]


@pytest.mark.parametrize("word", ["symbol", "Symbol", "a", "<|endoftext|>"])
def test_a_chosen_placeholder_that_is_a_word_already_is_refused(diffusion: Any, word: str) -> None:
    tokens = ConceptTokens(diffusion.vocabularies[0])
    ids = diffusion.vocabularies[0].ids(["a photo of a symbol"])
    with pytest.raises(UserError, match=r"vocabulary has .* already; choose another concept\.placeholder"):
        tokens.add(word, "random", "", seeded(), rename=False)
    assert len(tokens.rows) == len(tokens.placeholders) == 0
    assert torch.equal(diffusion.vocabularies[0].ids(["a photo of a symbol"]), ids)


def test_a_chosen_placeholder_that_is_given_twice_is_refused(diffusion: Any) -> None:
    tokens = tokens_of(diffusion, 1, "sks1")
    with pytest.raises(UserError, match="'sks1' already"):
        tokens.add("sks1", "random", "", seeded(), rename=False)


@pytest.mark.parametrize(
    ("template", "n_tokens", "concepts", "says"),
    [
        ("<c{number}>", 2, 12, ""),
        ("<Rex{number}>", 1, 2, ""),
        ("SKS{number}", 1, 12, ""),
        ("sks{number}", 2, 9, ""),
        ("stra\u00dfe{number}", 2, 2, ""),
        ("<Rex{number}>", 2, 2, "write it '<rex1>'"),
        ("<\u0130{number}>", 2, 2, "write it '<i\u0307{number}>'"),
        ("<e\u0301{number}>", 2, 2, "write it '<\u00e9{number}>'"),
        ("sks{number}", 2, 12, "<brackets>"),
        ("<|endoftext|>{number}", 1, 1, "choose another"),
        ("{number}_1", 2, 11, "<brackets>|share a token"),
    ],
)
def test_words_that_exports_would_lack_are_refused(
    diffusion: Any, template: str, n_tokens: int, concepts: int, says: str
) -> None:
    tokens = ConceptTokens(diffusion.vocabularies[0], n_tokens)
    wanted = [template.replace("{number}", str(i + 1)) for i in range(concepts)]
    if says:
        with pytest.raises(UserError, match=says.replace("{number}", "1")):
            tokens.check_exports(wanted)
        return
    tokens.check_exports(wanted)
    for i, word in enumerate(wanted):
        tokens.add(word, "random", "", seeded(i), rename=False)
    # each is found, in any case, as all of its tokens
    ids = diffusion.tokenizer(tokens.expand(" ".join(wanted)), add_special_tokens=False).input_ids
    assert ids == [tokens.base_size + i for i in range(concepts * n_tokens)]
    assert tokens.used(wanted[-1].upper() if "\u00df" not in template else wanted[-1]) == [concepts - 1]


def test_words_that_change_a_known_word_are_refused(diffusion: Any) -> None:
    diffusion.tokenizer.add_tokens(["<c1>"])
    diffusion.text_encoder.resize_token_embeddings(len(diffusion.tokenizer))
    tokens = ConceptTokens(diffusion.vocabularies[0])
    with pytest.raises(UserError, match="changes how a word that the model knows is read"):
        tokens.check_exports(["<c1>_1"])
    with pytest.raises(UserError, match="'<C1>' already"):
        tokens.add("<C1>", "random", "", seeded(), rename=False)


def test_a_placeholder_is_no_part_of_another_word(diffusion: Any) -> None:
    tokens = tokens_of(diffusion, 2, "toy1", "toy12")
    plain = "mytoy1 toy1s toy123 toy1_2 toy1\u0301"
    assert (tokens.used(plain), tokens.expand(plain)) == ([], plain)
    ids = diffusion.vocabularies[0].ids([plain, "TOY1, toy12's"])
    assert not bool((ids[0] >= tokens.base_size).any())
    assert tokens.expand("TOY1, my-toy12's") == "toy1 toy1_1, my-toy12 toy12_1's"


# --- initialisation ---------------------------------------------------------------------------------------------------


def test_a_word_is_the_start_of_every_token(diffusion: Any) -> None:
    tokens = ConceptTokens(diffusion.vocabularies[0], 2)
    rows = tokens.add("<c1>", "word", "symbol", seeded())
    word = diffusion.tokenizer("symbol", add_special_tokens=False).input_ids
    assert len(word) == 1
    assert torch.equal(rows, tokens.base.weight[word].repeat(2, 1))
    # a copy: training the rows must not reach the table
    assert rows.data_ptr() != tokens.base.weight.data_ptr()


@pytest.mark.parametrize(
    ("word", "says"), [("", "class noun"), ("hot dog", "'hot dog' is 2 tokens|not one"), ("<c1>", "'<c1>'")]
)
def test_a_start_that_is_not_one_word(diffusion: Any, word: str, says: str) -> None:
    tokens = tokens_of(diffusion, 1, "<c1>")
    with pytest.raises(UserError, match=says):
        tokens.add("<c2>", "word", word, seeded())
    assert len(tokens.rows) == 1


def test_random_rows_have_the_tables_mean_and_deviation(diffusion: Any) -> None:
    n = 500
    tokens = ConceptTokens(diffusion.vocabularies[0], n)
    rows = tokens.add("<c1>", "random", "", seeded(3)).detach()
    table = tokens.base.weight[: tokens.base_size]
    assert bool(((rows.mean(0) - table.mean(0)).abs() < 5 * table.std(0) / n**0.5).all())
    assert bool(((rows.std(0) / table.std(0) - 1).abs() < 0.2).all())
    again = tokens.add("<c2>", "random", "", seeded(3))
    other = tokens.add("<c3>", "random", "", seeded(4))
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)


def test_rows_are_float32_on_a_table_in_half_precision(diffusion: Any) -> None:
    diffusion.text_encoder.to(torch.bfloat16)
    tokens = tokens_of(diffusion, 1, "<c1>")
    assert tokens.rows[0].dtype == torch.float32
    assert tokens(diffusion.vocabularies[0].ids(["a <c1>"])).dtype == torch.bfloat16


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_placeholders_become_all_their_tokens(diffusion: Any) -> None:
    tokens = tokens_of(diffusion, 2, *(f"<c{i}>" for i in range(1, 12)))
    assert tokens.words(1) == ["<c2>", "<c2>_1"]
    assert tokens.expand("a photo of <c2>") == "a photo of <c2> <c2>_1"
    assert tokens.expand("<c1>, <c11> and <c1>") == "<c1> <c1>_1, <c11> <c11>_1 and <c1> <c1>_1"
    assert tokens.expand("a photo of a cat") == "a photo of a cat"
    assert tokens.used("<c11> beside <c2>") == [1, 10]


def test_placeholders_without_brackets_are_told_apart(diffusion: Any) -> None:
    tokens = tokens_of(diffusion, 2, *(f"sks{i}" for i in range(1, 12)))
    assert tokens.expand("sks1 and sks11") == "sks1 sks1_1 and sks11 sks11_1"
    ids = diffusion.vocabularies[0].ids([tokens.expand("sks11")])[0]
    assert [int(i) - tokens.base_size for i in ids if i >= tokens.base_size] == [20, 21]
    assert tokens.used("sks11") == [10]


def test_one_token_leaves_prompts_alone(diffusion: Any) -> None:
    assert tokens_of(diffusion, 1, "<c1>").expand("a <c1>") == "a <c1>"


def test_a_prompt_that_does_not_fit(diffusion: Any) -> None:
    # start and end take two of the 24
    assert diffusion.vocabularies[0].ids(["a " * 22]).shape == (1, 24)
    with pytest.raises(UserError, match="25 tokens, the model takes 24"):
        diffusion.vocabularies[0].ids(["a symbol", "a " * 23])
