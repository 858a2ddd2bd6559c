"""Reports on many records: records made for it, what is left out and said."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import UserError
from dualcl.results import records, report, samples
from dualcl.results.metrics import KINDS
from dualcl.results.plots import MAX_METHODS, MAX_STREAMS, loss_curves, overview
from dualcl.results.records import find_records, load_record, scan_records
from dualcl.results.report import build_report
from dualcl.results.tables import summarise

_SPEC = importlib.util.spec_from_file_location("likeness", Path(__file__).with_name("likeness.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
likeness = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(likeness)
Grid, parse_grids = likeness.Grid, likeness.parse_grids
read_patterns, write_grid = likeness.read_patterns, likeness.write_grid

RESULTS = Path(__file__).parents[2] / "results"
PATTERNS = {
    "accuracy": Path(__file__).parent / "stored" / "glyphs",
    "mmd": Path(__file__).parent / "stored" / "concepts",
}


def grid(folder: Path, text: str, kind: str = "accuracy") -> Path:
    write_grid(read_patterns([PATTERNS[kind]]), parse_grids(text)[0], folder)
    return folder


@pytest.mark.parametrize("kind", PATTERNS)
def test_made_records_are_sound_and_make_a_table_per_stream(tmp_path: Path, kind: str) -> None:
    runs = grid(tmp_path / "runs", "2x16x2", kind)
    found = find_records([runs])
    assert len(found) == len({(r.preset, r.label, r.seed) for r in found}) == 64
    summary = summarise([runs])
    assert [len(table.rows) for table in summary.tables] == [16, 16]
    assert not summary.problems
    again = grid(tmp_path / "again", "2x16x2", kind)
    files = sorted(p.relative_to(runs) for p in runs.rglob("*") if p.is_file())
    assert all((runs / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert len({json.dumps(r.data["matrix"]) for r in found if r.label == found[0].label}) == 4


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """More runs than LARGE on more streams than FEW_STREAMS."""
    monkeypatch.setattr(report, "LARGE", 7)
    monkeypatch.setattr(report, "FEW_STREAMS", 1)
    return grid(tmp_path / "runs", "2x2x2")


def test_a_large_report_has_an_overview_and_says_what_it_leaves_out(large: Path, tmp_path: Path) -> None:
    files = build_report([large], tmp_path / "out")
    names = {p.name for p in files.plots}
    assert names >= {"overview-classification.png", "overview-classification.svg"}
    assert not [name for name in names if name.startswith("stream-")]
    assert files.html is not None
    text = files.html.read_text(encoding="utf-8")
    assert "Map of streams" in text
    for note in files.notes:
        assert note in text
    assert "--all-plots" in files.notes[0]
    assert "of 8 runs, the first of every method is shown" in files.notes[1]
    assert len(re.findall("<details><summary>[^<]*, seed 0", text)) == 2 * 2
    assert not re.findall("<details><summary>[^<]*, seed 1", text)
    assert files.runs is not None
    assert len(files.runs.read_text(encoding="utf-8").splitlines()) == 9


def test_all_plots_draws_them_anyway(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["report", str(large), "--format", "html", "--out", str(out), "--all-plots"]) == 0
    assert "note: of 8 runs" in capsys.readouterr().err
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("After every task") == 2
    assert "Map of streams" not in text


def test_few_streams_keep_their_plots_however_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LARGE", 3)
    files = build_report([grid(tmp_path / "runs", "1x2x2")], tmp_path / "out", ["html"])
    assert files.html is not None
    assert "After every task" in files.html.read_text(encoding="utf-8")
    assert len(files.notes) == 1


def test_an_overview_has_limits_and_says_so() -> None:
    kind = KINDS["accuracy"]
    means = {f"s{i}": {f"m{j}": float(i + j) for j in range(MAX_METHODS + 1) if i != j} for i in range(MAX_STREAMS + 1)}
    figure = overview(means, kind, "Classification")
    expected = f"{MAX_STREAMS} of {MAX_STREAMS + 1} streams, {MAX_METHODS} of {MAX_METHODS + 1} methods"
    assert expected in figure.axes[0].get_title(loc="left")
    (mesh,) = figure.axes[0].collections
    assert mesh.get_array().shape == (MAX_STREAMS, MAX_METHODS)
    small = overview({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}}, kind, "Classification", {"x": "x (mine)"})
    assert small.axes[0].get_title(loc="left") == "Classification"
    assert [t.get_text() for t in small.axes[0].get_xticklabels()] == ["x (mine)", "y"]


def test_a_long_log_is_drawn_thinned(tmp_path: Path) -> None:
    run = next(grid(tmp_path / "runs", "1x1x1").rglob("record.json")).parent
    lines = [{"task": t, "step": s, "loss": 1.0 + s, "penalty": 0.0} for t in range(5) for s in range(1000)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    record = load_record(run)
    assert len(record.log()) == 5000
    assert [line["step"] for line in record.log(2000)][:3] == [0, 3, 6]
    assert len(record.log(2000)) == 1667
    assert record.log(5000) == record.log()
    figure = loss_curves([record])
    assert figure is not None
    assert len(figure.axes[0].lines) == 1 + 4  # a curve, and where the next tasks begin


def test_contact_sheets_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid(tmp_path / "runs", "1x3x2", "mmd")
    for record in find_records([runs]):
        (record.directory / "samples").mkdir()
    monkeypatch.setattr(samples, "MAX_SHEETS", 3)
    _, notes = samples.draw_samples(find_records([runs]), "x")
    assert notes[0] == "contact sheets of 3 of 6 runs, the first seeds"


def test_grids_are_checked() -> None:
    assert parse_grids("1x20x500, 77x13x10") == [Grid(1, 20, 500), Grid(77, 13, 10)]
    assert parse_grids("77x13x10")[0].records == 10_010
    with pytest.raises(UserError, match="no finished run"):
        read_patterns([RESULTS / "recorded" / "speed"])


def test_records_read_by_several_processes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid(tmp_path / "runs", "2x3x4")
    (runs / "broken").mkdir()
    (runs / "broken" / "record.json").write_text("{", encoding="utf-8")
    alone = scan_records([runs])
    monkeypatch.setattr(records, "_PART", 5)
    monkeypatch.setattr(records, "usable_cpus", lambda: 2)
    assert scan_records([runs]) == alone
    assert (len(alone[0]), len(alone[1])) == (24, 1)
