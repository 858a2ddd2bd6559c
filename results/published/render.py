"""Published numbers as blocks of text for `results.writers`: always in tables of their own, one per source.

Nothing here averages, ranks or marks a best value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dualcl.results.published import (
    CONCEPTS,
    SEEN,
    WEIGHTS,
    Group,
    Number,
    definitions,
    groups,
    numbers_beside,
    our_metric,
    stream,
    stream_name,
    streams,
)
from dualcl.results.published.differences import compare_protocol
from dualcl.results.records import Record
from dualcl.results.tables import DASH, Summary

TITLE = "Published (not ours)"
NOTE = (
    "Numbers of other people's code, as their sources print them, in tables of their own: never averaged, ranked or "
    "marked best together with ours. Compare only where nothing of weight differs."
)
NOT_SEEN = "not-seen"
NONE = "no published numbers for this stream"


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


def sentence(text: str) -> str:
    """With a capital at its beginning."""
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
    note = f". {sentence(group.protocol.note)}" if group.protocol.note else ""
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
        numbers = numbers_beside(records[0])
        name = stream_name(numbers[0].benchmark, numbers[0].tasks) if numbers else table.preset
        title = table.preset if name == table.preset else f"{table.preset}: {name}"
        blocks.append(Block(title, _parts(numbers, table.records or records)))
    return blocks


def stream_blocks(name: str | None = None) -> list[Block]:
    """Blocks of all published streams, or of one by its name; UserError when it has none."""
    chosen = streams() if name is None else {name: stream(name)}
    return [Block(_stream_title(key, numbers), _parts(numbers, ())) for key, numbers in chosen.items()]


def _stream_title(name: str, numbers: Sequence[Number]) -> str:
    first = numbers[0]
    if first.scenario in CONCEPTS:
        what = CONCEPTS[first.scenario]
        return f"{name}, {first.scenario}: " + (
            f"{first.tasks} {what}" if first.tasks else f"number of {what} not seen"
        )
    if first.scenario != "class-incremental":
        return f"{name}, {first.scenario}: another benchmark"
    if first.tasks is None:
        return f"{name}, number of tasks not seen"
    return f"{name}: {first.tasks} tasks of {first.classes_per_task} classes"


def legend() -> list[str]:
    """What the marks in the column `seen` mean, and the definitions of metrics."""
    marks = [f"seen {mark}: {text}" for mark, text in SEEN.items()]
    return marks + [f"{d.applies_to}, {d.definition}: {d.what}" for d in definitions().values()]


def overview() -> list[list[str]]:
    """One row per published stream: its name, how many numbers, and from which protocols."""
    rows = []
    for name, numbers in streams().items():
        found = list(dict.fromkeys(group.protocol.protocol for group in groups(numbers)))
        what = "" if numbers[0].scenario == "class-incremental" else f"{numbers[0].scenario}; "
        rows.append([name, f"{len(numbers)} numbers", f"{what}protocols: {', '.join(found)}"])
    return rows
