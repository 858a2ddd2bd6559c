"""A measure that is added later, or by a plug-in: older records are read, tables show it and say where it lacks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.results.metrics import KINDS, METRICS, run_metrics
from dualcl.results.record_type import Field, Measure
from dualcl.results.records import find_records, load_record
from dualcl.results.report import build_report, render, terminal_table
from dualcl.results.tables import summarise
from dualcl.results.writers import csv as csv_writer

WriteRun = Callable[..., Path]

RESULTS = Path(__file__).parents[2] / "results"
STORED = Path(__file__).parent / "stored"
DINO = Measure(
    "dino", "DINO sim.", "cosine", "higher", "mean cosine of DINO's features", decimals=3,
    field=Field("dino", "number", "mean cosine of DINO's features", required=False, nullable=True),
)  # fmt: skip


@pytest.fixture
def dino(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the source would read with one more `Measure` in each kind."""
    for name, kind in list(KINDS.items()):
        monkeypatch.setitem(KINDS, name, dataclasses.replace(kind, measures=(*kind.measures, DINO)))
    monkeypatch.setitem(METRICS, "dino", DINO)


def measured(values: list[list[float | None]]) -> Callable[[dict[str, Any]], object]:
    """An edit that puts `dino` into the rows of a record."""

    def edit(data: dict[str, Any]) -> None:
        for row, numbers in zip(data["matrix"]["rows"], values, strict=True):
            row["dino"] = numbers

    return edit


SIMILAR: list[list[float | None]] = [[0.9], [0.8, 0.8], [0.3, 0.4, 0.8]]


def test_all_stored_and_recorded_runs_are_read_with_a_new_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        *STORED.glob("version-*.json"),
        *STORED.glob("glyphs/*/record.json"),
        *RESULTS.glob("recorded/*/records/*/record.json"),
    ]
    before = {file: load_record(file).metrics for file in files}
    assert len(before) > 100
    for name, kind in list(KINDS.items()):
        monkeypatch.setitem(KINDS, name, dataclasses.replace(kind, measures=(*kind.measures, DINO)))
    for file in files:
        record = load_record(file)
        assert record.metrics == {**before[file], "dino": None}
        assert record.cells()


