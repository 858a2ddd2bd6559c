"""A run is of its files by content: others under the same names stop it, the same ones elsewhere do not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dualcl.benchmark.cli import main
from dualcl.benchmark.models.bundled import bundled_backbones, bundled_diffusion
from dualcl.benchmark.runs.runner import Run
from dualcl.results.records import record_checksum

IMAGES = "image-folder ncm --quiet --set stream.tasks=2 backbone.name=glyph-vit device=cpu input.workers=0"
CONCEPTS = (
    "concept-folder {} --quiet --set stream.tasks=1 train.steps=1 eval.n=1 eval.steps=2 eval.features=glyph-vit "
    "prior.steps=2 data.noun=dog device=cpu"
)


def fill(root: Path, folders: list[str], seed: int, suffix: str = ".png") -> None:
    """Two noise pictures in each folder, under names that do not change; as .ppm all have one size."""
    rng = np.random.default_rng(seed)
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / folder / f"{i}{suffix}")


PARTS = [f"{part}/{label}" for part in ("train", "val") for label in "abcd"]


class Dualcl:
    """`dualcl WORDS` in this process: exit code, and what was said in `said`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.said = capsys, ""

    def __call__(self, command: str, text: str, *more: Any) -> int:
        self.capsys.readouterr()
        code = main([command, *text.split(), *map(str, more)])
        self.said = "".join(self.capsys.readouterr())
        return code


@pytest.fixture
def dualcl(capsys: pytest.CaptureFixture[str]) -> Dualcl:
    return Dualcl(capsys)


