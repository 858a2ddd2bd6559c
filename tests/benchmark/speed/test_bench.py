"""`dualcl bench step` on a tiny, real ViT."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import RunFailed, UserError
from dualcl.benchmark.speed import common as bench

DIM = 32
TINY = ["--backbone", "vit_tiny_patch16_224", "--image-size", "32", "--batch", "4", "--threads", "1", "--device", "cpu"]
TINY += ["--set", "backbone.kwargs.patch_size=8", "--set", "backbone.kwargs.depth=2"]
TINY += ["--set", f"backbone.kwargs.embed_dim={DIM}", "--set", "backbone.kwargs.num_heads=2"]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*TINY, *words])


def grown(method: str, tasks: str, *words: str) -> list[dict[str, Any]]:
    """The points of a growing run, measured in this process."""
    from dualcl.benchmark.speed.step_work import measure_method

    (job,) = bench.plan(arguments("--methods", method, "--grow", tasks, "--repeats", "1", *words))
    points: list[dict[str, Any]] = measure_method(resolve(job.preset, method, job.sets), job)["points"]
    return points


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs are done by the same `main` as in a process of their own, without its start."""
    import torch

    from dualcl.benchmark.speed import step_work as bench_step

    def job_done(module: str, name: str, job: dict[str, Any]) -> dict[str, Any]:
        assert module == bench_step.__name__
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(job)))
        replies = io.StringIO()
        with contextlib.redirect_stdout(replies):
            assert bench_step.main() == 0
        return bench.result_of(name, replies.getvalue())

    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "in_process", job_done)
    yield
    torch.set_num_threads(threads)


def check_row(row: dict[str, str], parts: list[str]) -> None:
    for part in parts:
        least, middle, most = (float(row[f"{part}_time_ratio{end}"]) for end in ("_min", "", "_max"))
        assert 0 < least <= middle <= most
        assert float(row[f"{part}_images_per_s"]) > 0
    assert float(row["peak_process_mib"]) > 10
    assert row["peak_cuda_mib"] == ""
    assert (row["device"], row["threads"], row["precision"], row["batch"]) == ("cpu", "1", "fp32", "4")
    assert row["torch"]


@pytest.mark.usefixtures("in_this_process")
def test_command_measures_every_method_it_can_beside_the_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.csv"
    # coda_prompt wants blocks 0-4, and only the process that builds the model finds out that there are two
    words = ["bench", "step", *TINY, "--methods", "clora,coda_prompt,l2p", "--set", "methods.clora.rank=2"]
    assert main([*words, "--repeats", "2", "--format", "csv", "--out", str(out)]) == 2
    text, errors = capsys.readouterr()
    assert errors.splitlines()[-1].startswith("dualcl: error: coda_prompt: method.blocks")
    assert out.read_text(encoding="utf-8") == text
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(text))}
    assert list(rows) == ["backbone", "clora", "l2p"]
    for row in rows.values():
        check_row(row, ["train", "first", *(["later"] if row["method"] == "l2p" else [])])
    assert float(rows["backbone"]["train_time_ratio"]) == 1
    assert rows["clora"]["later_images_per_s"] == ""


def test_command_measures_in_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", *TINY, "--methods", "coda_prompt", "--repeats", "1", "--format", "csv"]) == 2
    text, errors = capsys.readouterr()
    assert errors.splitlines()[-1].startswith("dualcl: error: coda_prompt: method.blocks")
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["method"] == "backbone"
    check_row(row, ["train", "first"])


@pytest.mark.parametrize("method", ["clora", "lora"])
def test_low_rank_methods_hold_as_much_at_task_50_as_at_task_2(method: str) -> None:
    early, late = grown(method, "2,50", "--set", f"methods.{method}.rank=2")
    assert (early["task"], late["task"]) == (2, 50)
    assert early["tensors"] == late["tensors"] > 0
    assert early["numbers"] == late["numbers"] > 0
    # all that Python holds, the domain's included, grows by the classifier rows of 48 tasks of 2 classes
    rows = 48 * 2 * (DIM + 1) * 4 / 2**20
    assert late["live_mib"] - early["live_mib"] == pytest.approx(rows, abs=2 / 1024)


def test_growth_is_seen_where_there_is_some() -> None:
    early, late = grown("dualprompt", "1,4", "--set", "methods.dualprompt.expert_blocks=[1]")
    assert late["numbers"] > early["numbers"]


