"""What `dualcl compare` says before it starts: runs, time, disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.grids import forecast as module
from dualcl.benchmark.grids.forecast import forecast
from dualcl.benchmark.grids.plan import plan_comparison
from dualcl.results.records import load_record


def test_a_dry_run_tells_what_finished_runs_took_and_writes_nothing(
    tiny_preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, compare = tmp_path / "runs", ["compare", tiny_preset, "--out", str(tmp_path / "runs")]

    def said(*arguments: str) -> list[str]:
        capsys.readouterr()
        assert main([*compare, *arguments, "--dry-run"]) == 0
        return capsys.readouterr().out.splitlines()

    assert said("--methods", "ncm") == [
        "1 run, 0 finished already; how long ncm will take is not known: no finished run with such settings",
        "disk: not known of ncm",
    ]
    assert not out.exists()
    assert main([*compare, "--methods", "ncm", "--dry-run", "--print-slurm"]) == 2
    assert "--print-slurm runs nothing either" in capsys.readouterr().err
    assert main([*compare, "--methods", "ncm", "--seeds", "0", "--format", "md"]) == 0
    assert "1 run, 0 finished already; how long" in capsys.readouterr().err
    before = sorted(out.rglob("*"))
    runs, disk = said("--methods", "ncm", "--seeds", "0,1")
    assert runs.startswith("2 runs, 1 finished already; about ")
    assert runs.endswith("s, as finished runs with such settings took")
    size = sum(f.stat().st_size for f in (out / "ncm-seed0" / "checkpoints").rglob("*") if f.is_file())
    assert disk == f"disk: about {size / 2**20:.1f} MiB of checkpoints"
    assert said("--methods", "ncm", "--seeds", "0") == ["1 run, 1 finished already"]
    assert sorted(out.rglob("*")) == before
    # rates make no more work; epochs do
    assert "about " in said("--methods", "ncm", "--seeds", "1", "--set", "method.lr=0.5")[0]
    assert "not known" in said("--methods", "ncm", "--seeds", "1", "--set", "train.epochs=2")[0]
    runs, disk = said("--methods", "ncm,ranpac,slca", "--seeds", "1,2", "--set", "stream.order_seed=4")
    assert runs.startswith("6 runs, 0 finished already; about ")
    assert " for 2 of the others, one after another, as finished " in runs
    assert runs.endswith("; how long ranpac, slca will take is not known: no finished run with such settings")
    gram = 2 * 4 * 100 * 101 / 2 / 2**20  # of two seeds, packed
    assert disk.endswith(f", at least {gram:.1f} MiB of ranpac, not known of slca")


def test_time_is_shared_out_and_what_is_stored_stands_for_a_checkpoint(
    tiny_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_comparison(tiny_preset, ["ncm", "lora"], [0, 1], [], tmp_path)
    times = {"ncm": (100.0, 2.0**20), "lora": (300.0, 2.0**31)}
    monkeypatch.setattr(module, "_taken", lambda planned: times[planned.resolved.method])
    assert forecast(plan, plan, 2) == [
        "4 runs, 0 finished already; about 6m40s, 2 at once, as finished runs with such settings took",
        "disk: about 4.0 GiB of checkpoints",
    ]
    assert "about 5m00s, 3 at once" in forecast(plan, plan[1:], 8)[0]  # no shorter than the longest
    record = load_record(next(module.RECORDED.glob("renditions/records/ranpac-*")) / "record.json")
    wanted = record.data["measured"]["wall_seconds"], 4 * record.data["tasks"][-1]["parameters_stored"]
    assert module._of(record) == wanted
    assert min(wanted) > 0
