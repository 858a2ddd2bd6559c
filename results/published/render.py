"""Published numbers as text, Markdown, LaTeX, HTML and CSV: always in tables of their own, one per source.

Nothing here averages, ranks or marks a best value.
"""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from dualcl.results.published import (
    BENCHMARKS,
    SEEN,
    WEIGHTS,
    Group,
    Number,
    definitions,
    groups,
    numbers_for,
    our_metric,
    published_numbers,
    stream_name,
    streams,
)
from dualcl.results.published.differences import compare_protocol
from dualcl.results.records import Record
from dualcl.results.tables import Summary, csv_text, markdown_text

TITLE = "Published (not ours)"
NOTE = (
    "Numbers of other people's code, as their sources print them, in tables of their own: never averaged, ranked or "
    "marked best together with ours. Compare only where nothing of weight differs."
)
NOT_SEEN = "not-seen"
NONE = "no published numbers for this stream"
DASH = "–"


@dataclass(frozen=True)
class Part:
    """One source under one protocol: facts about it and its rows as text."""

    title: str
    facts: list[str]
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


@dataclass(frozen=True)
class Block:
    """The published numbers beside one stream; no parts where there are none."""

    title: str
    parts: list[Part]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _seen(group: Group) -> list[str]:
    words = dict.fromkeys((n.seen, n.seen_words) for n in group.numbers)
    return [f"{text} ({mark})" for mark, text in words]


def _training(group: Group) -> str:
    p = group.protocol
    others: dict[str, list[str]] = {}
    for name, rate in p.lr_methods.items():
        others.setdefault(rate, []).append(name)
    parts = [
        p.title,
        p.backbone,
        p.optimizer,
        f"learning rate {p.lr}" if p.lr else "",
        *(f"{rate} for {' and '.join(names)}" for rate, names in others.items()),
        f"batch {p.batch_size}" if p.batch_size else "",
        f"{p.epochs} epochs" if p.epochs else "",
        f"schedule {p.schedule}" if p.schedule else "",
        f"class order {p.class_order}" if p.class_order else "",
        f"preprocessing {p.preprocess}" if p.preprocess else "",
    ]
    return ", ".join(part for part in parts if part)


def _metrics(group: Group) -> str:
    parts = []
    for metric, name in group.metrics:
        ours = our_metric(next(n for n in group.numbers if (n.metric, n.metric_definition) == (metric, name)))
        shown = "definition not seen" if name == NOT_SEEN else f"{name}, {f'our {ours}' if ours else 'none of ours'}"
        parts.append(f"{metric} ({shown})")
    return ", ".join(parts)


def _facts(group: Group) -> list[str]:
    weights = f'"{group.weights}"' if group.weights else "not seen"
    if group.weights_reading:
        weights += f", probably {WEIGHTS[group.weights_reading]}"
    note = f". {_sentence(group.protocol.note)}" if group.protocol.note else ""
    return [
        f"Protocol {group.protocol.protocol}: {_training(group)}{note}",
        f"Weights: {weights}",
        f"Metrics: {_metrics(group)}",
        f"Seen: {'; '.join(_seen(group))}",
    ]


def _variant(number: Number) -> str:
    shown = ", ".join(f"{key}={value}" for key, value in number.settings.items())
    return f"{number.dualcl_method} ({shown})" if shown else number.dualcl_method


def _seeds(records: Sequence[Record]) -> str:
    """How many seeds our methods have."""
    counts = Counter(record.label for record in records)
    few, many = min(counts.values()), max(counts.values())
    return f"{few}" if few == many else f"{few} to {many}"


