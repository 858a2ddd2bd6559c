r"""Booktabs tables for LaTeX (\usepackage{booktabs})."""

from __future__ import annotations

from collections.abc import Sequence

from dualcl.results import tables
from dualcl.results.published.render import NONE, TITLE, Block
from dualcl.results.record_type import Measure
from dualcl.results.tables import DASH, Row, Summary, Table

_TEX = {
    "\\": r"\textbackslash{}",
    "[": "{[}",  # else an option of the \\\\ before it
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "²": r"\textsuperscript{2}",
    "³": r"\textsuperscript{3}",
    "†": r"$^\dagger$",
    "−": "$-$",
    "±": r"$\pm$",
    **{mark: "\\" + mark for mark in "&%$#_{}"},
}


def tex_text(text: str) -> str:
    """Text that LaTeX shows as it is, on one line."""
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def _head(metric: Measure, shown_unit: str) -> str:
    way = r"$\uparrow$" if metric.higher_is_better else r"$\downarrow$"
    return f"{metric.latex or tex_text(metric.title)} [{tex_text(shown_unit)}] {way}"


def _tex_cells(table: Table, row: Row, metrics: Sequence[Measure]) -> list[str]:
    cells = []
    for metric in metrics:
        text = tables.cell(table, row, metric, r" $\pm$ ").replace(DASH, "--")
        cells.append(rf"\textbf{{{text}}}" if row.label in table.best[metric.key] else text)
    return cells


def _tex_grid(caption: str, align: str, head: Sequence[str], body: Sequence[str], notes: Sequence[str]) -> list[str]:
    return [
        "",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\footnotesize {note}" for note in notes),
        r"\end{table}",
    ]


def _tex_differences(table: Table) -> list[str]:
    """A row per metric and method: a column per metric would not fit a page."""
    found = table.differences
    if found is None or not found.shown:
        return []
    body: list[str] = []
    for metric in tables.difference_metrics(table):
        body += [r"\midrule"] if body else []
        for index, row in enumerate(tables.compared_rows(table)):
            difference = found.by_metric[metric.key][row.label]
            mean, interval, p = tables.difference_parts(difference, metric)
            cells = [tex_text(text).replace("-", "$-$").replace(DASH, "--") for text in (mean, interval, p)]
            first = _head(metric, tables.difference_unit(metric)) if index == 0 else ""
            name, n = tex_text(tables.row_name(row)), str(len(difference.seeds))
            cells[2] += r"\,*" if difference.significant else ""
            body.append(" & ".join([first, name, n, *cells]) + r" \\")
    baseline = tex_text(found.baseline)
    return _tex_grid(
        f"{tex_text(table.preset)}: {tex_text(tables.difference_title(table))}.",
        "llrrrr",
        ["metric", rf"method $-$ {baseline}", "seeds", "difference", "interval", "$p$ (Holm)"],
        body,
        [tex_text(line) for line in tables.difference_notes(table)],
    )


def table_latex(table: Table) -> str:
    r"""Booktabs tables (\usepackage{booktabs}), best values bold; comments: no result, what to mind.

    All metrics follow in a table of their own where the first does not show them, then the differences.
    """
    heads = [_head(m, tables.unit(table, m)) for m in table.metrics]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex_text(table.preset)}: {tex_text(table.subtitle)}. "
        + tex_text(tables.seeds_note(table))
        + (f" {tex_text(table.measured)}." if table.measured else "")
        + "}",
        rf"\begin{{tabular}}{{lr{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(["method", "seeds", *heads]) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = _tex_cells(table, row, table.metrics)
        lines.append(" & ".join([tex_text(tables.row_name(row)), str(len(row.seeds)), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    caveats = [tex_text(line) for line in tables.caveat_lines(table)]
    lines += [*(rf"\par\footnotesize {line}" for line in caveats), r"\end{table}"]
    lines += [f"% without a result: {' '.join(line.split())}" for line in table.unfinished]
    lines += [f"% mind: {' '.join(line.split())}" for line in table.warnings]
    if every := table.all_metrics:
        lines += _tex_grid(
            f"{tex_text(table.preset)}: all metrics of the matrix.",
            "l" + "r" * len(every),
            ["method", *(_head(m, tables.unit(table, m)) for m in every)],
            [
                " & ".join([tex_text(tables.row_name(row)), *_tex_cells(table, row, every)]) + r" \\"
                for row in table.rows
            ],
            caveats,
        )
    return "\n".join([*lines, *_tex_differences(table), ""])


def render(summary: Summary) -> str:
    """All tables of a summary; the ranks over streams and what was left out follow as comments."""
    blocks = []
    for kind, found in tables.sections(summary):
        blocks += [table_latex(table) for table in found]
        blocks += [f"% {' '.join(line.split())}" for line in tables.ranking_lines(summary, kind)]
    blocks += [f"% {' '.join(line.split())}" for line in summary.problems]
    return "\n".join(blocks)


def published(blocks: Sequence[Block]) -> str:
    """Published numbers: a table per source, facts and notes in its caption."""

    def shown(text: str) -> str:
        return tex_text(text).replace("≤", r"$\leq$").replace(DASH, "--")

    lines = []
    for block in blocks:
        if not block.parts:
            lines += [f"% {' '.join(block.title.split())}: {NONE}", ""]
        for part in block.parts:
            caption = ". ".join([f"{TITLE}: {block.title}", part.title, *part.facts, *part.notes])
            align, head = f"ll{'r' * (len(part.header) - 3)}l", [*map(shown, part.header)]
            body = [" & ".join(map(shown, row)) + r" \\" for row in part.rows]
            lines += [*_tex_grid(f"{shown(caption)}.", align, head, body, ())[1:], ""]
    return "\n".join(lines)
