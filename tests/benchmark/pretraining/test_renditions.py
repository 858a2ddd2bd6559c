import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.bundled import bundled_backbones
from dualcl.benchmark.pretraining.recipes import pretrain
from dualcl.benchmark.pretraining.renditions import nearest_mean
from dualcl.datasets.drawing.renditions import GLYPHS

TINY = {"classes": 3, "per_class": 8, "test_per_class": 2, "steps": 3, "batch": 8, "embed_dim": 16, "depth": 1}


def load(file):
    card = json.loads(file.read_text())
    model = timm.create_model(card["timm_name"], pretrained=False, **card["kwargs"])
    model.load_state_dict(load_file(file.with_suffix(".safetensors")), strict=True)
    return card, model


def test_bundled_weights_are_those_of_the_card_and_its_classes_are_in_no_stream():
    file = bundled_backbones()["renditions-vit"]
    card, _ = load(file)
    weights = file.with_suffix(".safetensors")
    assert weights.stat().st_size <= 4 * 2**20
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card["sha256"]
    text = file.with_suffix(".md").read_text()
    assert card["sha256"] in text
    named = {name.strip() for name in text.split("Classes: ")[1].rstrip(".\n").replace("\n", " ").split(", ")}
    assert named == set(GLYPHS["pretraining"])


def test_what_the_bundled_vit_knows_does_not_suffice_in_new_renditions():
    _, model = load(bundled_backbones()["renditions-vit"])
    known, new = (nearest_mean(model, "tuning", kinds, 8, 1, 48) for kinds in ("known", "new"))
    assert known > 0.8
    assert 0.3 < new < known - 0.15


def test_a_small_one_is_written_and_the_same_again_and_resumes(tmp_path):
    torch.manual_seed(5)
    first = pretrain("renditions-vit", tmp_path / "a", seed=3, **TINY)
    torch.manual_seed(6)
    again = pretrain("renditions-vit", tmp_path / "b", seed=3, **TINY)
    other = pretrain("renditions-vit", tmp_path / "c", seed=4, **TINY)
    assert first["sha256"] == again["sha256"] != other["sha256"]
    assert first["sha256"] == pretrain("renditions-vit", tmp_path / "a", seed=3, **TINY)["sha256"]
    card, model = load(tmp_path / "a" / "renditions_vit.json")
    assert model(torch.zeros(2, 3, 48, 48)).shape == (2, 16)
    assert "seed=3" in card["command"]
    with pytest.raises(UserError, match="another steps"):
        pretrain("renditions-vit", tmp_path / "a", seed=3, **{**TINY, "steps": 4})


def test_one_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="classes=1"):
        pretrain("renditions-vit", tmp_path, classes=1)
