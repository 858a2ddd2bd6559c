from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.results import records
from dualcl.results.data import frame
from dualcl.results.records import comparable, find_records, load_record, scan_records

WriteRun = Callable[..., Path]


def change(path: Path, **parts: Any) -> None:
    data = json.loads((path / "record.json").read_text())
    data.update(parts)
    (path / "record.json").write_text(json.dumps(data))


def test_a_record_loads_from_its_directory_and_from_its_file(write_run: WriteRun) -> None:
    run = write_run(seed=4)
    record = load_record(run)
    assert record == load_record(run / "record.json")
    assert (record.preset, record.label, record.seed, record.finished) == ("glyphs", "clora", 4, True)
    assert record.cells() == [[90], [70, 80], [60, 50, 100]]
    assert record.metrics["A_last"] == pytest.approx(70)


def test_trees_are_searched_once_and_not_below_a_run(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run()
    write_run(seed=1)
    inner = run / "checkpoints" / "old"
    inner.mkdir(parents=True)
    (inner / "record.json").write_text((run / "record.json").read_text())
    found = find_records([tmp_path, run, tmp_path / "runs" / ".." / "runs", run / "record.json"])
    assert [r.seed for r in found] == [0, 1]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"format": "dualcl-rec', "half-written"),
        ("[]", "format"),
        ('{"format": "dualcl-record", "version": "x"}', "version"),
        ('{"format": "dualcl-record", "version": 0}', "never released"),
        ('{"format": "dualcl-record", "version": 99}', "newer dualcl"),
        ('{"format": "dualcl-record", "version": 1, "status": "done"}', "status"),
        ('{"format": "dualcl-record", "version": 1, "status": "finished"}', "run"),
    ],
)
def test_unusable_files_are_named_in_one_line(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(UserError, match=word) as caught:
        load_record(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["run"].update(n_tasks=2),
        lambda d: d["run"].pop("n_tasks"),
        lambda d: d["matrix"].update(kind="colour"),
        lambda d: d["matrix"]["rows"].append(d["matrix"]["rows"][0]),
        lambda d: d["matrix"]["rows"][1].pop("total"),
        lambda d: d["matrix"]["rows"][1]["correct"].append(3),
        lambda d: d["matrix"]["rows"][1]["correct"].__setitem__(0, "3"),
        lambda d: d["matrix"]["rows"][1]["correct"].__setitem__(0, None),
        lambda d: d.update(tasks=None),
    ],
)
def test_inconsistent_records_are_refused(write_run: WriteRun, edit: Callable[[dict[str, Any]], object]) -> None:
    run = write_run(edit=edit)
    with pytest.raises(UserError, match="not a usable record"):
        load_record(run)


#: every=0: all concepts are evaluated after the last one only
SPARSE = ([[0.02], [None, 0.03], [0.09, 0.04, 0.02]], [[0.0], [None, 0.0], [0.08, 0.01, 0.0]])


def test_concepts_that_were_passed_over_are_null(write_concept_run: WriteRun) -> None:
    record = load_record(write_concept_run(*SPARSE))
    assert record.cells() == [[20], [None, 30], [90, 40, 20]]
    assert record.metrics["F_mmd"] == pytest.approx(45)
    joint = load_record(write_concept_run([None, None, SPARSE[0][2]], None, label="joint", joint=True))
    assert joint.metrics["A_mmd"] == pytest.approx(50)
    assert joint.metrics["F_mmd"] is None
    load_record(write_concept_run(text_similarity=False, label="wordless"))


@pytest.mark.parametrize(
    ("row", "field", "values"),
    [
        (2, "mmd", [None, 0.04, 0.02]),  # the others are there
        (2, "generated", [8, 8, None]),
        (2, "nearest_correct", [8, 9, 8]),  # of 8
        (1, "text_similarity", [0.2, 0.3]),  # of a concept that was passed over
        (1, "drift", [0.1, 0.0]),
        (2, "drift", [0.1, 0.0]),
        (2, "mmd", [0.09, float("nan"), 0.02]),
        (2, "image_similarity", ["0.1", 0.2, 0.3]),
    ],
)
def test_nulls_and_counts_out_of_place_are_refused(
    write_concept_run: WriteRun, row: int, field: str, values: list[Any]
) -> None:
    run = write_concept_run(*SPARSE, edit=lambda d: d["matrix"]["rows"][row].update({field: values}))
    with pytest.raises(UserError, match="not a usable record"):
        load_record(run)


def test_concepts_must_be_evaluated_right_after_learning_and_at_the_end(write_concept_run: WriteRun) -> None:
    for i, mmd in enumerate(([[0.02], [0.05, None]], [[0.02], [None, 0.03]])):
        with pytest.raises(UserError, match="right after learning or after the last task"):
            load_record(write_concept_run(mmd, None, [[8], [8, 8]], name=str(i)))
    with pytest.raises(UserError, match="drift is there"):
        load_record(write_concept_run([None, [0.1, 0.1]], [[0.0], [0.1, 0.0]], joint=True, label="joint"))


