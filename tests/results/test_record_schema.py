"""The record's schema: every committed record has it, and a stored record of each version loads for ever."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.results import records
from dualcl.results.documents import documents
from dualcl.results.metrics import KINDS
from dualcl.results.record_type import FIELDS
from dualcl.results.records import VERSION, load_record

RESULTS = Path(__file__).parents[2] / "results"
STORED = Path(__file__).parent / "stored"
SCHEMA: dict[str, Any] = json.loads((RESULTS / "record.schema.json").read_text(encoding="utf-8"))


def errors(data: Any) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    return [error.json_path for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)]


def test_all_committed_records_have_the_schema() -> None:
    files = [*RESULTS.glob("recorded/*/records/*/record.json"), *STORED.glob("version-*.json")]
    folders = {folder.parent.name for folder in RESULTS.glob("recorded/*/records")}
    assert {file.parents[2].name for file in files[: -len([*STORED.glob("version-*.json")])]} == folders
    assert folders >= {"photos", "portraits", "quirks", "renditions"}
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


@pytest.mark.parametrize("version", range(1, VERSION + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_record_of_every_version_and_kind_loads_for_ever(version: int, kind: str) -> None:
    """stored/metrics.json has all measures that its matrix has the fields for; others are None."""
    name = f"version-{version}-{kind}"
    metrics = json.loads((STORED / "metrics.json").read_text(encoding="utf-8"))[name]
    assert json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))["version"] == version
    record = load_record(STORED / f"{name}.json")
    assert record.data["version"] == VERSION
    assert {key: record.metrics[key] for key in metrics} == metrics
    assert {value for key, value in record.metrics.items() if key not in metrics} <= {None}


#: of every released version, for ever; what comes later is optional
REQUIRED = {
    "accuracy": {1: {"correct", "total"}},
    "mmd": {1: {"mmd", "drift", "image_similarity", "text_similarity", "nearest_correct", "generated"}},
}


def test_required_fields_of_a_released_version_never_grow() -> None:
    for name, of_version in REQUIRED.items():
        fields = [field for field in KINDS[name].by_name.values() if field.required]
        for version, names in of_version.items():
            assert {field.name for field in fields if field.since <= version} == names
    top = {field.name for field in FIELDS if field.required and field.since <= 1 and "." not in field.name}
    assert top == {
        "status", "error", "run", "config", "config_hash", "sources", "identity", "network", "environment", "tasks",
        "tasks[]", "matrix", "measured", "created", "finished",
    }  # fmt: skip


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_the_files_that_are_written_from_the_code_are_up_to_date(path: Path) -> None:
    """When this fails: `python -m dualcl.results.documents`."""
    assert path.read_text(encoding="utf-8") == documents()[path]


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
