"""SPEED.md: made from the JSON files of `dualcl bench`, which lie beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.errors import UserError
from dualcl.results.speed_page import growth_figure, read_notes, reason_of, speed_page

RESULTS = Path(__file__).parents[2] / "results"
ROW: dict[str, Any] = {
    "name": "step-l2p-coda_prompt",
    "quantity": "L2P++ training step",
    "measure": "time",
    "unit": "ms",
    "ours": 50.0,
    "peer": 100.0,
    "against": "coda_prompt",
    "ratio": 2.0,
    "ratio_min": 1.9,
    "ratio_max": 2.1,
    "pairs": 7,
    "target": "at least 1.5x as fast",
    "met": True,
    "agree": 0.0,
    "note": "a note",
}
MISSED = {**ROW, "name": "step_low-l2p-coda_prompt", "quantity": "L2P++ in bf16", "ratio": 0.5, "met": False}
COMPARISON: dict[str, Any] = {
    "kind": "classification",
    "command": "dualcl bench classification --threads 2",
    "setup": {"batch": 16, "repeats": 7},
    "device": "cpu",
    "threads": 2,
    "environment": {"torch": "2.5", "timm": "1.0", "dualcl": "0.1.0"},
    "peers": {"coda_prompt": {"source": "https://example.org/code", "commit": "abc123", "torch": "2.5"}},
    "rows": [ROW, MISSED, {**ROW, "name": "other", "target": "-", "met": None}],
}
POINT = {"method": "clora", "axis": "tasks", "value": 1, "train_images_per_s": 4.0, "eval_images_per_s": 9.0}
POINT.update(peak_mib=800.0, peak_process_mib=1200.0)
GROWTH = {**COMPARISON, "kind": "growth", "command": "dualcl bench growth --out DIR", "rows": [POINT]}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "speed").mkdir()
    paths = []
    for name, value in (("classification", COMPARISON), ("growth", GROWTH)):
        paths.append(tmp_path / "speed" / f"{name}.json")
        paths[-1].write_text(json.dumps(value), encoding="utf-8")
    return paths


def test_page_states_commands_targets_misses_and_what_was_measured_against(files: list[Path], tmp_path: Path) -> None:
    notes = tmp_path / "notes.yaml"
    notes.write_text("step_low: >-\n  this processor\n  has no bf16\n", encoding="utf-8")
    out = tmp_path / "SPEED.md"
    assert main(["bench", "page", *map(str, files), "--notes", str(notes), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert page == speed_page(files, read_notes(notes), tmp_path)
    assert "1 of 2 targets met" in page
    for text in (
        *("dualcl bench classification --threads 2", "dualcl bench growth --out DIR", "commit abc123", "torch 2.5"),
        "| L2P++ training step, against coda_prompt | 50 ms | 100 ms | 2.00 (1.90-2.10) | at least 1.5x as fast | yes",
        "- L2P++ in bf16, against coda_prompt: this processor has no bf16",
        "![how cost grows](speed/growth.png)",
        "| clora | tasks | 1 | 4.0 | 9.0 | 800 | 1200 |",
    ):
        assert text in page


def test_reason_is_that_of_the_longest_beginning() -> None:
    notes = {"step": "all", "step-l2p": "some", "st": "none"}
    assert reason_of("step-l2p-pilot", notes) == "some"
    assert reason_of("step-coda_prompt-pilot", notes) == "all"
    assert reason_of("steps", notes) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "classification"}'])
def test_other_files_are_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"other\.json"):
        speed_page([file], {}, tmp_path)


def test_plot_has_a_panel_per_quantity_and_axis_and_a_line_per_method() -> None:
    rows = []
    for method in ("clora", "l2p"):
        for axis, value in (("tasks", 1), ("tasks", 10), ("rank", 4)):
            if (method, axis) != ("l2p", "rank"):
                rows.append({**copy.copy(POINT), "method": method, "axis": axis, "value": value})
    figure = growth_figure(rows)
    assert len(figure.axes) == 3 * 2
    by_label = {axes.get_xlabel(): axes for axes in figure.axes if axes.get_xlabel()}
    assert [len(line.get_xdata()) for line in by_label["tasks"].lines] == [2, 2]
    assert [len(line.get_xdata()) for line in by_label["rank"].lines] == [1]


def test_committed_page_is_what_the_results_give() -> None:
    files = sorted((RESULTS / "speed").glob("*.json"))
    if not files:
        pytest.skip("nothing is measured yet")
    notes = RESULTS / "speed" / "notes.yaml"
    page = (RESULTS / "SPEED.md").read_text(encoding="utf-8")
    assert page == speed_page(files, read_notes(notes) if notes.exists() else {}, RESULTS)
