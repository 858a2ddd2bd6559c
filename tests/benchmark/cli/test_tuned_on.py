"""The two-phase protocol by hand: `sweep` on one stream, `compare --tuned-on` on another."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm
from PIL import Image
from safetensors.torch import save_file

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.tuned import SAMPLE, Tuned, read_tuned, stream_of
from dualcl.benchmark.core.errors import UserError

KWARGS = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two streams of a tiny ViT, reported.yaml (glyphs) and tune.yaml (coloured noise), swept already."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **KWARGS)
    save_file(model.state_dict(), folder / "tiny.safetensors")
    draw = np.random.default_rng(0)
    for part, n in (("train", 5), ("test", 2)):
        for name in ("red", "green", "blue", "grey"):
            (folder / "noise" / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "noise" / part / name / f"{i}.png")
    common = f"""
domain: classification
stream: {{tasks: 2}}
backbone:
  name: vit_tiny_patch16_224.augreg_in21k
  weights: {folder / "tiny.safetensors"}
  kwargs: {json.dumps(KWARGS)}
train: {{epochs: 1, batch_size: 4}}
search: {{points: 2, methods: {{lora: {{lr: [1e-3, 1e-2]}}, linear_probe: {{lr: [1e-3, 1e-2]}}}}}}
"""
    data = "data: {name: glyphs, train_per_class: 5, test_per_class: 3, classes: 4}"
    (folder / "reported.yaml").write_text(common + data)
    (folder / "tune.yaml").write_text(common + f"data: {{name: image-folder, root: {folder / 'noise'}}}")
    sets = ["--set", "data.holdout=0.2", "--quiet"]
    assert main(["sweep", str(folder / "tune.yaml"), "lora", "--out", str(folder / "swept"), *sets]) == 0
    return folder


def run_of(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_settings_of_another_stream_are_used_and_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(place / "reported.yaml"), "--methods", "lora,ncm", "--out", str(tmp_path), "--quiet"]
    assert main([*command, "--tuned-on", str(place / "swept"), "--format", "md,csv,tex,html"]) == 0
    captured = capsys.readouterr()
    best = json.loads((place / "swept" / "lora" / "sweep.json").read_text())["best"]["settings"]
    made = run_of(tmp_path / "lora-seed0")
    assert made["config"]["method"]["lr"] == float(best["method.lr"])
    assert made["sources"]["method.lr"] == "sweep on tune"
    assert made["run"]["tuned_on"] == "tune"
    assert made["run"]["tuning"].startswith("dualcl sweep on tune: 2 points, 1 seed, by A_last on validation images")
    assert "tuned_on" not in run_of(tmp_path / "ncm-seed0")["run"]
    assert "no sweep of ncm" in captured.err
    line = f"tuned on {made['run']['tuning'].removeprefix('dualcl sweep on ')}: lora"
    assert line in " ".join(captured.out.split())
    assert "not tuned on another stream: ncm" in captured.out
    for name in ("table.md", "report.html", "table.tex"):
        text = (tmp_path / "report" / name).read_text()
        assert "tuned on tune: 2 points" in text, name


def test_who_has_nothing_to_tune_is_not_called_untuned(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {place / 'reported.yaml'}\ntuning: {{ncm: nothing to tune}}\n")
    command = ["compare", str(own), "--methods", "lora,ncm,linear_probe", "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*command, "--tuned-on", str(place / "swept")]) == 0
    assert "not tuned on another stream: linear_probe\n" in capsys.readouterr().out


def test_by_hand_goes_before_the_sweep(place: Path, tmp_path: Path) -> None:
    command = ["run", str(place / "reported.yaml"), "lora", "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*command, "--tuned-on", str(place / "swept"), "--set", "method.lr=0.5"]) == 0
    made = run_of(tmp_path / "run")
    assert made["config"]["method"]["lr"] == 0.5
    assert made["run"]["tuning"].startswith("--set method.lr; the rest: dualcl sweep on tune")


def test_what_a_sweep_was_given_goes_with_what_it_found(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["methods.lora.rank=2", "train.optimizer=sgd", "train.batch_size=3", "train.log_every=1"]
    command = ["sweep", str(place / "tune.yaml"), "lora", "--over", "method.lr=1e-4,1e-3"]
    assert main([*command, "--out", str(tmp_path / "sw"), "--set", *fixed]) == 0
    tree = json.loads((tmp_path / "sw" / "lora" / "sweep.json").read_text())
    best = {**tree["points"][0]["settings"], "method.rank": "2", "train.optimizer": "sgd"}
    assert tree["best"]["settings"] == best
    assert tree["best"]["use"] == "--set " + " ".join(f"{key}={value}" for key, value in best.items())
    assert tree["tuning"].endswith("training images), at method.rank=2, train.optimizer=sgd")
    assert f"use it with: {tree['best']['use']}\n" in capsys.readouterr().err

    use = ["run", str(place / "reported.yaml"), "lora", "--tuned-on", str(tmp_path / "sw"), "--quiet", "--out"]
    assert main([*use, str(tmp_path / "run")]) == 0
    made = run_of(tmp_path / "run")
    assert (made["config"]["method"]["rank"], made["sources"]["method.rank"]) == (2, "sweep on tune")
    assert made["config"]["method"]["lr"] == float(best["method.lr"])
    assert (made["config"]["train"]["optimizer"], made["config"]["train"]["batch_size"]) == ("sgd", 4)
    assert main([*use, str(tmp_path / "own"), "--set", "method.rank=3"]) == 0
    made = run_of(tmp_path / "own")
    assert (made["config"]["method"]["rank"], made["sources"]["method.rank"]) == (3, "--set")


def test_settings_of_the_reported_stream_are_refused_unless_allowed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(place / "tune.yaml"), "lora", "--out", str(tmp_path / "run"), "--quiet"]
    tuned = ["--tuned-on", str(place / "swept" / "lora")]
    assert main([*command, *tuned]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(
        r"were chosen on train/\w+/\d.png, a picture of this stream too \(16 of 16 compared\)", captured.err
    )
    assert not (tmp_path / "run" / "record.json").exists()
    assert main([*command, *tuned, "--allow-same-stream"]) == 0
    assert run_of(tmp_path / "run")["run"]["caveats"] == ["its settings were chosen on this very stream"]
    assert "chosen on this very stream" in " ".join(capsys.readouterr().out.split())


def test_a_stream_is_another_by_its_pictures_not_by_the_names_of_its_folders(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed, others = tmp_path / "renamed", tmp_path / "others"
    for file in sorted((place / "noise").rglob("*.png")):
        part, name, number = file.relative_to(place / "noise").parts
        for copy in (renamed / part / f"the {name}" / number, others / part / name / number):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        with Image.open(file) as image:
            image.rotate(90).save(others / part / name / number)
    tuned = ["run", str(place / "tune.yaml"), "lora", "--quiet", "--tuned-on"]
    command = [*tuned, str(place / "swept"), "--out", str(tmp_path / "run"), "--set"]
    assert main([*command, f"data.root={renamed}"]) == 2
    assert "were chosen on train/the " in capsys.readouterr().err
    assert main([*command, f"data.root={others}"]) == 0
    assert run_of(tmp_path / "run")["run"]["caveats"] == []

    older = tmp_path / "older"
    older.mkdir()
    tree = json.loads((place / "swept" / "lora" / "sweep.json").read_text())
    del tree["stream"]["pictures"]
    (older / "sweep.json").write_text(json.dumps(tree))
    command = [*tuned, str(older), "--out", str(tmp_path / "names"), "--set", f"data.root={others}"]
    assert main(command) == 2
    assert "by name too (4 shared)" in capsys.readouterr().err
    assert main([*command, "--allow-same-stream"]) == 0
    said = ["its settings were chosen on classes or concepts of the same names"]
    assert run_of(tmp_path / "names")["run"]["caveats"] == said


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (None, "holds no sweep.json"),
        ("{", "is no whole sweep.json"),
        ('{"format": "dualcl-sweep", "method": "lora", "best": null}', "names no best point"),
        ('{"format": "dualcl-sweep", "method": "lora", "best": {"settings": {}}}', "does not say what it was measured"),
        ('{"format": "dualcl-sweep", "method": "ncm"}', "has no sweep of lora"),
    ],
)
def test_what_is_no_sweep_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tree: str | None, says: str
) -> None:
    if tree is not None:
        (tmp_path / "sweep.json").write_text(tree)
    command = ["run", str(place / "reported.yaml"), "lora", "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*command, "--tuned-on", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert says in captured.err


RECORDED = Path(__file__).parents[3] / "results" / "recorded"


@pytest.mark.parametrize(
    "found", sorted(RECORDED.glob("*/sweeps/*/sweep.json")), ids=lambda p: "/".join(p.parts[-4:-1])
)
def test_a_sweep_that_lies_with_its_page_is_one_that_the_page_used(found: Path) -> None:
    tuned = read_tuned(found.parents[1], found.parent.name)
    assert tuned is not None
    for place in found.parents[2].glob(f"records/{found.parent.name}-seed*/record.json"):
        record = json.loads(place.read_text(encoding="utf-8"))
        if "tuned_on" not in record["run"]:
            continue  # made before the search, at the preset's settings
        assert not tuned.check(record["identity"]["data"], stream_of(record)["items"])
        used = record["config"]["method"]
        assert {f"method.{key}": used[key] for key in used if f"method.{key}" in tuned.values} == tuned.values


def test_pictures_tell_a_stream_where_they_are_known(place: Path) -> None:
    stream = json.loads((place / "swept" / "lora" / "sweep.json").read_text())["stream"]
    names, sampled = stream["items"], stream["pictures"]
    assert len(sampled) == SAMPLE * len(names)
    tuned = read_tuned(place / "swept", "lora")
    assert tuned is not None
    renamed = [("train", "azul", f"azul/{i}.png", hashed * 4) for i, hashed in enumerate(sampled)]
    with pytest.raises(UserError, match=r"chosen on azul/0\.png, a picture of this stream too \(16 of 16 compared\)"):
        tuned.check("another set", ["azul"], renamed)
    assert not tuned.check("another set", ["rojo"], renamed)  # a class that the stream leaves out
    others = [("train", name, f"{name}/0.png", "0" * 64) for name in names]
    assert not tuned.check("image-folder", names, others)
    # of a stream that is drawn, and of a sweep that says no pictures, names are all there is
    with pytest.raises(UserError, match=r"on blue of image-folder, which this stream has by name too \(4 shared"):
        tuned.check("image-folder", names)
    older = Tuned(tuned.preset, tuned.settings, tuned.tuning, tuned.data, tuned.items)
    with pytest.raises(UserError, match="unless its pictures are others: then give the same `dualcl sweep` command"):
        older.check("image-folder", names, others)
    assert not older.check("another set", names, renamed)


def test_of_many_pictures_a_sweep_keeps_the_same_few_whatever_their_order() -> None:
    record = {"network": {}, "tasks": [{"classes": ["a"]}, {"classes": ["b"]}], "identity": {"data": "set"}}
    found = [("test", name, str(i), f"{name}{i:015x}".ljust(64, "0")) for name in ("a", "b", "c") for i in range(9)]
    stream = stream_of(record, found)
    assert stream == stream_of(record, found[::-1])
    assert stream["pictures"] == [f"{name}{i:015x}" for name in ("a", "b") for i in range(SAMPLE)]
    assert "pictures" not in stream_of(record)
