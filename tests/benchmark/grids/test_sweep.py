"""Which point of a sweep is the best."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualcl.benchmark.grids import sweep
from dualcl.benchmark.grids.sweep import Point, Sweep, best_score, score_sweep, sweep_table


def test_of_equal_points_the_one_that_is_better_in_the_next_measures_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "1e-3": {"concept_accuracy_last": 87.5, "concept_accuracy": 100.0, "attribute_accuracy_last": 90.0},
        "4e-3": {"concept_accuracy_last": 100.0, "concept_accuracy": 100.0, "attribute_accuracy_last": 76.4},
        "8e-3": {"concept_accuracy_last": 100.0, "concept_accuracy": 100.0, "attribute_accuracy_last": 85.0},
        "2e-2": {"concept_accuracy_last": 100.0, "concept_accuracy": 100.0},  # not measured: after those that are
        "9e-3": {"concept_accuracy_last": 100.0, "concept_accuracy": 100.0, "attribute_accuracy_last": 99.0},
    }
    points: list[Any] = [Point((("method.lr", lr),), (SimpleNamespace(out=Path(lr)),)) for lr in found]  # type: ignore[arg-type]
    monkeypatch.setattr(sweep, "load_record", lambda out: SimpleNamespace(metrics=found[str(out)]))
    outcomes: list[Any] = [
        SimpleNamespace(planned=p.runs[0], code=int(p.settings[0][1] == "9e-3"), error="") for p in points
    ]
    whole = Sweep("portraits-tune", "lora", "concept_accuracy_last", "other concepts", tuple(points), "--over")
    scores = score_sweep(whole, outcomes)
    assert [s.point.settings[0][1] for s in scores] == ["8e-3", "4e-3", "2e-2", "1e-3", "9e-3"]
    best = best_score(whole, scores)
    assert best is not None
    assert best.point.settings == (("method.lr", "8e-3"),)
    assert sweep_table(whole, scores).splitlines()[4].startswith("8e-3")
