"""The cost model: what it computes from, what it says is missing, and that the committed page is what it makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.errors import UserError
from dualcl.results.cost import GPU_SPEEDUP, IMAGES, folder_sizes, ratios, scale_page, simulated_jobs, study

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The measurements, without those of `scale/`."""
    for name in ("speed", "photos/records", "concepts/records"):
        shutil.copytree(RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("log.jsonl", "config.yaml"))
    return tmp_path


def test_a_run_is_images_times_epochs_times_the_measured_step() -> None:
    steps = json.loads((RESULTS / "speed" / "clora.json").read_text(encoding="utf-8"))
    (per_step,) = [
        row["ours"] / 1e3 for row in steps["rows"] if (row["name"], row["measure"]) == ("clora-bare", "time")
    ]
    by_run = {(cost.preset, cost.method): cost for cost in study(RESULTS)}
    train, _ = IMAGES["imagenet-r"]
    ten, twenty = by_run["imagenet-r-10", "clora"], by_run["imagenet-r-20", "clora"]
    assert ten.train_seconds == pytest.approx(train * 50 * per_step / steps["setup"]["batch"])
    assert ten.train_seconds == twenty.train_seconds
    # every task's images are tested again after each later task
    assert twenty.eval_seconds / ten.eval_seconds == pytest.approx(21 / 11)
    assert by_run["imagenet-r-10", "joint"].eval_seconds == pytest.approx(ten.eval_seconds / 5.5)
    er = by_run["imagenet-r-10", "er"]
    assert er.train_seconds / ten.train_seconds == pytest.approx(ratios(RESULTS / "photos" / "records", "clora")["er"])


def test_jobs_are_the_study_seed_after_seed() -> None:
    jobs, costs = simulated_jobs(RESULTS), study(RESULTS)
    assert len(jobs) == len({job["name"] for job in jobs}) == 1000
    assert jobs[0]["seconds"] == round(costs[0].seconds / GPU_SPEEDUP, 1)
    assert jobs[len(costs)]["name"] == f"{costs[0].preset}/{costs[0].method}-seed1"
    assert all(job["seconds"] > 0 and job["gpus"] == 1 and job["memory_gib"] > 0 for job in jobs)
    assert simulated_jobs(RESULTS, 3, speedup=2 * GPU_SPEEDUP)[0]["seconds"] == pytest.approx(
        jobs[0]["seconds"] / 2, abs=0.1
    )
    assert json.loads((RESULTS / "scale" / "jobs.json").read_text(encoding="utf-8")) == jobs


def test_the_page_says_what_is_not_measured_and_takes_it_when_it_is(folder: Path) -> None:
    page = scale_page(folder)
    for missing in ("## Storage\n\nNot measured yet.", "**The report.** Not measured yet", "Not run yet"):
        assert missing in page
    grid = {"jobs": 1000, "nodes": 3, "speedup": 100, "predicted_seconds": 36_000.0, "scheduled_seconds": 39_600.0}
    grid.update(retried=2, overhead_per_job_seconds=0.25)
    (folder / "scale").mkdir()
    (folder / "scale" / "simulated-grid.json").write_text(json.dumps(grid), encoding="utf-8")
    row = {"streams": 77, "methods": 13, "seeds": 10, "like": "x", "records": 10_010, "seconds": 20.0, "mib": 512.0}
    report = {"rows": [{**row, "written_mib": 12.0}]}
    (folder / "scale" / "report-x.json").write_text(json.dumps(report), encoding="utf-8")
    page = scale_page(folder)
    assert "| scheduled over predicted | 1.100 |" in page
    assert "0.25 s of overhead per job at 1,000 jobs" in page
    assert "10,010 records, 20 s, 512 MiB" in page
    assert "about 20,000 of these" in page
    (folder / "scale" / "simulated-grid.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"simulated-grid\.json cannot be read"):
        scale_page(folder)


def test_what_must_be_measured_is_named(folder: Path) -> None:
    (folder / "speed" / "clora.json").unlink()
    with pytest.raises(UserError, match=r"clora\.json has no time of clora-bare"):
        scale_page(folder)


def test_sizes_of_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(RESULTS / "glyphs" / "records" / "clora-seed0", run)
    (run / "checkpoints" / "task_4").mkdir(parents=True)
    (run / "checkpoints" / "task_4" / "state.safetensors").write_bytes(bytes(1000))
    sizes = folder_sizes(run)
    assert sizes["checkpoints"] == 1000
    assert sizes["record.json"] == (run / "record.json").stat().st_size
    assert sizes["inodes"] == 1 + 3 + 3  # itself, three files; two folders and a file
    assert main(["bench", "scale", "--storage", str(run)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["method"], row["tasks"], row["checkpoints"]) == ("clora", 5, 1000)
    with pytest.raises(UserError, match="no run folder"):
        folder_sizes(tmp_path)


def test_committed_page_is_what_the_measurements_give() -> None:
    assert (RESULTS / "SCALE.md").read_text(encoding="utf-8") == scale_page(RESULTS)