@pytest.mark.usefixtures("dino")
def test_a_new_measure_is_a_column_with_dashes_where_it_lacks(write_concept_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_concept_run(seed=seed, edit=measured(SIMILAR))
        write_concept_run(seed=seed, label="lora", method="lora")
    (table,) = summarise([tmp_path]).tables
    assert table.warnings == ["DINO sim.: measured in 3 of 6 runs"]
    clora, lora = table.rows
    assert clora.stats["dino"] is not None
    assert clora.stats["dino"].mean == pytest.approx(0.5)  # after the last task
    assert lora.stats["dino"] is None
    head, *lines = [line for line in render(summarise([tmp_path]), "md").splitlines() if line.startswith("| ")][:4]
    at = head.split("|").index(" DINO sim. ↑ (cosine) ")
    assert [line.split("|")[at].strip() for line in lines[1:]] == ["0.500 ± 0.000", "–"]
    for form in ("text", "tex", "csv"):
        assert "0.5" in render(summarise([tmp_path]), form)
    build_report([tmp_path], tmp_path / "out", ["html", "csv"])
    assert "DINO" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("dino")
def test_a_new_measure_that_no_run_has_is_not_in_the_table(write_concept_run: WriteRun, tmp_path: Path) -> None:
    write_concept_run()
    for form in ("text", "md", "tex"):
        assert "DINO" not in render(summarise([tmp_path]), form)
    assert load_record(find_records([tmp_path])[0].path).metrics["dino"] is None


@pytest.mark.usefixtures("dino")
def test_a_new_measure_is_undefined_where_a_row_or_a_task_lacks_it(write_concept_run: WriteRun) -> None:
    holes: list[tuple[list[Any], float | None]] = [
        ([None, None, [0.3, 0.4, 0.8]], 0.5),  # begun by an older version
        ([[0.9], [0.8, 0.8], None], None),
        ([[0.9], [0.8, 0.8], [0.3, None, 0.8]], None),
    ]
    for i, (values, wanted) in enumerate(holes):
        assert load_record(write_concept_run(name=str(i), edit=measured(values))).metrics["dino"] == wanted
    for i, wrong in enumerate(([0.3, 0.4], [0.3, 0.4, "x"], [0.3, 0.4, float("inf")], 0.5)):
        run = write_concept_run(name=f"wrong{i}", edit=measured([[0.9], [0.8, 0.8], wrong]))  # type: ignore[list-item]
        with pytest.raises(UserError, match="not a usable record"):
            load_record(run)


# --- measures of a plug-in --------------------------------------------------------------------------------------------


def declared(name: str = "dino", values: Any = SIMILAR, **about: Any) -> Callable[[dict[str, Any]], object]:
    """An edit that declares a measure, and puts it into the rows."""

    def edit(data: dict[str, Any]) -> None:
        data["matrix"]["measures"] = {name: {"unit": "cosine", "better": "higher", **about}}
        for row, numbers in zip(data["matrix"]["rows"], values, strict=True):
            row[name] = numbers

    return edit


def test_a_measure_of_a_plug_in_is_shown_without_it(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(seed=seed, edit=declared(definition="how alike"))
        write_run(seed=seed, label="lora", method="lora")
    summary = summarise([tmp_path])
    assert summary.tables[0].warnings == ["dino: measured in 3 of 6 runs"]
    assert [m.key for m in summary.tables[0].metrics][-5:] == ["dino", "N_train", "N_store", "time_s", "peak_mib"]
    assert "dino ↑ (cosine)" in render(summary, "md")
    assert "0.500 ± 0.000" in render(summary, "md")
    assert r"dino [cosine] $\uparrow$" in render(summary, "tex")
    assert "dino_mean" in render(summary, "csv").splitlines()[0]
    assert ",0.5," in csv_writer.runs(summary.records)
    page = build_report(summary, tmp_path / "out", ["html"]).html
    assert page is not None
    assert "<dt>dino ↑</dt><dd>how alike</dd>" in page.read_text(encoding="utf-8")


def test_runs_that_declare_a_measure_differently_do_not_compare(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(edit=declared())
    write_run(label="lora", edit=declared(unit="%"))
    with pytest.raises(UserError, match=r"do not compare: dino is in cosine, .* in clora seed 0 and in %, higher is"):
        summarise([tmp_path])
    assert summarise([tmp_path], allow_mixed=True).tables[0].mixed


@pytest.mark.parametrize("name", ["A_last", "time_s"])
def test_a_measure_of_a_plug_in_never_passes_for_one_of_ours(write_run: WriteRun, name: str) -> None:
    plain = load_record(write_run(name="plain")).metrics
    record = load_record(write_run(edit=declared(name)))
    assert record.metrics == {**plain, f"{name} (plug-in)": pytest.approx(0.5)}
    assert {key: record.metrics[key] for key in plain} == plain


@pytest.mark.usefixtures("dino")
def test_a_measure_that_comes_to_the_suite_later_counts_only_if_it_is_the_same(write_concept_run: WriteRun) -> None:
    same = load_record(write_concept_run(edit=declared(), name="same"))
    assert same.metrics["dino"] == pytest.approx(0.5)
    assert "dino (plug-in)" not in same.metrics
    other = load_record(write_concept_run(edit=declared(better="lower"), name="other"))
    assert (other.metrics["dino"], other.metrics["dino (plug-in)"]) == (None, pytest.approx(0.5))


@pytest.mark.parametrize(
    "measures",
    [
        [],
        {"x": None},
        {"x": {}},
        {"x": {"unit": "%"}},
        {"x": {"unit": "%", "better": "up"}},
        {"x": {"unit": 3, "better": "lower"}},
        {"x": {"unit": "\x1b[31m", "better": "lower"}},
        {"\x1b[31m": {"unit": "%", "better": "lower"}},
        {"x": {"unit": "%", "better": "lower", "definition": 5}},
    ],
)
def test_a_declaration_of_another_shape_is_refused(write_run: WriteRun, measures: Any) -> None:
    run = write_run(edit=lambda d: d["matrix"].update(measures=measures))
    with pytest.raises(UserError, match=r"not a usable record \(.*matrix\.measures") as caught:
        load_record(run)
    assert str(caught.value).isprintable()


def test_the_name_of_a_measure_is_text_everywhere(write_run: WriteRun, tmp_path: Path) -> None:
    evil = "=<script>|_$"
    for seed in (0, 1):
        write_run(seed=seed, edit=declared(evil, unit="<b>%", definition="<script>&"))
    build_report([tmp_path / "runs"], tmp_path / "out", ["md", "csv", "tex", "html"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "=&lt;script&gt;|_$ ↑<span>&lt;b&gt;%</span>" in page
    assert "<script" not in page
    assert r"=\<script\>\|\_$ ↑ (\<b\>%)" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert r"=\textless{}script\textgreater{}|\_\$" in (tmp_path / "out" / "table.tex").read_text(encoding="utf-8")
    assert "'=<script>|_$_mean" in (tmp_path / "out" / "table.csv").read_text(encoding="utf-8")
    assert evil in terminal_table([tmp_path / "runs"])


# --- other optional parts of a record ---------------------------------------------------------------------------------


def test_what_a_method_does_before_and_after_its_steps_has_a_time(write_run: WriteRun) -> None:
    def edit(data: dict[str, Any], begin: Any = 0.25, end: Any = 0.5) -> None:
        for task in data["measured"]["tasks"]:
            task.update(begin_seconds=begin, end_seconds=end)

    record = load_record(write_run(edit=edit))
    assert record.data["measured"]["tasks"][0]["end_seconds"] == 0.5
    for i, wrong in enumerate((-1, "long", float("inf"), [])):
        run = write_run(name=str(i), edit=lambda d, wrong=wrong: edit(d, end=wrong))
        with pytest.raises(UserError, match=r"not a usable record \((measured\.tasks\[\]\.end_seconds|not valid JSON)"):
            load_record(run)


SOURCE = {"kind": "file", "file": "mine.py", "version": None, "sha256": "ab" * 32}


@pytest.mark.parametrize(("key", "what"), [("method_source", "method"), ("data_source", "data set")])
def test_different_code_under_one_label_is_a_warning(write_run: WriteRun, tmp_path: Path, key: str, what: str) -> None:
    for seed, digest in enumerate(("ab" * 32, "ab" * 32, "cd" * 32)):
        write_run(seed=seed, edit=lambda d, digest=digest: d["run"].update({key: {**SOURCE, "sha256": digest}}))
        write_run(seed=seed, label="lora", edit=lambda d: d["run"].update({key: SOURCE}))
        write_run(seed=seed, label="own", edit=lambda d, seed=seed: seed or d["run"].update({key: SOURCE}))
    record = load_record(tmp_path / "runs" / "glyphs-clora-0")
    assert record.data["run"][key] == SOURCE  # kept
    assert summarise([tmp_path]).tables[0].warnings == [
        f"clora: different code of the {what} under one name ({'ab' * 6}, {'cd' * 6})",
        f"own: different code of the {what} under one name ({'ab' * 6}, built in)",
    ]


@pytest.mark.parametrize("source", ["mine.py", [], {"sha256": 5}, {"file": "a\nb"}, {"kind": {}}])
def test_a_source_of_another_shape_is_refused(write_run: WriteRun, source: Any) -> None:
    with pytest.raises(UserError, match=r"not a usable record \(run\.method_source"):
        load_record(write_run(edit=lambda d: d["run"].update(method_source=source)))


def test_unknown_keys_are_kept(write_run: WriteRun) -> None:
    run = write_run(edit=lambda d: (d.update(later={"a": 1}), d["run"].update(more=[2]), d["tasks"][0].update(x="y")))
    written = json.loads((run / "record.json").read_text(encoding="utf-8"))
    data = load_record(run).data
    assert data == written
    assert run_metrics(data) == run_metrics(written)
