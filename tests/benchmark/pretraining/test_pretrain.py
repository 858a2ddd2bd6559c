import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.pretraining import glyph_vit
from dualcl.benchmark.pretraining.backbones import nearest_mean_accuracy, outputs
from dualcl.benchmark.pretraining.glyph_vit import _drawn
from dualcl.benchmark.pretraining.recipes import pretrain
from dualcl.datasets.drawing.glyphs import PRETRAINING_GLYPHS, STREAM_GLYPHS

BUNDLED = Path(glyph_vit.__file__).parents[1] / "models" / "bundled"
TINY = {"classes": 3, "per_class": 8, "test_per_class": 2, "epochs": 1, "batch_size": 8, "embed_dim": 16, "depth": 1}


def load(folder):
    card = json.loads((folder / "glyph_vit.json").read_text())
    model = timm.create_model(card["timm_name"], pretrained=False, **card["kwargs"])
    state = load_file(folder / "glyph_vit.safetensors")
    model.load_state_dict(state, strict=True)
    return card, model, state


def test_bundled_weights_are_small_and_are_those_of_the_card():
    file = BUNDLED / "glyph_vit.safetensors"
    assert file.stat().st_size <= 4 * 2**20
    card, _, state = load(BUNDLED)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == card["sha256"]
    assert card["sha256"] in (BUNDLED / "glyph_vit.md").read_text()
    assert {t.dtype for t in state.values()} == {torch.float16}
    assert all(t.isfinite().all() for t in state.values())
    assert card["kwargs"]["num_classes"] == 0


def test_bundled_model_card_names_no_stream_class():
    classes = (
        (BUNDLED / "glyph_vit.md").read_text().split("## Classes\n")[1].rstrip(".\n").replace("\n", " ").split(", ")
    )
    assert {c.strip() for c in classes} == set(PRETRAINING_GLYPHS)
    assert not set(classes) & set(STREAM_GLYPHS)


def test_bundled_features_tell_the_stream_classes_apart_far_better_than_chance():
    _, model, _ = load(BUNDLED)
    train, labels = _drawn(STREAM_GLYPHS, "train", 12, 1, 32)
    test, test_labels = _drawn(STREAM_GLYPHS, "test", 8, 1, 32)
    accuracy = nearest_mean_accuracy(outputs(model, train), labels, outputs(model, test), test_labels)
    assert accuracy > 0.25


def test_nearest_mean_accuracy_counts_right_answers():
    train, labels = torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), torch.tensor([0, 0, 1])
    test = torch.tensor([[2.0, 0.1], [0.1, 3], [5, 0]])
    assert nearest_mean_accuracy(train, labels, test, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


def test_miniature_pretraining_writes_a_loadable_file_and_repeats(tmp_path, capsys):
    torch.manual_seed(5)
    first = pretrain("glyph-vit", tmp_path / "a", seed=3, **TINY)
    torch.manual_seed(6)
    again = pretrain("glyph-vit", tmp_path / "b", seed=3, **TINY)
    other = pretrain("glyph-vit", tmp_path / "c", seed=4, **TINY)
    assert first["sha256"] == again["sha256"] != other["sha256"]
    card, model, _ = load(tmp_path / "a")
    assert card["recipe"]["depth"] == 1
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 16)
    assert 0 <= card["measured"]["held_out_accuracy"] <= 1
    assert "seed=3" in card["command"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "glyph_vit.json",
        "glyph_vit.md",
        "glyph_vit.safetensors",
    ]
    shown = capsys.readouterr()
    assert "epoch 1/1" in shown.err
    assert shown.out == ""


def test_training_lowers_the_loss(tmp_path, capsys):
    pretrain("glyph-vit", tmp_path, **{**TINY, "per_class": 24, "epochs": 6, "lr": 3e-3, "embed_dim": 32})
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().err)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("glyph-vitt", {}, "did you mean 'glyph-vit'"),
        ("glyph-vit", {"epoch": 1}, "did you mean 'epochs'"),
        ("glyph-vit", {"classes": 1}, "classes=1"),
    ],
)
def test_wrong_wishes_are_named(tmp_path, name, settings, told):
    with pytest.raises(UserError, match=told):
        pretrain(name, tmp_path, **settings)


def test_output_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="is a file"):
        pretrain("glyph-vit", tmp_path / "f")
