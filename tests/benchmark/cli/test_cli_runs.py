"""`run`, `compare`, `sweep` and `report` on a tiny, real ViT and the bundled glyphs."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dualcl.benchmark.core.compat  # noqa: F401

# isort: split
import timm

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.grids.plan import Planned
from dualcl.benchmark.grids.sweep import parse_axis, plan_sweep

KWARGS = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml: two tasks of two glyphs, a ViT with weights from a file, equal in every run."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **KWARGS)
    save_file(model.state_dict(), folder / "tiny.safetensors")
    (folder / "tiny.yaml").write_text(
        f"""
domain: classification
summary: tiny
compare: [ncm, lora]
data: {{name: glyphs, train_per_class: 5, test_per_class: 3, classes: 4}}
stream: {{tasks: 2}}
backbone:
  name: vit_tiny_patch16_224
  weights: {folder / "tiny.safetensors"}
  kwargs: {json.dumps(KWARGS)}
train: {{epochs: 2, batch_size: 4}}
input: {{preprocess: imagenet}}
methods: {{lora: {{rank: 2}}}}
"""
    )
    return folder


def record(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def test_run_writes_a_record_and_is_done_the_second_time(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert main(["run", "tiny.yaml", "lora", "--seed", "3"]) == 0
    first = capsys.readouterr()
    assert "lora" in first.out
    assert "task 2/2" in first.err
    folder = place / "runs" / "tiny" / "lora-seed3"
    made = record(folder)
    assert (made["status"], made["run"]["seed"]) == ("finished", 3)
    assert made["environment"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert main(["run", "tiny.yaml", "lora", "--seed", "3", "--quiet"]) == 0
    second = capsys.readouterr()
    assert (second.out, second.err) == (first.out, "")
    assert record(folder) == made


def test_compare_runs_what_is_missing_and_ends_with_table_and_report(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, out = str(place / "tiny.yaml"), tmp_path / "out"
    command = ["compare", preset, "--seeds", "0,1", "--out", str(out), "--format", "md,csv"]
    assert main([*command, "--methods", "ncm"]) == 0
    capsys.readouterr()
    before = record(out / "ncm-seed0")
    assert main(command) == 0
    captured = capsys.readouterr()
    runs = {"ncm-seed0", "ncm-seed1", "lora-seed0", "lora-seed1"}
    assert {p.name for p in out.iterdir()} == {*runs, "grid.json", "report"}
    assert record(out / "ncm-seed0") == before
    assert "ncm seed 0: finished already" in captured.err
    assert "4 of 4 runs finished" in captured.err
    assert {"ncm", "lora"} <= {line.split()[0] for line in captured.out.splitlines() if line}
    rows = list(csv.DictReader((out / "report" / "table.csv").open()))
    assert {(r["method"], r["seeds"]) for r in rows} == {("ncm", "2"), ("lora", "2")}
    assert main(["report", str(out), "--format", "csv"]) == 0
    assert {r["method"] for r in csv.DictReader(io.StringIO(capsys.readouterr().out))} == {"ncm", "lora"}
    blocker = "import sys; sys.modules.update(torch=None, matplotlib=None, pandas=None, timm=None);"
    code = f"{blocker} from dualcl.benchmark.cli import main; sys.exit(main(sys.argv[1:]))"
    light = [sys.executable, "-c", code, "report", str(out), "--format", "md"]
    done = subprocess.run(light, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| lora |" in done.stdout
    assert main(["report", str(out), "--format", "md", "--out", str(tmp_path / "r")]) == 0
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["table.md"]
    assert main(["report", str(out / "ncm-seed0"), str(out / "lora-seed0")]) == 2
    assert "--out DIR" in capsys.readouterr().err.splitlines()[-1]


def test_compare_checks_all_inputs_before_it_runs_anything(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, out = str(place / "tiny.yaml"), tmp_path / "out"
    # rank is a key of lora alone
    assert main(["compare", preset, "--methods", "lora,ncm", "--set", "method.rank=1", "--out", str(out)]) == 2
    assert "method.rank" in capsys.readouterr().err
    assert not out.exists()
    assert main(["compare", preset, "--methods", "ncm", "--out", str(out), "--quiet", "--format", "md"]) == 0
    capsys.readouterr()
    assert main(["compare", preset, "--methods", "lora,ncm", "--set", "train.epochs=1", "--out", str(out)]) == 2
    assert "train.epochs (there 2, now 1)" in capsys.readouterr().err
    assert not (out / "lora-seed0").exists()


def test_a_failing_run_does_not_stop_the_others(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compare", str(place / "tiny.yaml"), "--methods", "lora,ncm", "--out", str(out), "--format", "md"]
    # a rank above the layers' width is found when the model is there
    assert main([*command, "--set", "methods.lora.rank=1000"]) == 2
    captured = capsys.readouterr()
    assert record(out / "ncm-seed0")["status"] == "finished"
    assert "1 of 2 runs finished" in captured.err
    assert "failed: lora seed 0: method.rank=1000" in captured.err
    assert "ncm" in captured.out
    assert "Traceback" not in captured.err


def test_compare_side_by_side_gives_the_same_results_and_names_a_failing_child(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", str(place / "tiny.yaml"), "--set", "threads=1", "--format", "csv", "--out"]
    assert main([*command, str(tmp_path / "one"), "--methods", "lora"]) == 0
    capsys.readouterr()
    # dualprompt wants five blocks, this ViT has two
    assert main([*command, str(tmp_path / "two"), "--methods", "lora,dualprompt", "--jobs", "2"]) == 2
    captured = capsys.readouterr()
    assert "lora seed 0  task 2/2" in captured.err
    failed = next(line for line in captured.err.splitlines() if line.startswith("failed: dualprompt seed 0: "))
    assert "blocks" in failed
    assert "lora" in captured.out
    one, two = (record(tmp_path / name / "lora-seed0") for name in ("one", "two"))
    assert one["matrix"] == two["matrix"]
    assert one["tasks"] == two["tasks"]


def test_sweep_uses_validation_images_and_names_the_best(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", str(place / "tiny.yaml"), "lora", "--over", "method.rank=1,2", "--over", "method.lr=1e-3,1e-2"]
    command += ["--seeds", "0,1", "--out", str(tmp_path)]
    assert main(command) == 0
    captured = capsys.readouterr()
    folders = sorted(p.parent.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("record.json"))
    assert len(folders) == 8
    assert folders[0] == "lora/method.rank=1,method.lr=1e-2/seed0"
    assert {record(tmp_path / f)["config"]["data"]["holdout"] for f in folders} == {0.2}
    assert "validation images" in captured.err
    tree = json.loads((tmp_path / "lora" / "sweep.json").read_text())
    means = [p["metrics"]["A_last"]["mean"] for p in tree["points"]]
    assert means == sorted(means, reverse=True)
    assert f"use it with: {tree['best']['use']}" in captured.err
    assert tree["best"]["settings"] == tree["points"][0]["settings"]
    rows = list(csv.DictReader((tmp_path / "lora" / "sweep.csv").open()))
    assert [float(r["A_last_mean"]) for r in rows] == means
    assert [r["A_last_n"] for r in rows] == ["2"] * 4

    times = {f: record(tmp_path / f)["finished"] for f in folders}
    assert main([*command, "--select", "F_max", "--quiet"]) == 0
    assert {f: record(tmp_path / f)["finished"] for f in folders} == times
    points = json.loads((tmp_path / "lora" / "sweep.json").read_text())["points"]
    forgetting = [p["metrics"]["F_max"]["mean"] for p in points]
    assert forgetting == sorted(forgetting)


def test_a_sweep_is_measured_on_held_out_images(place: Path, tmp_path: Path) -> None:
    preset, fixed = str(place / "tiny.yaml"), tmp_path / "fixed.yaml"
    fixed.write_text(f"extends: {preset}\ndata: {{holdout: 0}}\n")
    for name, sets, holdout in (
        (preset, (), 0.2),
        (preset, ("data.holdout=0.4",), 0.4),
        (str(fixed), (), 0.2),
        (str(fixed), ("data.holdout=0.3",), 0.3),
    ):
        sweep = plan_sweep(name, "lora", ["method.rank=1,2"], None, sets, Path("x"))
        assert {run.resolved.flat()["data.holdout"] for run in sweep.plan} == {holdout}
        assert sweep.measured_on == f"validation images (data.holdout={holdout}: that part of the training images)"
    for sets in (("data.holdout=0",), ("data={holdout: 0.0}",)):
        with pytest.raises(UserError, match=r"data\.holdout=0 would choose on the test images"):
            plan_sweep(preset, "lora", ["method.rank=1"], None, sets, Path("x"))


def test_a_sweep_without_over_takes_the_space_of_the_preset(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "space.yaml"
    preset.write_text(
        f"extends: {place / 'tiny.yaml'}\nsearch: {{points: 2, methods: {{lora: {{lr: [1e-3, 1e-2], rank: [1]}}}}}}\n"
    )
    assert main(["sweep", str(preset), "lora", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    captured = capsys.readouterr()
    tree = json.loads((tmp_path / "out" / "lora" / "sweep.json").read_text())
    settings = [{"method.lr": lr, "method.rank": "1"} for lr in ("1e-3", "0.01")]
    assert sorted((p["settings"] for p in tree["points"]), key=str) == sorted(settings, key=str)
    assert tree["space"] == "preset space"
    assert tree["tuning"].startswith("dualcl sweep on space: 2 points, 1 seed, by A_last on validation images")
    assert f"for `tuning:` in a preset: {tree['tuning']}" in captured.err
    other = plan_sweep(str(preset), "lora", ["method.rank=2"], None, (), tmp_path)
    assert (other.space, len(other.points)) == ("--over", 1)


def test_sweep_with_a_failing_point_ranks_it_last(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", str(place / "tiny.yaml"), "lora", "--over", "method.rank=1000,1", "--out", str(tmp_path)]
    assert main([*command, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert "failed: method.rank=1000" in captured.out
    points = json.loads((tmp_path / "lora" / "sweep.json").read_text())["points"]
    assert [p["settings"]["method.rank"] for p in points] == ["1", "1000"]
    assert points[1]["finished"] == 0
    assert "--set method.rank=1" in captured.err


def test_axis_values_keep_commas_inside_brackets_and_quotes() -> None:
    assert parse_axis("method.blocks=[0,1],[0, 1, 2]").values == ("[0,1]", "[0, 1, 2]")
    assert parse_axis("a.b='x,y', z").values == ("'x,y'", "z")
    assert parse_axis("a=1").values == ("1",)
    with pytest.raises(UserError, match="empty value"):
        parse_axis("a=,1")


def test_sweep_folders_stay_apart_and_inside(place: Path) -> None:
    over = ["backbone.weights=../a/b.safetensors,../a_b.safetensors"]
    sweep = plan_sweep(str(place / "tiny.yaml"), "lora", over, None, (), Path("out"))
    folders = [run.out for run in sweep.plan]
    assert len(set(folders)) == 2
    assert all(len(f.parts) == 4 and ".." not in f.parts for f in folders)


def test_unwritable_place_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["run", str(place / "tiny.yaml"), "ncm", "--out", str(tmp_path / "file" / "x")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("dualcl: error: ")
    assert str(tmp_path / "file") in err[-1]


def test_planned_seed_is_the_resolved_one(place: Path) -> None:
    planned = Planned(resolve(str(place / "tiny.yaml"), "ncm", ["seed=7"]), "tiny.yaml", ("seed=7",), Path("x"), "ncm")
    assert planned.seed == 7


def test_sigterm_interrupts_and_the_same_command_resumes(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dualcl.benchmark.cli", "run", str(place / "tiny.yaml"), "lora"]
    command += ["--out", str(tmp_path / "run"), "--set", "train.epochs=20000", "train.checkpoint_seconds=0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for wanted in ("task 1/2", "resuming"):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as child:
            assert child.stderr is not None
            for line in child.stderr:
                if wanted in line:
                    break
            else:
                pytest.fail(f"no line with {wanted!r}")
            if wanted == "task 1/2":
                while not (tmp_path / "run" / "checkpoints" / "partial").exists():
                    assert child.poll() is None
            child.send_signal(signal.SIGTERM)
            rest = child.stderr.read()
        assert child.returncode == 130, rest
        assert rest.splitlines()[-1] == "dualcl: interrupted; the same command resumes"
        assert "Traceback" not in rest
        assert record(tmp_path / "run")["status"] == "interrupted"
