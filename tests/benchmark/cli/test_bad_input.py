"""Wrong input: exit code 2, one line on stderr that names the culprit, and an earlier record untouched."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import dualcl.benchmark.core.compat  # noqa: F401

# isort: split
import timm

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs.content import check_apart
from dualcl.results.records import comparable

KWARGS: dict[str, Any] = {"img_size": 32, "patch_size": 16, "depth": 2, "embed_dim": 32, "num_heads": 2}
CLASSES = ("ant", "bee", "cat", "dog")


def make_images(root: Path) -> Path:
    """train/ (3 per class) and val/ (2 per class) of four classes, small PNGs."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


class Place:
    """A folder with images, weights, a preset and a finished run of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = make_images(root / "images")
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **KWARGS)
        self.weights = root / "good.safetensors"
        save_file(model.state_dict(), self.weights)
        self.preset = root / "tiny.yaml"
        self.preset.write_text(f"""
domain: classification
data: {{name: image-folder, root: "{self.images}"}}
stream: {{tasks: 2}}
backbone:
  name: vit_tiny_patch16_224
  weights: "{self.weights}"
  kwargs: {json.dumps(KWARGS)}
train: {{epochs: 2, batch_size: 3, checkpoint_seconds: 0}}
input: {{workers: 0, preprocess: imagenet}}
threads: 1
methods: {{clora: {{rank: 2}}}}
""")
        self.done = root / "runs" / "done"
        assert main(self.run(out=self.done)) == 0

    def run(self, *sets: str, method: str = "clora", preset: str | Path | None = None, out: str | Path) -> list[str]:
        """The arguments of `dualcl run`."""
        return ["run", str(preset or self.preset), method, "--out", str(out), "--quiet", *["--set"][: len(sets)], *sets]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def fails(place: Place, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """fails(argv, *words) -> the one line on stderr, which has all the words; the finished run is as it was."""

    def check(argv: list[str], *words: str) -> str:
        before = {p: p.read_bytes() for p in sorted(place.done.rglob("*")) if p.is_file()}
        capsys.readouterr()
        assert main(argv) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == ""
        assert len(lines) == 1, captured.err
        assert lines[-1].startswith("dualcl: error: "), captured.err
        for word in words:
            assert word in lines[-1]
        assert {p: p.read_bytes() for p in sorted(place.done.rglob("*")) if p.is_file()} == before
        return lines[-1]

    return check


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["train.epoch=3"], ["train.epoch", "train.epochs"]),
        (["trian.epochs=3"], ["trian.epochs", "train.epochs"]),
        (["method.rnak=3"], ["method.rnak", "method.rank"]),
        (["methods.clara.rank=3"], ["clara", "clora"]),
        (["train.epochs=many"], ["train.epochs", "an integer", "many"]),
        (["train.epochs=1.5"], ["train.epochs", "1.5"]),
        (["train.drop_last=2"], ["train.drop_last", "true or false"]),
        (["train.epochs.x=2"], ["train.epochs.x"]),
        (["train.epochs=0"], ["train.epochs", "at least 1"]),
        (["train.batch_size=-1"], ["train.batch_size", "-1"]),
        (["train.grad_clip=0"], ["train.grad_clip", "positive"]),
        (["data.name=image-floder"], ["image-floder", "image-folder"]),
        (["backbone.name=vit_tiny_patch16_225"], ["vit_tiny_patch16_225", "vit_tiny_patch16_224"]),
        (["stream.tasks=5"], ["stream.tasks", "5", "4 classes"]),
        (["stream.tasks=0"], ["stream.tasks", "at least 1"]),
        (["stream.class_order=[0,1,1,3]"], ["stream.class_order", "1 twice"]),
        (["stream.class_order=[0,1,2]"], ["stream.class_order", "[3]"]),
        (["stream.class_order=[0,1,2,7]"], ["stream.class_order", "7"]),
        (["stream.class_order=sorted"], ["stream.class_order", "sorted"]),
        (["method.rank=0"], ["method.rank", "at least 1"]),
        (["method.rank=33"], ["method.rank=33", "32"]),
        (["method.lambda_=-1"], ["method.lambda_", "-1"]),
        (["method.lr=-1e-3"], ["method.lr", "-0.001"]),
        (["method.lr=.nan"], ["method.lr", "nan"]),
        (["precision=fp17"], ["precision", "fp32", "fp17"]),
        (["device=cuda:9"], ["cuda:9", "cpu"]),
        (["device=gpu"], ["gpu", "cpu"]),
        (["seed=-1"], ["seed", "-1"]),
        (["threads=0"], ["threads", "0"]),
        (["backbone.kwargs.num_classes=3"], ["backbone.kwargs.num_classes"]),
        (["backbone.kwargs.wings=2"], ["backbone.kwargs", "wings"]),
        (["input.augment=rotate"], ["input.augment", "crop_flip", "rotate"]),
        (["train.drop_last=true", "train.batch_size=64"], ["train.batch_size=64", "drop_last"]),
        (["train.epoch=3", "method.rnak=1", "seed=-1"], ["train.epoch", "method.rnak", "seed"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_values(
    place: Place, tmp_path: Path, fails: Callable[..., str], sets: list[str], words: list[str]
) -> None:
    fails(place.run(*sets, out=tmp_path / "run"), *words)
    assert not (tmp_path / "run" / "record.json").exists()
    if not sets[0].startswith("device"):  # which is not looked at when nothing is left to do
        fails(place.run(*sets, out=place.done))


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "run": (["run"], ["clora"]),
    "compare": (["compare"], ["--methods", "clora,ncm"]),
    "dry": (["compare"], ["--methods", "ncm", "--dry-run"]),
    "slurm": (["compare"], ["--methods", "ncm", "--print-slurm"]),
    "sweep": (["sweep"], ["clora", "--over", "method.rank=1,2"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_out_among_the_user_s_images_is_refused_and_nothing_written(
    command: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    images = make_images(tmp_path / "my images")
    elsewhere = tmp_path / "elsewhere"
    (images / "train" / "cat").rename(elsewhere)
    (images / "train" / "cat").symlink_to(elsewhere)  # a class that lies elsewhere
    (tmp_path / "link").symlink_to(images)
    (word,), more = COMMANDS[command]
    argv = [word, str(place.preset), *more, "--set", f"data.root={images}"]
    before = sorted(tmp_path.rglob("*"))
    for out in (images, images / "train" / "ant", images / "train" / "cat" / "new", tmp_path / "link" / "new"):
        fails([*argv, "--out", str(out)], f"data.root={images}", str(out), "choose an --out outside of it")
    monkeypatch.chdir(images)
    fails([*argv[:-1], "data.root=."], "runs/", "lies in data.root=.", "choose an --out outside of it")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_out_around_or_beside_the_user_s_images_will_do(place: Place) -> None:
    for out in (place.root, place.root / "images-too", place.images / ".." / "out"):
        check_apart(resolve(str(place.preset), "ncm"), out)
    check_apart(resolve("glyphs", "ncm"), place.root)  # drawn: no folder
    # of a prepared set, whose lists name what is read
    check_apart(resolve("cifar100-10", "ncm", ["data.root=."]), Path("runs"))


def test_unknown_names_and_wrong_usage(place: Place, tmp_path: Path, fails: Callable[..., str]) -> None:
    fails(place.run(method="cloar", out=tmp_path), "cloar", "'clora'")
    fails(place.run(preset="glyhps", out=tmp_path), "glyhps", "'glyphs'")
    fails(place.run(preset=tmp_path / "no.yaml", out=tmp_path), "no.yaml", "does not exist")
    fails(
        ["compare", str(place.preset), "--methods", "clora", "--seeds", "0,x", "--out", str(tmp_path)], "--seeds", "'x'"
    )
    fails(["compare", str(place.preset), "--methods", "clora", "--seeds", "1,1", "--out", str(tmp_path)], "'1' twice")
    fails(["run", str(place.preset), "clora", "--seed", "one"], "--seed", "'one'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("domain: [classification", ["not valid YAML", "line 1"]),
        ("- domain\n- data\n", ["mapping"]),
        ("domain: classification\ntrain:\n  epochs: 1\n  epochs: 2\n", ["epochs", "twice", "line 3"]),
        ("extends: bad.yaml\n", ["bad", "extends itself"]),
        ("extends: glyps\n", ["glyps", "'glyphs'"]),
        ("summary: none\n", ["domain"]),
        ("domain: clasification\ndata: {name: glyphs}\n", ["clasification", "classification"]),
        ("domain: classification\n", ["data.name"]),
        ("extends: glyphs\ntrain: 3\n", ["train"]),
        ("extends: glyphs\nmethods: {cloar: {rank: 2}}\n", ["cloar", "'clora'"]),
        ("extends: glyphs\nmethods: {clora: {rnk: 2}}\n", ["rnk", "method.rank"]),
        ("extends: glyphs\ncompare: clora\n", ["compare", "list"]),
        ("a: !!python/object/apply:os.system [true]\n", ["not valid YAML"]),
        ("a: b\x00c\n", ["not valid YAML"]),
        ("", ["mapping"]),
    ],
)
def test_wrong_presets(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
    text: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    fails(place.run(preset="bad.yaml", out=tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_preset_that_is_no_text(place: Place, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00d")
    fails(place.run(preset=tmp_path / "bad.yaml", out=tmp_path / "run"), "bad.yaml")


def test_method_that_the_domain_cannot_serve(place: Place, tmp_path: Path, fails: Callable[..., str]) -> None:
    from dualcl.methods import method_info

    with pytest.raises(
        UserError, match=r"'l2p' does not work in the domain 'customization'; it serves: classification"
    ):
        method_info("l2p", "customization")
    # a backbone without attention blocks offers no prefixes
    fails(
        place.run("backbone.name=resnet10t", "backbone.weights=null", "backbone.pretrained=false", out=tmp_path),
        "resnet10t",
    )


# --- data -------------------------------------------------------------------------------------------------------------


def _no_data(root: Path) -> list[str]:
    root.rename(root.with_name("elsewhere"))
    return [str(root), "does not exist"]


def _root_is_a_file(root: Path) -> list[str]:
    root.rename(root.with_name("elsewhere"))
    root.write_text("")
    return [str(root), "is a file"]


def _empty_class(root: Path) -> list[str]:
    for file in (root / "train" / "bee").iterdir():
        file.unlink()
    return [str(root / "train" / "bee"), "no images"]


def _only_in_val(root: Path) -> list[str]:
    (root / "val" / "emu").mkdir()
    return [str(root / "val" / "emu"), str(root / "train" / "emu")]


def _only_in_train(root: Path) -> list[str]:
    (root / "val" / "cat").rename(root / "cat")
    return [str(root / "train" / "cat"), str(root / "val" / "cat")]


def _truncated(root: Path) -> list[str]:
    file = root / "train" / "ant" / "9.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return [str(file), "data.on_bad_image=skip"]


def _text_as_image(root: Path) -> list[str]:
    (root / "val" / "ant" / "9.jpg").write_text("no image at all")
    return [str(root / "val" / "ant" / "9.jpg"), "data.on_bad_image=skip"]


def _empty_file(root: Path) -> list[str]:
    (root / "val" / "ant" / "9.png").write_text("")
    return [str(root / "val" / "ant" / "9.png"), "empty file"]


@pytest.mark.parametrize(
    "damage",
    [
        _no_data,
        _root_is_a_file,
        _empty_class,
        _only_in_val,
        _only_in_train,
        _truncated,
        _text_as_image,
        _empty_file,
    ],
)
def test_wrong_data(
    place: Place, tmp_path: Path, fails: Callable[..., str], damage: Callable[[Path], list[str]]
) -> None:
    root = make_images(tmp_path / "images")
    fails(place.run(f'data.root="{root}"', out=tmp_path / "run"), *damage(root))


def test_a_bad_image_can_be_skipped_and_the_record_says_so(place: Place, tmp_path: Path) -> None:
    root = make_images(tmp_path / "images")
    _truncated(root)
    sets = [f'data.root="{root}"', "data.on_bad_image=skip", "train.epochs=1"]
    assert main(place.run(*sets, out=tmp_path / "run")) == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["network"]["skipped_images"] == [
        "train/ant/9.jpg"
    ]


# --- weights ----------------------------------------------------------------------------------------------------------


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("case", ["missing", "truncated", "pickle", "pickle renamed", "shape", "lacks", "extra"])
def test_wrong_weights(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str], case: str
) -> None:
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    file, words, sets = tmp_path / "weights.safetensors", ["weights.safetensors"], []
    state = load_file(place.weights)
    if case == "missing":
        words.append("does not exist")
    elif case == "truncated":
        file.write_bytes(place.weights.read_bytes()[:-100])
        words.append("truncated")
    elif case.startswith("pickle"):
        file = tmp_path / ("weights.pth" if case == "pickle" else "weights.safetensors")
        file.write_bytes(pickle.dumps(_Trap()))
        words = [file.name]
    elif case == "shape":
        file.write_bytes(place.weights.read_bytes())
        # another number of positions would be resampled
        sets, words = ["backbone.kwargs.embed_dim=64"], [*words, "cls_token of shape (1, 1, 32)", "img_size"]
    elif case == "lacks":
        del state["blocks.1.attn.qkv.weight"]
        save_file(state, file)
        words.append("lacks blocks.1.attn.qkv.weight")
    else:
        save_file({**state, "blocks.2.attn.qkv.weight": torch.zeros(1)}, file)
        words.append("blocks.2.attn.qkv.weight")
    fails(place.run(f'backbone.weights="{file}"', *sets, out=tmp_path / "run"), "backbone.weights", *words)
    assert not (tmp_path / "unpickled").exists()


# --- the run folder ---------------------------------------------------------------------------------------------------


def test_out_that_cannot_be_a_folder(place: Place, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("mine")
    fails(place.run(out=tmp_path / "file"), str(tmp_path / "file"), "is a file")
    fails(place.run(out=tmp_path / "file" / "below"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_out_on_a_read_only_place(place: Place, fails: Callable[..., str]) -> None:
    fails(place.run(out="/proc/dualcl"), "/proc/dualcl", "choose another --out")


def test_out_in_a_folder_without_permission(place: Place, tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("permissions do not stop this user")
    fails(place.run(out=tmp_path / "closed" / "run"), "closed", "choose another --out")


def test_run_folder_of_another_configuration(place: Place, fails: Callable[..., str]) -> None:
    line = fails(place.run("method.rank=3", "train.epochs=1", out=place.done), "choose another --out")
    assert "method.rank (there 2, now 3)" in line
    assert "train.epochs (there 2, now 1)" in line
    assert "batch_size" not in line
    fails(place.run(method="lora", out=place.done), "method_name (there 'clora', now 'lora')")


def test_what_cannot_change_a_result_may_differ(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place.done / "record.json").read_bytes()
    assert main(place.run("train.checkpoint_seconds=5", "input.cache_mib=1", "device=cpu", out=place.done)) == 0
    assert (place.done / "record.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], ["half-written"]),
        (lambda text: "", ["half-written"]),
        (lambda text: json.dumps({**json.loads(text), "version": 999}), ["version 999", "newer"]),
        (lambda text: json.dumps({**json.loads(text), "format": "other"}), ["format"]),
        (lambda text: json.dumps({**json.loads(text), "status": "odd"}), ["odd"]),
        (lambda text: "[]", ["format"]),
    ],
)
def test_damaged_records(
    place: Place, tmp_path: Path, fails: Callable[..., str], change: Callable[[str], str], words: list[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "record.json").write_text(change((place.done / "record.json").read_text()))
    before = (out / "record.json").read_bytes()
    fails(place.run(out=out), str(out / "record.json"), *words)
    assert (out / "record.json").read_bytes() == before


@pytest.fixture
def stopped(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was interrupted in its second task, after a checkpoint."""
    from dualcl.benchmark.runs.folder import RunFolder

    out, real = tmp_path / "stopped", RunFolder.log

    def log(self: RunFolder, **entry: float) -> None:
        if (entry["task"], entry["step"]) == (1, 3):
            raise KeyboardInterrupt
        real(self, **entry)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        assert main(place.run("train.log_every=1", out=out)) == 130
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"task_0", "partial"}
    return out