@pytest.fixture
def interrupted(dualcl: Dualcl, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """interrupted(command...) does the first task and stops as Ctrl-C does."""
    stage = Run._stage

    def stopping(self: Run, record: Any, task: int, stages: int, partial: Any) -> None:
        if task:
            raise KeyboardInterrupt
        stage(self, record, task, stages, partial)

    def run(*words: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "_stage", stopping)
            assert dualcl("run", *words) == 130

    return run


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites a record, checksum and all."""
    record = json.loads((folder / "record.json").read_text())
    change(record)
    record.pop("sha256")
    (folder / "record.json").write_text(json.dumps({**record, "sha256": record_checksum(record)}))


# --- other files under the same names ---------------------------------------------------------------------------------


def test_a_finished_run_of_other_images_stops_and_so_does_a_report_of_both(tmp_path: Path, dualcl: Dualcl) -> None:
    root = f"data.root={tmp_path / 'images'}"
    fill(tmp_path / "images", PARTS, 0)
    assert dualcl("run", IMAGES, root, "--out", tmp_path / "runs" / "s0") == 0
    assert dualcl("run", IMAGES, root, "--out", tmp_path / "runs" / "s0") == 0
    fill(tmp_path / "images", PARTS, 1)
    assert dualcl("run", IMAGES, root, "--out", tmp_path / "runs" / "s0") == 2
    assert "another data (sha256 there " in dualcl.said
    assert "have changed" in dualcl.said
    assert dualcl("run", IMAGES, root, "--seed", 1, "--out", tmp_path / "runs" / "s1") == 0
    assert dualcl("report", str(tmp_path / "runs")) == 2
    assert "the content of data has changed" in dualcl.said
    # put back, it is the run that it was
    fill(tmp_path / "images", PARTS, 0)
    assert dualcl("run", IMAGES, root, "--out", tmp_path / "runs" / "s0") == 0


def test_an_image_of_the_same_size_and_time_is_another_image(tmp_path: Path, dualcl: Dualcl) -> None:
    root = f"data.root={tmp_path / 'images'}"
    fill(tmp_path / "images", PARTS, 0, ".ppm")
    old = {p: p.stat() for p in (tmp_path / "images").rglob("*.ppm")}
    assert dualcl("run", IMAGES, root, "--out", tmp_path / "run") == 0
    fill(tmp_path / "images", PARTS, 1, ".ppm")
    for path, stat in old.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert dualcl("run", IMAGES, root, "--out", tmp_path / "run") == 2
    assert dualcl("run", IMAGES, root, "--out", tmp_path / "second") == 0
    one, two = (json.loads((tmp_path / n / "record.json").read_text()) for n in ("run", "second"))
    assert one["content"]["data"] != two["content"]["data"]
    assert one["matrix"] != two["matrix"]


def test_an_interrupted_run_stops_at_one_changed_image_and_at_another_name_of_a_class(
    tmp_path: Path, dualcl: Dualcl, interrupted: Callable[..., None]
) -> None:
    command = (IMAGES, f"data.root={tmp_path / 'images'}", "--out", tmp_path / "run")
    fill(tmp_path / "images", PARTS, 0)
    interrupted(*command)
    kept = (tmp_path / "images" / "val" / "c" / "1.png").read_bytes()
    fill(tmp_path / "images", ["val/c"], 1)
    assert dualcl("run", *command) == 2
    assert "another data (" in dualcl.said
    fill(tmp_path / "images", PARTS, 0)
    assert (tmp_path / "images" / "val" / "c" / "1.png").read_bytes() == kept
    (tmp_path / "images" / "class_names.json").write_text('{"a": "apple"}')
    assert dualcl("run", *command) == 2
    assert "another words (" in dualcl.said
    (tmp_path / "images" / "class_names.json").unlink()
    assert dualcl("run", *command) == 0


def test_a_finished_run_of_other_weights_stops_and_the_same_tensors_in_another_file_do_not(
    tmp_path: Path, dualcl: Dualcl
) -> None:
    fill(tmp_path / "images", PARTS, 0)
    file = tmp_path / "vit.safetensors"
    shutil.copy(bundled_backbones()["glyph-vit"].with_suffix(".safetensors"), file)
    command = (IMAGES, f"data.root={tmp_path / 'images'}", f"backbone.weights={file}", "--out", tmp_path / "run")
    assert dualcl("run", *command) == 0
    state = load_file(file)
    save_file(state, file, metadata={"note": "the same tensors"})
    assert dualcl("run", *command) == 0
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, file)
    assert dualcl("run", *command) == 2
    assert "another weights_sha256 (sha256 there " in dualcl.said


def test_a_comparison_does_not_reuse_runs_of_other_images(tmp_path: Path, dualcl: Dualcl) -> None:
    fill(tmp_path / "images", PARTS, 0)
    sets = "--quiet --set stream.tasks=2 backbone.name=glyph-vit device=cpu input.workers=0"
    command = (f"image-folder --methods ncm --seeds 0 {sets}", f"data.root={tmp_path / 'images'}", "--out", tmp_path)
    assert dualcl("compare", *command) == 0
    assert dualcl("compare", *command) == 0
    fill(tmp_path / "images", PARTS, 1)
    assert dualcl("compare", *command) == 2
    assert "another data (" in dualcl.said


def test_other_photographs_and_other_prior_images_stop_a_finished_run_and_a_report(
    tmp_path: Path, dualcl: Dualcl
) -> None:
    fill(tmp_path / "photos", ["rex", "tom"], 0)
    fill(tmp_path / "prior", ["dog", "unused"], 1)
    sets = (f"data.root={tmp_path / 'photos'}", f"prior.images={tmp_path / 'prior'}")
    command = (CONCEPTS.format("dreambooth"), *sets, "--out", tmp_path / "runs" / "s0")
    assert dualcl("run", *command) == 0
    fill(tmp_path / "prior", ["unused"], 2)
    assert dualcl("run", *command) == 0
    fill(tmp_path / "prior", ["dog"], 2)
    assert dualcl("run", *command) == 2
    assert "another prior.dog (" in dualcl.said
    assert "have changed" in dualcl.said
    assert dualcl("run", *command[:-1], tmp_path / "runs" / "s1", "--seed", 1) == 0
    assert dualcl("report", str(tmp_path / "runs")) == 2
    assert "content of prior.dog" in dualcl.said
    fill(tmp_path / "photos", ["tom"], 3)
    assert dualcl("run", *command) == 2
    assert "another data (" in dualcl.said


def test_a_noun_that_gets_a_folder_of_its_own_has_other_prior_images(tmp_path: Path, dualcl: Dualcl) -> None:
    fill(tmp_path / "photos", ["rex"], 0)
    fill(tmp_path, ["prior"], 1)
    sets = (f"data.root={tmp_path / 'photos'}", f"prior.images={tmp_path / 'prior'}")
    command = (CONCEPTS.format("dreambooth"), *sets, "--out", tmp_path / "run")
    assert dualcl("run", *command) == 0
    fill(tmp_path / "prior", ["dog"], 2)
    assert dualcl("run", *command) == 2
    assert "another prior.dog (" in dualcl.said


def test_other_settings_of_a_base_model_stop_a_finished_run(tmp_path: Path, dualcl: Dualcl) -> None:
    fill(tmp_path / "photos", ["rex"], 0)
    base = tmp_path / "base"
    shutil.copytree(bundled_diffusion()["glyph-diffusion"], base)
    sets = (f"data.root={tmp_path / 'photos'}", f"base.model={base}")
    command = (CONCEPTS.format("textual_inversion"), *sets, "--out", tmp_path / "run")
    assert dualcl("run", *command) == 0
    file = base / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "_diffusers_version": "0.0"}))  # written anew, it says the same
    assert dualcl("run", *command) == 0
    file.write_text(json.dumps({**settings, "beta_end": settings.get("beta_end", 0.02) / 2}))
    assert dualcl("run", *command) == 2
    assert "another settings (" in dualcl.said


def test_a_run_older_than_hashes_goes_on_with_one_line(
    tmp_path: Path, dualcl: Dualcl, interrupted: Callable[..., None]
) -> None:
    command = (IMAGES, f"data.root={tmp_path / 'images'}", "--out", tmp_path / "run")
    fill(tmp_path / "images", PARTS, 0)
    interrupted(*command)
    edited(tmp_path / "run", lambda record: record.pop("content"))
    for _ in ("resumed", "finished"):
        assert dualcl("run", *command) == 0
        assert dualcl.said.count("could not be checked (it is older than hashes of content)") == 1
    assert "content" not in json.loads((tmp_path / "run" / "record.json").read_text())


def test_a_finished_run_whose_data_are_gone_stands_with_one_line(tmp_path: Path, dualcl: Dualcl) -> None:
    command = (IMAGES, f"data.root={tmp_path / 'images'}", "--out", tmp_path / "run")
    fill(tmp_path / "images", PARTS, 0)
    assert dualcl("run", *command) == 0
    shutil.rmtree(tmp_path / "images")
    assert dualcl("run", *command) == 0
    assert dualcl.said.count("could not be checked (no longer there: data, words)") == 1


# --- the same pictures more than once ---------------------------------------------------------------------------------


def test_pictures_in_train_and_test_are_said_before_training_in_the_record_and_in_the_report(
    tmp_path: Path, dualcl: Dualcl
) -> None:
    fill(tmp_path / "images", [f"train/{label}" for label in "abcd"], 0)
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "val")
    command = (IMAGES, f"data.root={tmp_path / 'images'}", "--out", tmp_path / "run")
    line = "same pictures: the whole test part, which tells nothing of new pictures, is identical to training pictures"
    assert dualcl("run", *command) == 0
    assert line in dualcl.said
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert f"same pictures: {record['network']['repeated_pictures'][0]}".startswith(line)
    assert dualcl("report", str(tmp_path / "run")) == 0
    assert line in " ".join(dualcl.said.split())


# --- the same files elsewhere -----------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_with_moved_images_and_weights(
    tmp_path: Path, dualcl: Dualcl, interrupted: Callable[..., None]
) -> None:
    fill(tmp_path / "here", PARTS, 0)
    weights = bundled_backbones()["glyph-vit"].with_suffix(".safetensors")
    shutil.copy(weights, tmp_path / "vit.safetensors")
    sets = (f"data.root={tmp_path / 'here'}", f"backbone.weights={tmp_path / 'vit.safetensors'}")
    assert dualcl("run", IMAGES, *sets, "--out", tmp_path / "whole") == 0
    interrupted(IMAGES, *sets, "--out", tmp_path / "moved")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "vit.safetensors").rename(tmp_path / "other.safetensors")
    sets = (f"data.root={tmp_path / 'there'}", f"backbone.weights={tmp_path / 'other.safetensors'}")
    text = IMAGES.replace("--quiet ", "")
    assert dualcl("run", text, *sets, "--out", tmp_path / "moved") == 0
    for key in ("data.root", "backbone.weights"):
        assert f"{key} is another place now, with the same content" in dualcl.said
    whole, moved = (json.loads((tmp_path / n / "record.json").read_text()) for n in ("whole", "moved"))
    assert all(whole[key] == moved[key] for key in ("matrix", "tasks", "identity", "config_hash", "content"))
    assert moved["config"]["data"]["root"] == str(tmp_path / "there")
    # and once more, finished and from yet another place
    shutil.copytree(tmp_path / "there", tmp_path / "third")
    assert dualcl("run", text, *sets, f"data.root={tmp_path / 'third'}", "--out", tmp_path / "moved") == 0
    fill(tmp_path / "third", ["train/a"], 5)
    assert dualcl("run", text, *sets, f"data.root={tmp_path / 'third'}", "--out", tmp_path / "moved") == 2
    assert "another data (" in dualcl.said


def test_another_place_for_a_run_without_content_is_another_configuration(tmp_path: Path, dualcl: Dualcl) -> None:
    fill(tmp_path / "here", PARTS, 0)
    assert dualcl("run", IMAGES, f"data.root={tmp_path / 'here'}", "--out", tmp_path / "run") == 0
    edited(tmp_path / "run", lambda record: record.pop("content"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert dualcl("run", IMAGES, f"data.root={tmp_path / 'there'}", "--out", tmp_path / "run") == 2
    assert "another configuration: data.root (there " in dualcl.said


def test_a_relative_base_is_found_from_elsewhere_and_a_moved_one_is_told_by_base(
    tmp_path: Path, dualcl: Dualcl, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "photos", ["rex"], 0)
    shutil.copytree(bundled_diffusion()["glyph-diffusion"], tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    command = (CONCEPTS.format("lora"), "data.root=photos", "base.model=base", "--out", tmp_path / "run")
    assert dualcl("run", *command) == 0
    written = json.loads((tmp_path / "run" / "record.json").read_text())["environment"]["places"]
    assert written == {"data.root": "../photos", "base.model": "../base"}  # no folder of this machine
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert dualcl("run", *command) == 0  # finished, and its files compared
    assert "could not be checked" not in dualcl.said
    draw = ("--prompt <c1> -n 1 --steps 2 --device cpu", "--out", tmp_path / "made")
    assert dualcl("generate", str(tmp_path / "run"), *draw[0].split(), *draw[1:]) == 0
    (tmp_path / "base").rename(tmp_path / "moved")
    asked = (str(tmp_path / "run"), *draw[0].split(), *draw[1:])
    assert dualcl("generate", *asked) == 2
    assert "say where: --base DIR" in dualcl.said
    assert dualcl("generate", *asked, "--base", tmp_path / "moved") == 0
    out = (str(tmp_path / "run"), "--to", "kohya")
    assert dualcl("export", *out, tmp_path / "lora", "--base", tmp_path / "moved") == 0
    vae = tmp_path / "moved" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(vae).items()}, vae)
    for words in (("generate", *asked), ("export", *out, tmp_path / "lora2")):
        assert dualcl(*words, "--base", tmp_path / "moved") == 2
        assert "the pretrained weights are not those of" in dualcl.said
    assert not (tmp_path / "lora2").exists()