def _part(group: Group, records: Sequence[Record]) -> Part:
    header = ["method", "our name", *(metric for metric, _ in group.metrics), "runs", "seen"]
    rows: list[list[str]] = []
    notes: dict[str, list[str]] = {}
    for method in group.methods:
        numbers = [n for n in group.numbers if n.method == method]
        cells = {(n.metric, n.metric_definition): n.text for n in numbers}
        runs = dict.fromkeys(str(n.runs) if n.runs else DASH for n in numbers)
        marks = dict.fromkeys(n.seen for n in numbers)
        rows.append(
            [
                method,
                _variant(numbers[0]) or DASH,
                *(cells.get(key, DASH) for key in group.metrics),
                "/".join(runs),
                "/".join(marks),
            ]
        )
        for note in dict.fromkeys(n.note for n in numbers if n.note):
            notes.setdefault(note, []).append(method)
    facts = _facts(group)
    if records:
        facts += compare_protocol(group, records).lines
        facts.append(f"Seeds of ours: {_seeds(records)}")
    return Part(group.source, facts, header, rows, [f"{', '.join(names)}: {note}" for note, names in notes.items()])


def _parts(numbers: Sequence[Number], records: Sequence[Record]) -> list[Part]:
    return [_part(group, records) for group in groups(numbers)]


def blocks_for(summary: Summary) -> list[Block]:
    """One block per table of a report."""
    blocks = []
    for table in summary.tables:
        records = [r for r in summary.records if r.table == table.preset and r.kind is table.kind]
        numbers = numbers_for(str(records[0].data["identity"].get("data")), records[0].n_tasks)
        name = stream_name(numbers[0].benchmark, numbers[0].tasks) if numbers else table.preset
        title = table.preset if name == table.preset else f"{table.preset}: {name}"
        blocks.append(Block(title, _parts(numbers, table.records or records)))
    return blocks


def stream_blocks(name: str | None = None) -> list[Block]:
    """Blocks of all published streams, or of one by its name; UserError when it has none."""
    from dualcl.results.published import stream

    chosen = streams() if name is None else {name: stream(name)}
    return [Block(_stream_title(key, numbers), _parts(numbers, ())) for key, numbers in chosen.items()]


def _stream_title(name: str, numbers: Sequence[Number]) -> str:
    first = numbers[0]
    if first.scenario != "class-incremental":
        return f"{name}, {first.scenario}: another benchmark"
    if first.tasks is None:
        return f"{name}, number of tasks not seen"
    return f"{name}: {first.tasks} tasks of {first.classes_per_task} classes"


# --- forms ------------------------------------------------------------------------------------------------------------


def legend() -> list[str]:
    """What the marks in the column `seen` mean, and the definitions of metrics."""
    marks = [f"seen {mark}: {text}" for mark, text in SEEN.items()]
    return marks + [f"{d.applies_to}, {d.definition}: {d.what}" for d in definitions().values()]


def to_markdown(blocks: Sequence[Block], level: int = 2) -> str:
    """Headings from `level` on, a GitHub table per source."""
    lines = []
    for block in blocks:
        lines += ["#" * level + f" {markdown_text(block.title)}", ""]
        if not block.parts:
            lines += [_sentence(NONE) + ".", ""]
        for part in block.parts:
            lines += [f"**{markdown_text(part.title)}**", ""]
            lines += [f"- {markdown_text(fact)}" for fact in part.facts]
            lines += ["", "| " + " | ".join(map(markdown_text, part.header)) + " |"]
            lines.append("| --- | --- |" + " ---: |" * (len(part.header) - 3) + " --- |")
            lines += ["| " + " | ".join(map(markdown_text, row)) + " |" for row in part.rows]
            lines += ["", *(f"- {markdown_text(note)}" for note in part.notes), *([""] if part.notes else [])]
    return "\n".join(lines)


_ASCII = {"±": "+-", DASH: "-"}


def to_text(blocks: Sequence[Block], *, ascii_only: bool = False, width: int | None = None) -> str:
    """Aligned tables for a terminal; lines of prose are wrapped to `width`."""
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
    text = "\n".join(lines)
    if ascii_only:
        for mark, plain in _ASCII.items():
            text = text.replace(mark, plain)
        text = text.encode("ascii", "replace").decode()
    return text


