"""Faults that were found once, as the scripts that showed them: each must stay away."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dualcl.results import metrics, records

RECORDED = Path(__file__).parents[2] / "results" / "recorded"
STORED = Path(__file__).parent / "stored" / "glyphs"


def test_one_more_field_per_row_leaves_every_older_record_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, 68 of 68 records were refused as damaged."""
    found = sorted([*RECORDED.glob("*/records/*/record.json"), *STORED.glob("*/record.json")])
    assert len(found) > 100
    before = {path: metrics.run_metrics(records.load_record(path).data) for path in found}
    for name, kind in list(metrics.KINDS.items()):
        monkeypatch.setitem(metrics.KINDS, name, dataclasses.replace(kind, row_fields=(*kind.row_fields, "dino")))
    after = {path: metrics.run_metrics(records.load_record(path).data) for path in found}
    assert after == before
