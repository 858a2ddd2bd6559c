"""Labels, paths and texts of a record that are made to run, to break out, or to be obeyed by a terminal."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.grids.ledger import ledger
from dualcl.results.files import csv_cell, slugs, write_text
from dualcl.results.records import load_record
from dualcl.results.report import build_report, terminal_table
from dualcl.results.tables import summarise
from dualcl.results.writers.latex import tex_text
from dualcl.results.writers.markdown import markdown_code, markdown_text

WriteRun = Callable[..., Path]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("=cmd|'/c calc'!A0", "'=cmd|'/c calc'!A0"),
        ("+1+1", "'+1+1"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("-1.5", "-1.5"),
        ("-1.5e-07", "-1.5e-07"),
        ("+3", "+3"),
        ("a=1", "a=1"),
        ("", ""),
        (-1.5, -1.5),
        (None, None),
    ],
)
def test_no_cell_is_a_formula_and_numbers_stay(value: object, written: object) -> None:
    assert csv_cell(value) == written


def test_a_label_that_is_a_formula_is_text_in_every_csv(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(label="=HYPERLINK(1)", seed=seed)
        write_run(label="-lora", seed=seed, correct=[[80], [70, 60], [50 + seed, 40, 90]])
    build_report([tmp_path / "runs"], tmp_path / "out", ["csv"])
    cells = [
        cell
        for path in sorted((tmp_path / "out").glob("*.csv"))
        for row in csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
        for cell in row
    ]
    assert "'=HYPERLINK(1)" in cells
    assert "'-lora" in cells
    assert not [cell for cell in cells if re.match(r"[=+@\t\r]|-(?![\d.])", cell)]
    assert [cell for cell in cells if re.fullmatch(r"-\d+(\.\d+)?", cell)]  # negative numbers are left alone


def test_text_stays_text_in_markdown_and_latex() -> None:
    assert markdown_text("~~~ <b> [x](javascript:y) `a` &lt;\n# x") == (
        r"\~\~\~ \<b\> \[x\](javascript:y) \`a\` \&lt; # x"
    )
    assert markdown_code("a | b") == r"`a \| b`"
    assert markdown_code("a `` b\n`c`") == "``` a `` b `c` ```"
    assert tex_text(r"[2pt] \input{x} $ ^ ~ %") == (
        r"{[}2pt] \textbackslash{}input\{x\} \$ \textasciicircum{} \textasciitilde{} \%"
    )


def test_a_command_with_backticks_stays_code_in_the_ledger(write_run: WriteRun, tmp_path: Path) -> None:
    evil = "`</code><script>alert(1)</script>`"
    run = write_run(
        edit=lambda d: (
            d["config"].update(data={"name": "glyphs", "root": evil}),
            d["sources"].update({"data.root": "--set"}),
            d["environment"].update(commit="<script>`"),
        )
    )
    text = ledger([run], tmp_path / "LEDGER.md")
    assert "<script>" not in re.sub(r"(`+) .*? \1", "", text)


@pytest.mark.parametrize("key", ["label", "preset", "method", "domain", "table"])
@pytest.mark.parametrize("name", ["a\x1b]0;owned\x07", "a\nb", "\x00", "\ud800", "\x9b31m"])
def test_names_that_a_terminal_would_obey_are_refused(write_run: WriteRun, key: str, name: str) -> None:
    run = write_run(name="evil", edit=lambda d: d["run"].update({key: name}))
    with pytest.raises(UserError, match=rf"record\.json is not a usable record \(run\.{key} is ") as caught:
        load_record(run)
    assert str(caught.value).isprintable()


def test_other_texts_reach_a_terminal_without_their_controls(write_run: WriteRun, tmp_path: Path) -> None:
    write_run(status="failed", edit=lambda d: d.update(error="\x1b[31mred\x07 \udcff"))
    text = terminal_table([tmp_path / "runs"])
    assert "?[31mred?" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    files = build_report([tmp_path / "runs"], tmp_path / "out", ["md", "csv", "html"])
    assert files.html is not None
    assert r"\udcff" in files.html.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda d: d["tasks"].append(5), r"tasks\[\]"),
        (lambda d: d["tasks"][0].update(parameters_trained="many"), r"tasks\[\]\.parameters_trained"),
        (lambda d: d["measured"].update(wall_seconds=[1]), r"measured\.wall_seconds"),
        (lambda d: d["measured"].update(wall_seconds=1e300), r"measured\.wall_seconds"),
        (lambda d: d.update(environment=[]), "environment"),
        (lambda d: d["identity"].update(class_order=3), r"identity\.class_order"),
        (lambda d: d["matrix"]["rows"][0].update(correct=[1e200]), "in a row of the matrix|nan|total"),
        (lambda d: d.update(error={"a": 1}), "error"),
        (lambda d: d["run"].update(n_tasks=10**12), r"run\.n_tasks"),
    ],
)
def test_a_record_of_another_shape_is_named(write_run: WriteRun, edit: Callable[[Any], object], place: str) -> None:
    with pytest.raises(UserError, match=rf"record\.json is not a usable record \(.*({place})"):
        load_record(write_run(edit=edit))


def test_a_record_that_nests_or_lies_about_numbers(write_run: WriteRun, tmp_path: Path) -> None:
    path = write_run() / "record.json"
    data = path.read_text(encoding="utf-8")
    for text in ("[" * 100_000, data.replace('"seed"', '"x": NaN, "seed"', 1), data[:-2] + ',"a":' + "9" * 5000 + "}"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="not valid JSON"):
            load_record(path)


def test_names_of_files_stay_in_their_folder(tmp_path: Path) -> None:
    names = ["../../x", "/etc/passwd", "..", ".", "", "a/b", "con:", "\x00", "ü", "x" * 500, "A", "a"]
    made = slugs(names)
    assert len({name.lower() for name in made}) == len(names)
    for name in made:
        assert (tmp_path / name).resolve().parent == tmp_path.resolve()
        assert len(name) < 90
    assert write_text(tmp_path / "x", "\udcff").read_text() == r"\udcff"


def test_a_summary_of_only_refused_records_says_which(write_run: WriteRun, tmp_path: Path) -> None:
    path = write_run() / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "environment": 5}))
    with pytest.raises(UserError, match=r"record\.json is not a usable record|no run"):
        summarise([tmp_path / "runs"])