@pytest.fixture(scope="module")
def whole(place: Place) -> dict:
    out = place.root / "whole"
    assert main(place.run("train.log_every=1", out=out)) == 0
    return comparable(json.loads((out / "record.json").read_text()))


@pytest.mark.parametrize("name", ["task_0", "partial"])
@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_damaged_checkpoint_names_itself_and_is_done_without_or_the_mend_works(
    place: Place, whole: dict, stopped: Path, capsys: pytest.CaptureFixture[str], name: str, file: str
) -> None:
    import shutil

    damaged = stopped / "checkpoints" / name / file
    content = bytearray(damaged.read_bytes())
    # in the JSON: a digit of a number, which leaves it valid
    at = len(content) // 2 if file.endswith("safetensors") else content.index(b'": ') + 3
    while file == "state.json" and not chr(content[at]).isdigit():
        at += 1
    content[at] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    code = main(place.run("train.log_every=1", out=stopped))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(damaged.parent) in lines[0]
    if name == "partial":  # its steps are taken again, the same
        assert code == 0
        assert "going on from the start of its task" in lines[0]
    else:
        assert code == 2
        assert "delete" in lines[0]
        shutil.rmtree(damaged.parent)
        assert main(place.run("train.log_every=1", out=stopped)) == 0
    assert comparable(json.loads((stopped / "record.json").read_text())) == whole