def test_missing_places_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give a run directory"):
        load_record(tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_records([tmp_path / "nowhere"])


def test_strictness_decides_whether_a_broken_record_stops_the_search(write_run: WriteRun, tmp_path: Path) -> None:
    write_run()
    broken = write_run(seed=1) / "record.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="half-written"):
        find_records([tmp_path])
    assert [r.seed for r in find_records([tmp_path], strict=False)] == [0]
    _, problems = scan_records([tmp_path])
    assert len(problems) == 1
    assert str(broken) in problems[0]


def test_an_older_record_is_migrated_step_by_step(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run()
    change(run, version=-1, status="done")
    monkeypatch.setitem(records.MIGRATIONS, -1, lambda d: {**d, "status": "end"})
    monkeypatch.setitem(records.MIGRATIONS, 0, lambda d: {**d, "status": {"end": "finished"}[d["status"]]})
    record = load_record(run)
    assert (record.status, record.data["version"]) == ("finished", records.VERSION)


def test_comparable_drops_what_a_repeat_may_change_and_nothing_else(write_run: WriteRun) -> None:
    run = write_run()
    before = comparable(load_record(run))
    change(run, measured={}, environment={"device": "cuda"}, created="later", finished=None)
    assert comparable(load_record(run)) == before
    change(run, config_hash="other")
    assert comparable(load_record(run)) != before


def test_the_log_is_ordered_and_survives_a_cut_line_and_a_resume(write_run: WriteRun) -> None:
    steps = [(0, 0, 3.0), (0, 10, 2.0), (1, 0, 4.0), (0, 10, 1.0)]
    run = write_run(log=[{"task": t, "step": s, "loss": x} for t, s, x in steps])
    with (run / "log.jsonl").open("a") as file:
        file.write('{"task": 1, "st')
    assert [(e["task"], e["step"], e["loss"]) for e in load_record(run).log()] == [(0, 0, 3), (0, 10, 1), (1, 0, 4)]
    (run / "log.jsonl").unlink()
    assert load_record(run).log() == []


def test_frame_has_one_row_per_run_with_all_metrics(write_run: WriteRun, tmp_path: Path) -> None:
    write_run()
    write_run([[50], None, None], seed=1, status="running")
    table = frame([tmp_path])
    assert list(table["seed"]) == [0, 1]
    assert table["F_max"][0] == pytest.approx(30)
    assert table["A_last"].isna().tolist() == [False, True]


def test_rows_of_concept_runs_say_what_they_were_measured_with(write_concept_run: WriteRun, tmp_path: Path) -> None:
    write_concept_run()
    row = frame([tmp_path]).iloc[0]
    found = [row[key] for key in ("backbone", "features", "kernel", "estimator", "eval_n", "eval_scheduler", "steps")]
    assert found == ["glyph-diffusion", "glyph-vit", "poly2", "biased", 8, "ddim", 200]


@pytest.mark.parametrize("name", ["photos", "renditions", "portraits"])
def test_the_published_records_still_give_the_published_numbers(name: str) -> None:
    folder = Path(__file__).parents[2] / "results" / "recorded" / name
    with (folder / "runs.csv").open(encoding="utf-8") as file:
        # labels of a table also name the settings that tell rows apart
        published = {(row["config_hash"], row["seed"]): row for row in csv.DictReader(file)}
    found = find_records([folder / "records"])
    assert len(found) == len(published) > 0
    for record in found:
        for key, value in record.metrics.items():
            shown = published[record.data["config_hash"], str(record.seed)].get(key)  # a later measure has no column
            assert (pytest.approx(float(shown)) if shown else None) == value


_BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
from dualcl.results.report import build_report
from dualcl.results.records import find_records
files = build_report([sys.argv[1]], sys.argv[2], {formats!r})
assert len(find_records([sys.argv[1]])) == 1
print([p.name for p in files.tables])
"""


@pytest.mark.parametrize(
    ("blocked", "formats"),
    [
        (("torch", "torchvision", "timm", "diffusers", "transformers"), ("md", "csv", "tex", "html", "png")),
        (("torch", "numpy", "pandas", "matplotlib", "PIL", "yaml"), ("md", "csv", "tex")),
    ],
)
def test_reports_need_no_torch_and_tables_nothing_but_python(
    write_run: WriteRun, tmp_path: Path, blocked: tuple[str, ...], formats: tuple[str, ...]
) -> None:
    run = write_run()
    code = _BLOCKED.format(blocked=blocked, formats=formats)
    arguments = [sys.executable, "-c", code, str(run), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['table.md', 'table.csv', 'table.tex']"