def test_step_at_task_2_pays_the_penalty_of_clora() -> None:
    from dualcl.benchmark.core.devices import pick_device
    from dualcl.benchmark.domains.classification import Classification
    from dualcl.benchmark.runs.folder import RunFolder
    from dualcl.benchmark.runs.progress import Reporter
    from dualcl.benchmark.runs.runner import Run
    from dualcl.benchmark.speed.step_work import TaskSteps, noise

    job = bench.plan(arguments("--methods", "clora", "--set", "methods.clora.rank=2"))[1]
    resolved = resolve(job.preset, "clora", job.sets)
    domain = Classification(resolved, pick_device("cpu"), noise(bench.PLANNED_TASKS, 4, 4, 32))
    run = Run(resolved, RunFolder(Path("bench")), Reporter(quiet=True), domain)
    for index in range(job.tasks[-1] - 1):
        task = TaskSteps(run, index)
        assert run.method.penalty() is None
        task.step()
        task.step()
        task.end()
    task = TaskSteps(run, job.tasks[-1] - 1)
    task.step()
    task.step()
    penalty = run.method.penalty()
    assert penalty is not None
    assert penalty.item() > 0


def test_growth_rows_are_relative_to_the_methods_own_first() -> None:
    def point(task: int, seconds: float, numbers: int) -> dict[str, Any]:
        train = {"images": 4, "seconds": [seconds, seconds], "bare_seconds": [0.5, 0.5]}
        peaks = {"process": 100.0, "cuda": None}
        return {
            "task": task, "train": train, "peak_mib": peaks, "live_mib": 8.0, "tensors": 3, "numbers": numbers
        }  # fmt: skip

    results = [("a", {"points": [point(2, 1.0, 10), point(50, 2.0, 10)]}), ("b", {"points": [point(2, 4.0, 5)]})]
    rows = bench.grow_rows(results)
    assert [row["step_time_ratio"] for row in rows] == [2, 4, 8]
    assert [row["step_seconds_to_first"] for row in rows] == [1, 2, 1]
    assert [row["numbers_to_first"] for row in rows] == [1, 1, 1]
    assert rows[0]["peak_cuda_mib_to_first"] is None


def test_tables_have_a_cell_for_every_column() -> None:
    part = {"images": 4, "seconds": [0.5, 1.0, 2.0], "bare_seconds": [1.0, 1.0, 1.0]}
    bare_part = {"images": 4, "seconds": [1.0]}
    setup = {"device": "cpu", "threads": 1, "environment": {"torch": "2", "timm": "1", "dualcl": "0"}, "settings": {}}
    peaks = {"process": 300.0, "cuda": 20.0}
    bare = {"points": [{"task": None, "peak_mib": peaks, "train": bare_part, "first": bare_part}], **setup}
    own = {"points": [{"task": 2, "peak_mib": peaks, "train": part, "first": part}], **setup}
    text = bench.render(arguments("--format", "md"), [("backbone", bare), ("lora", own)])
    table = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert [len(cells) for cells in table] == [9] * 4
    assert [cell.strip() for cell in table[3]][:3] == ["lora", "4.0", "1.00 (0.50-2.00)"]
    assert "device cpu" in text
    value = json.loads(bench.render(arguments("--format", "json"), [("backbone", bare), ("lora", own)]))
    assert value["setup"]["threads"] == 1
    assert value["rows"][1]["first_images_per_s"] == 4


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--methods", "clra"], "clora"),
        (["--methods", "ncm"], "ncm"),
        (["--methods", "joint"], "joint"),
        (["--set", "stream.tasks=3"], "stream.tasks"),
        (["--set", "methods.lora.rnk=3"], "method.rank"),
        (["--out", "no/such/folder/x.csv"], "no/such/folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    words: list[str], culprit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "measure", lambda job: pytest.fail("measured"))
    with pytest.raises(UserError, match=culprit):
        bench.main(arguments("--methods", "lora", *words))


def test_growth_wants_ascending_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--grow", "10,2"]) == 2
    assert "2,10,50" in capsys.readouterr().err


def test_process_that_dies_is_a_failed_run() -> None:
    with pytest.raises(RunFailed, match=r"lora: .* code 2"):
        bench.in_process("dualcl.benchmark.cli", "lora", {})


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from dualcl.benchmark.cli import main; code = main(['bench', 'step', '--help']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--grow" in done.stdout
