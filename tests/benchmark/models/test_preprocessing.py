"""How images are prepared for a file of weights: said by the file, beside it, by the tag, or by the user."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.runs.runner import run

# isort: split
import timm

NAME, KWARGS = "vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
CFG = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "interpolation": "bilinear", "crop_pct": 1.0}
IMAGENET = ((0.485, 0.456, 0.406), "bicubic")
OWN = ((0.5, 0.4, 0.3), "bilinear")


def resolved(folder, *sets, name=NAME, config=None, metadata=None):
    torch.manual_seed(0)
    state = timm.create_model(NAME, num_classes=0, **KWARGS).state_dict()
    save_file(state, folder / "vit.safetensors", metadata=metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    given = [f"backbone.name={name}", f"backbone.weights={folder / 'vit.safetensors'}", "device=cpu", "input.workers=0"]
    given += ["data.classes=2", "stream.tasks=1", "data.limit=2"]
    return resolve("glyphs", "ncm", [*given, f"backbone.kwargs={json.dumps(KWARGS)}", *sets])


CASES = {
    "metadata": ({"metadata": {"pretrained_cfg": json.dumps(CFG)}}, OWN, "metadata of vit.safetensors"),
    "flat metadata": ({"metadata": {k: json.dumps(CFG[k]) for k in ("mean", "std")}}, (OWN[0], "bicubic"), "metadata"),
    "config": ({"config": {"architecture": NAME, "pretrained_cfg": CFG}}, OWN, "config.json beside vit.safetensors"),
    "flat config": ({"config": CFG}, OWN, "config.json beside"),
    "metadata first": ({"metadata": {"pretrained_cfg": json.dumps(CFG)}, "config": {"mean": 1}}, OWN, "metadata"),
    "tag": ({"name": f"{NAME}.augreg_in21k"}, ((0.5,) * 3, "bicubic"), f"tag {NAME}.augreg_in21k"),
    "another's config, tag": (
        {"name": f"{NAME}.augreg_in21k", "config": {"architecture": "other", "pretrained_cfg": CFG}},
        ((0.5,) * 3, "bicubic"),
        "tag",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_mean_and_std_are_those_of_the_weights(case, tmp_path):
    given, wanted, who = CASES[case]
    domain = Classification(resolved(tmp_path, **given), torch.device("cpu"))
    assert (domain.view.mean, domain.view.interpolation) == wanted
    assert domain.facts()["prepared_as"].startswith(who)


def test_without_a_word_they_must_be_given(tmp_path):
    with pytest.raises(UserError, match=r"vit\.safetensors does not say .*; set input\.mean and input\.std$"):
        Classification(resolved(tmp_path), torch.device("cpu"))
    own = Classification(resolved(tmp_path, "input.mean=[0.1,0.2,0.3]", "input.std=[1,1,1]"), torch.device("cpu"))
    assert (own.view.mean, own.facts()["prepared_as"]) == ((0.1, 0.2, 0.3), "input.mean")
    imagenet = Classification(resolved(tmp_path, "input.preprocess=imagenet"), torch.device("cpu"))
    assert (imagenet.view.mean, imagenet.view.interpolation) == IMAGENET
    with pytest.raises(UserError, match="go together"):
        resolved(tmp_path, "input.mean=[0.1,0.2,0.3]")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"mean": [0.5] * 3}, "std is None, not three numbers"),
        ({**CFG, "mean": [0.5]}, r"mean is \[0\.5\], not three"),
        ({**CFG, "interpolation": "lanczos"}, "interpolation is 'lanczos'"),
    ],
)
def test_half_a_description_is_refused(cfg, message, tmp_path):
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        Classification(resolved(tmp_path, config=cfg), torch.device("cpu"))


def test_a_run_of_an_older_version_goes_on_as_it_was_begun(tmp_path):
    (tmp_path / "run").mkdir()
    older = resolved(tmp_path, "input.preprocess=imagenet")
    run(older, tmp_path / "run")
    place = tmp_path / "run" / "record.json"
    record = json.loads(place.read_text())
    plain = resolved(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    # such a record: no word of who said it, bicubic by default, and nothing that would say another mean
    del record["network"]["prepared_as"], record["sha256"]
    for key in ("mean", "std"):
        del record["config"]["input"][key]
    record["config"]["input"] |= {"preprocess": "backbone", "interpolation": "bicubic"}
    record |= {"status": "interrupted", "config_hash": plain.hash()}
    place.write_text(json.dumps(record))
    resumed = run(plain, tmp_path / "run")
    assert resumed["status"] == "finished"
    assert tuple(resumed["identity"]["preprocess"]["mean"]) == IMAGENET[0]
    assert resumed["network"]["prepared_as"] == "an older version"


def test_new_keys_leave_the_hash_of_old_runs():
    assert resolve("glyphs", "ncm", []).hash() == resolve("glyphs", "ncm", ["input.interpolation=bicubic"]).hash()
    flat = resolve("glyphs", "ncm", []).flat(volatile=False)
    assert flat["input.interpolation"] == "bicubic"
    assert not {"input.mean", "input.std"} & set(flat)