def test_weights_changed_behind_the_same_configuration(
    place: Place, tmp_path: Path, stopped: Path, fails: Callable[..., str]
) -> None:
    good = place.weights.read_bytes()
    changed = bytearray(good)
    changed[-2] ^= 1
    record = (stopped / "record.json").read_bytes()
    try:
        place.weights.write_bytes(changed)
        fails(place.run("train.log_every=1", out=stopped), "weights_sha256", "choose another --out")
    finally:
        place.weights.write_bytes(good)
    assert (stopped / "record.json").read_bytes() == record


def test_images_added_behind_the_same_configuration(
    place: Place, stopped: Path, fails: Callable[..., str], whole: dict
) -> None:
    new = place.images / "train" / "ant" / "new.png"
    new.write_bytes((place.images / "train" / "ant" / "0.png").read_bytes())
    try:
        fails(place.run("train.log_every=1", out=stopped), "split_hash", "choose another --out")
    finally:
        new.unlink()
    assert main(place.run("train.log_every=1", out=stopped)) == 0
    assert comparable(json.loads((stopped / "record.json").read_text())) == whole


# --- runs that cannot go on -------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_keeps_what_was_learnt(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    # the penalty overflows as soon as there is an earlier update to protect: in the second task
    assert main(place.run("method.lambda_=1e300", "method.lr=0.1", out=out)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "the loss is inf at task 2, step " in lines[0] or "the loss is nan at task 2, step " in lines[0]
    record = json.loads((out / "record.json").read_text())
    assert record["status"] == "failed"
    assert record["error"] in lines[0]
    assert [row["after_task"] for row in record["matrix"]["rows"]] == [0]
    assert main(place.run("method.lambda_=1", "method.lr=0.1", out=out)) == 2
    assert "method.lambda_" in capsys.readouterr().err
    assert json.loads((out / "record.json").read_text()) == record
    assert main(place.run("method.lambda_=1", "method.lr=0.1", out=tmp_path / "other")) == 0


@pytest.mark.parametrize(
    ("method", "sets"),
    [
        ("clora", ["method.lr=1e30"]),
        # the last step: its loss is fine, what it leaves is not
        ("finetune", ["method.head_lr=1e39", "train.epochs=1", "train.batch_size=100"]),
        ("lora", ["method.lr=1e30", "train.epochs=1"]),
    ],
)
def test_a_learning_rate_that_explodes(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, sets: list[str]
) -> None:
    assert main(place.run(*sets, method=method, out=tmp_path / "run")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "task 1" in lines[0]
    assert "method.lr" in lines[0]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["status"], record["matrix"]["rows"]) == ("failed", [])


# --- the real command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["run", "glyphs", "cloar"], "'clora'"),
        (["run", "glyphs", "clora", "--set", "train.epochs=x"], "train.epochs"),
    ],
)
def test_the_installed_command(tmp_path: Path, args: list[str], word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dualcl.benchmark.cli", *args], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert word in done.stderr
    assert list(tmp_path.iterdir()) == []
