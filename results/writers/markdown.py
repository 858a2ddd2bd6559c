"""GitHub's Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dualcl.results import tables
from dualcl.results.published.render import NONE, NOTE, TITLE, Block, legend, sentence
from dualcl.results.record_type import Measure
from dualcl.results.tables import Row, Summary, Table


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    out = text.replace("\\", "\\\\")
    for mark in "|*_<>`[]~&":
        out = out.replace(mark, "\\" + mark)
    return " ".join(out.split())


def markdown_code(text: str) -> str:
    """Text that Markdown shows as it is, as code in a cell of a table."""
    text = " ".join(text.replace("|", "\\|").splitlines())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _markdown_grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A GitHub table: the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _markdown_cells(table: Table, row: Row, metrics: Sequence[Measure]) -> list[str]:
    cells = [tables.cell(table, row, m) for m in metrics]
    return [f"**{c}**" if row.label in table.best[m.key] else c for c, m in zip(cells, metrics, strict=True)]


def _markdown_differences(table: Table) -> list[str]:
    if table.differences is None or not table.differences.shown:
        return []
    metrics = tables.difference_metrics(table)
    head = [f"method − {table.differences.baseline}", "seeds"]
    head += [f"{m.title} {tables.arrow(m)} ({tables.difference_unit(m)})" for m in metrics]
    rows = [
        [
            tables.row_name(row),
            str(len(tables.shared_seeds(table, row))),
            *(tables.difference_cell(table, row, m) for m in metrics),
        ]
        for row in tables.compared_rows(table)
    ]
    return [
        f"#### {markdown_text(tables.difference_title(table))}",
        "",
        *_markdown_grid([*map(markdown_text, head)], ([*map(markdown_text, row)] for row in rows)),
        "",
        *(f"- {markdown_text(line)}" for line in tables.difference_notes(table)),
        "",
    ]


def table_markdown(table: Table) -> str:
    """A GitHub table, best values bold; below it all metrics where it does not show them, and the differences."""
    lines = [
        f"### {markdown_text(table.preset)}",
        "",
        markdown_text(table.subtitle) + ". " + tables.seeds_note(table),
        "",
    ]
    if table.measured:
        lines += [markdown_text(table.measured) + ".", ""]
    if table.rows:
        heads = [markdown_text(f"{m.title} {tables.arrow(m)} ({tables.unit(table, m)})") for m in table.metrics]
        lines += _markdown_grid(
            ["method", "seeds", *heads],
            (
                [markdown_text(tables.row_name(row)), str(len(row.seeds)), *_markdown_cells(table, row, table.metrics)]
                for row in table.rows
            ),
        )
        lines.append("")
    for line in tables.caveat_lines(table):
        lines += [markdown_text(line), ""]
    if table.unfinished:
        lines += ["Without a result:", "", *(f"- {markdown_text(line)}" for line in table.unfinished), ""]
    if table.warnings:
        lines += ["Mind:", "", *(f"- {markdown_text(line)}" for line in table.warnings), ""]
    if every := table.all_metrics:
        heads = [markdown_text(f"{m.title} {tables.arrow(m)} ({tables.unit(table, m)})") for m in every]
        rows = ([markdown_text(tables.row_name(row)), *_markdown_cells(table, row, every)] for row in table.rows)
        lines += ["#### All metrics of the matrix", "", *_markdown_grid(["method", *heads], rows), ""]
    return "\n".join([*lines, *_markdown_differences(table)])


def render(summary: Summary) -> str:
    """All tables of a summary, by kind, with the ranks over streams, and what was left out."""
    blocks, parts = [], tables.sections(summary)
    for kind, found in parts:
        blocks += [table_markdown(table) for table in found]
        if len(parts) > 1:
            blocks[-len(found)] = f"## {kind.heading}\n\n{blocks[-len(found)]}"
        if lines := tables.ranking_lines(summary, kind):
            blocks.append("\n".join(["### Ranks over streams", "", *(f"- {markdown_text(t)}" for t in lines), ""]))
    if summary.problems:
        blocks.append("\n".join(["### Left out", "", *(f"- {markdown_text(t)}" for t in summary.problems), ""]))
    return "\n".join(blocks)


def images(title: str, links: Iterable[tuple[str, str]], notes: Iterable[str]) -> str:
    """Links (text, place) to the images of a stream, and what lacks."""
    lines = [f"### Images: {markdown_text(title)}", ""]
    lines += [f"- [{markdown_text(text)}]({link})" for text, link in links]
    return "\n".join([*lines, *(f"- {markdown_text(note)}" for note in notes), ""])


def published(blocks: Sequence[Block], level: int = 2) -> str:
    """Published numbers: headings from `level` on, a table per source."""
    lines = []
    for block in blocks:
        lines += ["#" * level + f" {markdown_text(block.title)}", ""]
        if not block.parts:
            lines += [sentence(NONE) + ".", ""]
        for part in block.parts:
            lines += [f"**{markdown_text(part.title)}**", ""]
            lines += [f"- {markdown_text(fact)}" for fact in part.facts]
            lines += ["", "| " + " | ".join(map(markdown_text, part.header)) + " |"]
            lines.append("| --- | --- |" + " ---: |" * (len(part.header) - 3) + " --- |")
            lines += ["| " + " | ".join(map(markdown_text, row)) + " |" for row in part.rows]
            lines += ["", *(f"- {markdown_text(note)}" for note in part.notes), *([""] if part.notes else [])]
    return "\n".join(lines)


def published_section(blocks: Sequence[Block]) -> str:
    """Published numbers below our tables: what they are, then all of them."""
    head = [NOTE, "", *(f"- {line}" for line in legend()), ""] if any(block.parts for block in blocks) else []
    return "\n".join([f"## {TITLE}", "", *map(markdown_text, head), published(blocks, 3)])
