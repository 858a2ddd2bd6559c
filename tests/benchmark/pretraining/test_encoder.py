"""The encoder of portraits: trained a little, read again, and used in a stream."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.bundled import bundled_diffusion
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.row_encoder import load_row_encoder
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.pretraining import encoder as pretraining
from dualcl.benchmark.pretraining.encoder import EncoderRecipe, GivenRows, Prompts, pictures, someone
from dualcl.benchmark.pretraining.portraits import drawing_hash
from dualcl.benchmark.pretraining.recipes import pretrain
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.datasets.drawing.people import part_of

TINY = {"persons": 4, "per_person": 2, "test_persons": 2, "steps": 3, "batch": 2}


def test_a_small_encoder_is_trained_in_pieces_and_names_persons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def killed(*args: object, **given: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:  # trained, not yet written
        patch.setattr(pretraining, "_measured", killed)
        with pytest.raises(Killed):
            pretrain("portraits-encoder", tmp_path / "a", **TINY)
    state = (tmp_path / "a" / "state" / "encoder.safetensors").read_bytes()
    card = pretrain("portraits-encoder", tmp_path / "a", **TINY)
    assert (tmp_path / "a" / "state" / "encoder.safetensors").read_bytes() == state  # no step is taken again
    assert card["pictures"] == 8
    assert card["measured"].keys() == {"n", "own", "another", "own_words", "own_images", "plain"}
    assert all(0 < card["measured"][k] < 2 for k in card["measured"].keys() - {"n"})

    sets = ["stream.tasks=2", "eval.n=1", "eval.steps=1", "threads=1", "data.per_concept=2"]
    folder = tmp_path / "a" / "portraits_encoder"
    resolved = resolve("portraits-10", "encoder", [*sets, f"method.encoder={folder}"])
    record: dict = {"tasks": [], "matrix": {"rows": []}, "measured": {"tasks": []}}
    work = Run(resolved, RunFolder(tmp_path / "run"), Reporter(quiet=True))
    work.execute(record)
    assert record["tasks"][0]["diagnostics"]["encoder_sha256"] == card["sha256"]
    with pytest.raises(UserError, match=r"was trained for portraits-diffusion .* the model is glyph-diffusion"):
        Run(
            resolve("glyph-concepts", "encoder", ["stream.tasks=1", f"method.encoder={folder}"]),
            RunFolder(tmp_path / "other"),
            Reporter(quiet=True),
        )


def test_the_bundled_encoder_is_its_card_s_and_knows_one_stranger_from_another() -> None:
    encoder = load_row_encoder("portraits-encoder")
    assert encoder.card["recipe"] == asdict(EncoderRecipe())
    assert encoder.card["drawing"] == drawing_hash()
    model = load(BaseConfig(model="portraits-diffusion"))
    assert encoder.card["base_sha256"] == model.info.weights_sha256
    recipe = EncoderRecipe(test_persons=24)
    found = pretraining._measured(encoder, Prompts(model, recipe.test_persons, recipe.n_tokens), 1, recipe)
    assert found["own"] < found["plain"] < found["another"]
    assert found["own"] < min(found["own_words"], found["own_images"]) < found["plain"]


def test_it_sees_nobody_of_a_stream_and_two_pictures_of_each() -> None:
    for i in range(40):
        assert part_of(dict(someone(0, "encoder", i).looks)) == "pretraining"
    drawn = pictures(0, "encoder", 2, 2)
    assert drawn.shape == (2, 2, 48, 48, 3)
    assert len({p.numpy().tobytes() for p in drawn.flatten(0, 1)}) == 4
    with pytest.raises(UserError, match="per_person=1: what is read and what is drawn must differ"):
        EncoderRecipe(per_person=1)


def test_words_of_a_batch_have_its_rows_and_others_those_of_the_table() -> None:
    assert "portraits-diffusion" in bundled_diffusion()
    model = load(BaseConfig(model="portraits-diffusion"))
    vocabulary = model.vocabularies[0]
    table = vocabulary.encoder.get_input_embeddings()
    prompts = Prompts(model, 12, 2)
    ids = vocabulary.ids([f"a portrait of {' '.join(own)}" for own in prompts.words])
    plain = vocabulary.ids(["a portrait of"])[0]
    assert (ids[:, :4] == plain[:4]).all()
    size = prompts.given.size
    assert ids[:, 4:6].tolist() == [[size + 2 * i, size + 2 * i + 1] for i in range(12)]
    assert (ids[:, 6] == plain[4]).all()
    given = GivenRows(table, size)
    given.rows = torch.randn(24, table.weight.shape[1]).requires_grad_()
    out = given(ids)
    assert torch.equal(out[:, 4:6].flatten(0, 1), given.rows)
    assert torch.equal(out[0, :4], table(plain)[:4])
    (grad,) = torch.autograd.grad(out.sum(), [given.rows])
    assert torch.equal(grad, torch.ones_like(grad))
