"""SPEED.md: what `dualcl bench` measured, from its JSON files; and the plot of how cost grows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualcl.benchmark.bench_pairs import about_lines, cells_of, md_table, notes_of
from dualcl.benchmark.errors import UserError
from dualcl.benchmark.reading import read_json
from dualcl.benchmark.safe_yaml import read_yaml

INTRODUCTION = """# Speed

What `dualcl bench` measured, each quantity beside the code that a user would pick instead, as two processes on one
machine that take turns, with the same weights, batch, resolution, threads and, unless a row says otherwise, precision.
Ratios count, not seconds. Weights and images are random where a section says nothing else: speed does not depend on
them.

Two things are tests instead of rows: each test image passes the model once per evaluation of all tasks
(`tests/benchmark/test_evaluation_passes.py`), and `dualcl --help`, `list` and `report` print without importing torch
(`tests/benchmark/test_cli_start.py`).
"""


def read_result(path: Path) -> dict[str, Any]:
    """A JSON file of `dualcl bench`. Raises UserError when it is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict) or not {"kind", "command", "rows", "setup", "device"} <= value.keys():
        raise UserError(f"{path} is no result of `dualcl bench KIND --format json`")
    return value


def read_notes(path: Path) -> dict[str, str]:
    """Reasons of misses by quantity, or by what quantities begin with up to a dash. Raises UserError."""
    try:
        value = read_yaml(path.read_text(encoding="utf-8"), f"--notes {path}") or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--notes {path} cannot be read as YAML: {error}") from None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UserError(f"--notes {path}: wants lines `quantity: reason`")
    return {str(name): " ".join(text.split()) for name, text in value.items()}


def reason_of(name: str, notes: Mapping[str, str]) -> str | None:
    """The note of the quantity: its own, else that of the longest beginning."""
    fitting = [known for known in notes if f"{name}-".startswith(f"{known}-")]
    return notes[max(fitting, key=len)] if fitting else None


def speed_page(files: Sequence[Path], notes: Mapping[str, str], folder: Path) -> str:
    """The page, in Markdown, to lie in `folder`; one section per file, in the order given. Raises UserError."""
    results = [(path, read_result(path)) for path in files]
    rows = [row for _, value in results if value["kind"] != "growth" for row in value["rows"]]
    judged = [row for row in rows if row["met"] is not None]
    met = sum(row["met"] for row in judged)
    lines = [INTRODUCTION, f"{met} of {len(judged)} targets met.", ""]
    for path, value in results:
        lines += _growth(path, value, folder) if value["kind"] == "growth" else _comparison(value, notes)
    return "\n".join(lines).rstrip("\n") + "\n"


def _heading(value: Mapping[str, Any]) -> list[str]:
    return [f"## {value['kind'].capitalize()} on {value['device']}", "", "```sh", value["command"], "```", ""]


def _comparison(value: Mapping[str, Any], notes: Mapping[str, str]) -> list[str]:
    rows = value["rows"]
    lines = [*_heading(value), *md_table(rows), "", *[f"- {line}" for line in [*about_lines(value), *notes_of(rows)]]]
    missed = [row for row in rows if row["met"] is False]
    if missed:
        lines += ["", "Missed:", ""]
        lines += [f"- {cells_of(row)[0]}: {reason_of(row['name'], notes) or 'no reason known'}" for row in missed]
    return [*lines, ""]


def _growth(path: Path, value: Mapping[str, Any], folder: Path) -> list[str]:
    from dualcl.benchmark.bench_growth import COLUMNS, table

    head, *body = table(value["rows"])
    rule = ["---", "---", *["---:"] * (1 + len(COLUMNS))]
    cells = [f"| {' | '.join(line)} |" for line in (head, rule, *body)]
    setup = {**value["setup"], "threads": value["threads"], "torch": value["environment"]["torch"]}
    about = ", ".join(f"{key.replace('_', ' ')} {v}" for key, v in setup.items())
    picture = Path(os.path.relpath(path.with_suffix(".png").absolute(), folder.absolute())).as_posix()
    return [*_heading(value), f"![how cost grows]({picture})", "", *cells, "", f"- {about}", ""]


def growth_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Images per second and peak memory (rows of panels) against everything that grows (columns), a line per method."""
    import matplotlib
    from matplotlib.figure import Figure

    from dualcl.results.plots import _RC, COLOURS, LINES, MARKERS

    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    quantities = (
        ("images / s, training", "train_images_per_s"),
        ("images / s, evaluation", "eval_images_per_s"),
        ("peak memory of training, MiB", "peak_mib"),
    )
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(2.4 * len(axes_names) + 1.2, 6.6), layout="constrained")
        panels = figure.subplots(len(quantities), len(axes_names), squeeze=False, sharey="row", sharex="col")
        for line, (label, key) in enumerate(quantities):
            panels[line][0].set_ylabel(label)
            panels[line][0].set_ylim(0, 1.1 * max(row[key] for row in rows))
            for column, name in enumerate(axes_names):
                panel = panels[line][column]
                for i, method in enumerate(methods):
                    points = [(r["value"], r[key]) for r in rows if (r["axis"], r["method"]) == (name, method)]
                    panel.plot(
                        *zip(*points, strict=True), color=COLOURS[i % len(COLOURS)], label=method, ms=6, lw=1.6,
                        marker=MARKERS[i % len(MARKERS)], ls=LINES[i % len(LINES)], mec="white", mew=0.4,
                    )  # fmt: skip
                values = sorted({r["value"] for r in rows if r["axis"] == name})
                panel.set_xscale("log")
                panel.set_xticks(values, [str(v) for v in values])
                panel.minorticks_off()
                if line == len(quantities) - 1:
                    panel.set_xlabel(name)
        handles, labels = panels[0][0].get_legend_handles_labels()
        if len(methods) > 1:
            figure.legend(handles, labels, loc="outside right upper", handlelength=3.2)
        else:
            figure.suptitle(methods[0], x=0.01, ha="left", fontsize=10)
    return figure