def to_latex(blocks: Sequence[Block], escape: Callable[[str], str]) -> str:
    r"""A booktabs table per source, facts and notes in its caption; `escape` makes text safe for LaTeX."""

    def shown(text: str) -> str:
        return escape(text).replace("±", r"$\pm$").replace(DASH, "--").replace("≤", r"$\leq$")

    lines = []
    for block in blocks:
        if not block.parts:
            lines += [f"% {' '.join(block.title.split())}: {NONE}", ""]
        for part in block.parts:
            caption = ". ".join([f"{TITLE}: {block.title}", part.title, *part.facts, *part.notes])
            lines += [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{shown(caption)}.}}",
                rf"\begin{{tabular}}{{ll{'r' * (len(part.header) - 3)}l}}",
                r"\toprule",
                " & ".join(map(shown, part.header)) + r" \\",
                r"\midrule",
                *(" & ".join(map(shown, row)) + r" \\" for row in part.rows),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
    return "\n".join(lines)


def to_html(blocks: Sequence[Block]) -> str:
    """A section of a page: the note, and a table per source."""

    def e(text: str) -> str:
        return html.escape(text, quote=True)

    out = [f'<section id="published"><h2>{e(TITLE)}</h2>']
    if any(block.parts for block in blocks):
        marks = "".join(f"<li>{e(line)}</li>" for line in legend())
        out.append(f"<p>{e(NOTE)}</p><details><summary>Marks and metrics</summary><ul>{marks}</ul></details>")
    for block in blocks:
        out.append(f"<h3>{e(block.title)}</h3>")
        if not block.parts:
            out.append(f"<p>{e(_sentence(NONE))}.</p>")
        for part in block.parts:
            out.append(f"<h4>{e(part.title)}</h4><ul>{''.join(f'<li>{e(f)}</li>' for f in part.facts)}</ul>")
            heads = "".join(f'<th scope="col">{e(text)}</th>' for text in part.header)
            body = "".join(f"<tr>{''.join(f'<td>{e(c)}</td>' for c in row)}</tr>" for row in part.rows)
            out.append(f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>')
            if part.notes:
                out.append(f"<ul>{''.join(f'<li>{e(note)}</li>' for note in part.notes)}</ul>")
    return "\n".join([*out, "</section>"])


def to_csv(summary: Summary) -> str:
    """Published numbers beside the tables of a report, one row each, with what differs from ours."""
    names = [f.name for f in fields(Number)]
    rows = []
    for table in summary.tables:
        records = [r for r in summary.records if r.table == table.preset and r.kind is table.kind]
        for group in groups(numbers_for(str(records[0].data["identity"].get("data")), records[0].n_tasks)):
            found = compare_protocol(group, table.records or records)
            differs = "; ".join(f"{what} {theirs}, ours {ours}" for what, theirs, ours in found.differs)
            for n in group.numbers:
                cells = [getattr(n, name) for name in names]
                cells = [";".join(f"{k}={v}" for k, v in c.items()) if isinstance(c, dict) else c for c in cells]
                rows.append([table.preset, *cells, our_metric(n), differs, ", ".join(found.unseen)])
    return csv_text(["preset", *names, "our_metric", "differs", "not_seen_there"], rows)


def stream_text(name: str, *, ascii_only: bool = False, width: int | None = None) -> str:
    """One published stream for a terminal; UserError when it has no numbers."""
    text = to_text(stream_blocks(name), ascii_only=ascii_only, width=width)
    return "\n".join([text, *legend(), ""])


def section_markdown(summary: Summary) -> str:
    """The part of table.md below our tables."""
    blocks = blocks_for(summary)
    head = [NOTE, "", *(f"- {line}" for line in legend()), ""] if any(block.parts for block in blocks) else []
    return "\n".join([f"## {TITLE}", "", *map(markdown_text, head), to_markdown(blocks, 3)])


def section_text(summary: Summary, *, ascii_only: bool = False, width: int | None = None) -> str:
    """The part of the terminal's output below our tables."""
    blocks = blocks_for(summary)
    head = [f"{TITLE}. {NOTE}", *legend(), ""] if any(block.parts for block in blocks) else [TITLE]
    if width:
        head = [line for text in head for line in textwrap.wrap(text, width, subsequent_indent="  ") or [""]]
    return "\n".join([*head, to_text(blocks, ascii_only=ascii_only, width=width)])


def overview() -> list[list[str]]:
    """One row per published stream: its name, how many numbers, and from which protocols."""
    rows = []
    for name, numbers in streams().items():
        found = list(dict.fromkeys(group.protocol.protocol for group in groups(numbers)))
        what = "domain-incremental; " if numbers[0].scenario == "domain-incremental" else ""
        rows.append([name, f"{len(numbers)} numbers", f"{what}protocols: {', '.join(found)}"])
    return rows


_README = """\
# Published numbers

Reference numbers of other people's code, each with its source. They never share a column, an average or a ranking with
ours: `dualcl report DIR --with-published` shows them in a section of their own and says what differs;
`dualcl list published` lists the streams, `dualcl list published {example}` shows one.

**One CSV file per benchmark**, because a reader asks "what is reported on this stream", and most sources report on
several methods of one stream; the source is a column. `protocols.csv` says how a source trained, one row per protocol
and benchmark; `definitions.csv` what a metric means, and which of ours means the same.

| column | meaning |
| --- | --- |
| `method` | the source's name of it |
| `dualcl_method`, `settings` | our method of that name, if any; settings of ours that the row stands for |
| `metric`, `metric_definition` | name, and definition as a key into `definitions.csv`; `not-seen` says what it says |
| `value`, `std`, `runs` | as printed; empty where not seen |
| `weights`, `weights_reading` | the source's words, and what they probably mean |
| `protocol` | a key into `protocols.csv` |
| `seen`, `seen_words` | {seen} |

Rules: only cells with a source. What nobody saw stays empty, and is not filled in from memory: the tables of the papers
C-LoRA (2304.06027), STAMINA (2311.18763), Mining Your Own Secrets (2410.00700) and DualLoRA (2411.00623) were not
seen, so their own numbers do not appear (the C-LoRA rows below are other authors' runs of it), and there are none for
customization.

Left out on purpose: VQ-Prompt's CIFAR-100 rows of DualPrompt and CODA-P (identical to its CUB-200 rows: a copying
slip) and of FT (doubtful); a method of 2025 that is also called C-LoRA (arXiv 2502.17920); rows that repeat a number of
the same source elsewhere.

Before comparing:

- "ImageNet-1K" in papers of this family very likely means ImageNet-21k weights fine-tuned on ImageNet-1k; tables with
  IN21K weights are another setting.
- Accuracy after the last task is a mean over tasks in some sources and over all test images in others; ImageNet-R's and
  DomainNet's classes are unequal, so these differ.
- Forgetting has several incompatible definitions; values under different ones do not compare.
- Domain-incremental DomainNet is another benchmark, with a name of its own here (`domainnet-domains`).
- L2P stands for different implementations; ours, `l2p`, is L2P++.

Below: everything, per stream and source, in the source's order. Written by `dualcl.results.published.render.readme`.
Marks and metrics:

{legend}

{tables}"""


def readme() -> str:
    """README.md of this folder: how to read the files, and all of them rendered."""
    count = {b: sum(n.benchmark == b for n in published_numbers()) for b in BENCHMARKS}
    numbers = (
        "Numbers: " + ", ".join(f"{name} {n}" for name, n in count.items()) + f"; {sum(count.values())} in all.\n\n"
    )
    seen = "; ".join(f"**{mark}** {text}" for mark, text in SEEN.items())
    example = next(iter(streams()))
    marks = "\n".join(f"- {markdown_text(line)}" for line in legend())
    tables = numbers + to_markdown(stream_blocks())
    return _README.format(example=example, seen=seen, legend=marks, tables=tables).rstrip() + "\n"
