"""Aligned tables for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace

from dualcl.results import tables
from dualcl.results.published.render import NONE, NOTE, TITLE, Block, legend
from dualcl.results.tables import DAGGER, DASH, Summary, Table

_ASCII = {"±": "+-", "↑": "^", "↓": "v", "×": "x", "·": ".", "²": "^2", "³": "^3", DASH: "-", "−": "-", DAGGER: "+"}


def _blocks(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Columns in blocks that fit `width`; every block begins with column 0, and has at least one more."""
    blocks: list[list[int]] = [[0]]
    for index in range(1, len(widths)):
        used = sum(widths[i] + 1 for i in blocks[-1]) + widths[index]
        if width is not None and used > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(index)
    return blocks


def _text_grid(grid: Sequence[Sequence[str]], heads: int, width: int | None) -> list[str]:
    """The aligned lines of a grid whose first `heads` lines are its head, in blocks of columns that fit `width`."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = []
    for block in _blocks(widths, width):
        for row_cells in [*grid[:heads], ["-" * w for w in widths], *grid[heads:]]:
            cells = [row_cells[i].rjust(widths[i]) if i else row_cells[i].ljust(widths[i]) for i in block]
            lines.append(" ".join(cells).rstrip())
        lines.append("")
    return lines


def _wrapped(lines: Iterable[str], width: int | None) -> list[str]:
    return [part for line in lines for part in (textwrap.wrap(line, max(width, 20)) if width else [line])]


def _text_differences(table: Table) -> list[list[str]]:
    """The grid of mean differences with intervals: p and standard deviation would not fit a terminal."""
    metrics = tables.difference_metrics(table)
    assert table.differences is not None
    grid = [
        [f"method − {table.differences.baseline}", "seeds", *(f"{m.title} {tables.arrow(m)} " for m in metrics)],
        ["", "", *(f"{tables.difference_unit(m)} " for m in metrics)],
    ]
    for row in tables.compared_rows(table):
        cells = []
        for metric in metrics:
            difference = table.differences.by_metric[metric.key][row.label]
            mean, interval, _ = tables.difference_parts(replace(difference, std=None), metric)
            text = mean if difference.mean is None else f"{mean} {interval}{tables.few_seeds(table, row, difference)}"
            cells.append(text + ("*" if difference.significant else " "))
        grid.append([tables.row_name(row), str(len(tables.shared_seeds(table, row))), *cells])
    return grid


def table_text(table: Table, *, ascii_only: bool = False, width: int | None = None) -> str:
    """An aligned table for a terminal, in blocks of columns that fit `width`; the best of a column ends in `*`.

    The differences follow, where there are any to test.
    """
    grid = [
        ["method", "seeds", *(f"{m.title} {tables.arrow(m)} " for m in table.metrics)],
        ["", "", *(f"{tables.unit(table, m)} " for m in table.metrics)],
    ]
    for row in table.rows:
        # a blank in the place of the star keeps the digits of a column under each other
        cells = [tables.cell(table, row, m) + ("*" if row.label in table.best[m.key] else " ") for m in table.metrics]
        grid.append([tables.row_name(row), str(len(row.seeds)), *cells])
    lines = [f"{table.preset}: {table.subtitle}", *([table.measured] if table.measured else []), ""]
    lines += _text_grid(_plain_grid(grid, ascii_only), 2, width) if table.rows else []
    marked = " * marks the best of a column." if any(table.best.values()) else ""
    lines += _wrapped([tables.seeds_note(table) + marked, *tables.caveat_lines(table)], width)
    lines += _wrapped([f"no result: {line}" for line in table.unfinished], width)
    lines += _wrapped([f"mind: {line}" for line in table.warnings], width)
    if table.differences is not None and table.differences.shown:
        lines += ["", *_wrapped([tables.difference_title(table)], width), ""]
        lines += _text_grid(_plain_grid(_text_differences(table), ascii_only), 2, width)
        lines += _wrapped(tables.difference_notes(table, short=True), width)
    return _plain("\n".join([*lines, ""]), ascii_only)


def _plain(text: str, ascii_only: bool) -> str:
    text = re.sub("[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", text)  # a terminal would obey them
    if not ascii_only:
        return text
    for mark, ascii_mark in _ASCII.items():
        text = text.replace(mark, ascii_mark)
    return text.encode("ascii", "replace").decode()


def _plain_grid(grid: Sequence[Sequence[str]], ascii_only: bool) -> list[list[str]]:
    return [[_plain(text, ascii_only) for text in line] for line in grid]


def render(summary: Summary, *, ascii_only: bool = False, width: int | None = None) -> str:
    """All tables of a summary, then the ranks over its streams, and what was left out."""
    blocks = [table_text(table, ascii_only=ascii_only, width=width) for table in summary.tables]
    for kind, _ in tables.sections(summary):
        if lines := tables.ranking_lines(summary, kind):
            blocks.append(_plain("\n".join([*_wrapped(lines, width), "", ""]), ascii_only))
    if summary.problems:
        blocks.append(_plain("\n".join([*_wrapped(summary.problems, width), ""]), ascii_only))
    return "\n".join(blocks)


def published(blocks: Sequence[Block], *, ascii_only: bool = False, width: int | None = None) -> str:
    """Published numbers: aligned tables; lines of prose are wrapped to `width`."""
    lines = []

    def prose(text: str, indent: str = "  ") -> None:
        if width is None or width < 40:
            lines.append(indent + text)
        else:
            lines.extend(textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + "  "))

    for block in blocks:
        lines.append(block.title if block.parts else f"{block.title}: {NONE}")
        for part in block.parts:
            lines.append("")
            prose(part.title)
            for fact in part.facts:
                prose(fact, "    ")
            grid = [part.header, *part.rows]
            widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
            last = len(widths) - 1
            for row in grid:
                cells = [
                    c.rjust(w) if 1 < i < last else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
                ]
                lines.append("    " + "  ".join(cells).rstrip())
            for note in part.notes:
                prose(note, "    ")
        lines.append("")
    return _plain("\n".join(lines), ascii_only)


def published_section(blocks: Sequence[Block], *, ascii_only: bool = False, width: int | None = None) -> str:
    """Published numbers below our tables: what they are, then all of them."""
    head = [f"{TITLE}. {NOTE}", *legend(), ""] if any(block.parts for block in blocks) else [TITLE]
    if width:
        head = [line for text in head for line in textwrap.wrap(text, width, subsequent_indent="  ") or [""]]
    return _plain("\n".join(head), ascii_only) + "\n" + published(blocks, ascii_only=ascii_only, width=width)
