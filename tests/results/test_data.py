"""Records as data frames and Parquet files: columns, types, what is missing, and the documented schema."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import dualcl.results as results
from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import UserError
from dualcl.results.data import DTYPES, FRAMES, VERSION
from dualcl.results.records import find_records, run_row

WriteRun = Callable[..., Path]
RESULTS = Path(__file__).parents[2] / "results"
LOG = [
    {"task": t, "step": s, "epoch": 0, "loss": 2.0 - s, "penalty": 0.0, "lr_factor": 1.0}
    for t in (0, 1)
    for s in (0, 1)
]


@pytest.fixture
def runs(write_run: WriteRun, write_concept_run: WriteRun, tmp_path: Path) -> Path:
    for seed in range(2):
        write_run(seed=seed, log=LOG)
        write_run([[90], [40, 80], None], label="lora", method="lora", seed=seed, status="running")
    write_run([None, None, [95, 95, 95]], label="joint", method="joint", joint=True)
    write_concept_run(preset="glyph-concepts")
    return tmp_path / "runs"


@pytest.mark.parametrize("what", FRAMES)
def test_every_frame_has_the_documented_columns_and_types(runs: Path, what: str) -> None:
    frame = results.load(runs, what)
    assert len(frame)
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {
        column.name: DTYPES[column.kind] for column in FRAMES[what][0]
    }
    one = results.load([runs / "glyphs-joint-0"], what)
    assert one.dtypes.equals(frame.dtypes)  # whatever is there: joint training has no log here
    assert not frame["path"].isna().any()


def test_runs_hold_metrics_and_where_they_come_from(runs: Path) -> None:
    frame = results.load(runs).set_index(["label", "domain", "seed"])
    assert len(frame) == 6
    clora = frame.loc["clora", "classification", 0]
    assert (clora["F_max"], clora["status"], clora["backbone"]) == (pytest.approx(30), "finished", "vit_tiny")
    assert clora["finished"] == pd.Timestamp("2030-01-01 00:01", tz="UTC")
    assert frame["A_last"].isna().loc["lora"].all()
    assert frame.loc["clora", "customization", 0]["eval_n"] == 8


def test_cells_are_the_matrix_in_long_form(runs: Path) -> None:
    frame = results.load(runs, "cells")
    one = frame[(frame["label"] == "clora") & (frame["domain"] == "classification") & (frame["seed"] == 1)]
    matrix = one.pivot(index="after_task", columns="task", values="value")
    assert matrix.loc[2].tolist() == [60.0, 50.0, 100.0]
    assert matrix.loc[0].isna().tolist() == [False, True, True]
    assert one["mmd"].isna().all()
    assert one["total"].eq(100).all()
    concept = frame[frame["domain"] == "customization"]
    assert (concept["value"] - 1e3 * concept["mmd"]).abs().max() < 1e-9
    assert concept["correct"].isna().all()
    joint = frame[frame["label"] == "joint"]
    assert joint[["after_task", "task"]].to_numpy().tolist() == [[2, 0], [2, 1], [2, 2]]


def test_tasks_and_log(runs: Path) -> None:
    tasks = results.load(runs, "tasks")
    assert tasks["task"].isna().sum() == 1  # joint training has no task of its own
    assert tasks["train_seconds"].eq(1.0).all()
    assert tasks["end_seconds"].isna().all()  # not written by older runs
    log = results.load(runs, "log")
    assert log[log["seed"] == 1]["loss"].tolist() == [2.0, 1.0, 2.0, 1.0]


def test_a_sweep_is_told_apart_as_in_the_tables(write_run: WriteRun, tmp_path: Path) -> None:
    for rank in (4, 8):
        write_run(name=f"rank{rank}", edit=lambda d, rank=rank: d["config"]["method"].update(rank=rank))
    assert sorted(results.load(tmp_path)["label"]) == ["clora (rank=4)", "clora (rank=8)"]


def test_a_damaged_record_stops_or_is_named(runs: Path) -> None:
    broken = next(runs.glob("glyphs-clora-0")) / "record.json"
    broken.write_text(broken.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(UserError, match="glyphs-clora-0"):
        results.load(runs)
    with pytest.warns(UserWarning, match="left out: .*glyphs-clora-0"):
        assert len(results.load(runs, strict=False)) == 5
    with pytest.raises(UserError, match="did you mean 'cells'"):
        results.load(runs / "glyphs-clora-1", "cell")


def test_parquet_reads_back_equal_and_carries_its_schema(runs: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out"
    assert main(["report", str(runs), "--format", "parquet", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["cells.parquet", "runs.parquet"]
    for what in ("runs", "cells"):
        pd.testing.assert_frame_equal(pd.read_parquet(out / f"{what}.parquet"), results.load(runs, what))
        about = json.loads(parquet.read_schema(out / f"{what}.parquet").metadata[b"dualcl"])
        assert (about["frame"], about["version"]) == (what, VERSION)
        assert list(about["columns"]) == parquet.read_schema(out / f"{what}.parquet").names


def test_parquet_without_pyarrow_names_the_extra(runs: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['pyarrow'] = None\nfrom dualcl.benchmark.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = ["report", str(runs), "--format", "parquet", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert 'pip install "dualcl[parquet]"' in done.stderr
    assert not (tmp_path / "out").exists()


def test_committed_records_fill_known_columns_only() -> None:
    known = {column.name for column in FRAMES["runs"][0]}
    for name in ("photos", "portraits", "renditions", "quirks"):
        for record in find_records([RESULTS / "recorded" / name / "records"]):
            assert set(run_row(record)) <= known
