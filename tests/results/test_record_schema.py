"""The record's schema: every committed record has it, and a stored record of each version loads for ever."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.results import records
from dualcl.results.records import VERSION, load_record

RESULTS = Path(__file__).parents[2] / "results"
STORED = Path(__file__).parent / "stored"
SCHEMA: dict[str, Any] = json.loads((RESULTS / "record.schema.json").read_text(encoding="utf-8"))


def errors(data: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    return [error.json_path for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)]


def test_all_committed_records_have_the_schema() -> None:
    files = [*RESULTS.glob("recorded/*/records/*/record.json"), *STORED.glob("*.json")]
    assert len(files) > 100
    for file in files:
        assert errors(json.loads(file.read_text(encoding="utf-8"))) == [], file
    assert SCHEMA["properties"]["version"] == {"const": VERSION}


def test_a_run_of_today_has_the_schema(tmp_path: Path) -> None:
    from dualcl.benchmark.config.resolve import resolve
    from dualcl.benchmark.runs.runner import run

    sets = ["threads=1", "data.classes=2", "data.train_per_class=2", "data.test_per_class=2", "stream.tasks=2"]
    run(resolve("glyphs", "ncm", sets), tmp_path / "run")
    assert errors(json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("$", lambda d: d.pop("config_hash")),
        ("$.run.seed", lambda d: d["run"].update(seed="0")),
        ("$.tasks[0].steps", lambda d: d["tasks"][0].update(steps=-1)),
        ("$.matrix.rows[0]", lambda d: d["matrix"]["rows"][0].pop("total")),
    ],
)
def test_the_schema_refuses_other_records(path: str, change: Any) -> None:
    data = json.loads((STORED / "version-1-accuracy.json").read_text(encoding="utf-8"))
    assert errors(data) == []
    change(data)
    assert errors(data) == [path]


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("accuracy", {"A_last": 36.9, "A_avg": 53.30353174603174, "F_max": 14.11111111111111, "plasticity": 49.6}),
        ("mmd", {"A_mmd": 1961.5834425793917, "F_mmd": 0.0, "concept_accuracy": 48.333333333333336}),
    ],
)
def test_a_stored_record_of_the_first_version_loads_for_ever(name: str, metrics: dict[str, float]) -> None:
    file = STORED / f"version-1-{name}.json"
    assert json.loads(file.read_text(encoding="utf-8"))["version"] == 1
    record = load_record(file)
    assert record.data["version"] == VERSION
    assert {key: record.metrics[key] for key in metrics} == pytest.approx(metrics)


def test_a_version_to_come_migrates_stored_records_and_refuses_newer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 of the test: `label` moves to the top, as `name`."""
    file = STORED / "version-1-accuracy.json"
    before = load_record(file)

    def step(data: dict[str, Any]) -> dict[str, Any]:
        data = copy.deepcopy(data)
        return {**data, "name": data["run"]["label"], "run": {**data["run"], "label": data["run"]["label"].upper()}}

    monkeypatch.setattr(records, "VERSION", 2)
    monkeypatch.setitem(records.MIGRATIONS, 1, step)
    after = load_record(file)
    assert (after.data["version"], after.data["name"], after.label) == (2, before.label, before.label.upper())
    assert after.metrics == before.metrics
    newer = tmp_path / "record.json"
    newer.write_text(json.dumps(after.data), encoding="utf-8")
    assert load_record(newer).data == after.data  # a step is taken once
    monkeypatch.undo()
    with pytest.raises(UserError, match="record version 2, this dualcl reads up to 1; read it with a newer dualcl"):
        load_record(newer)
