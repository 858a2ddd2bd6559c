"""Plain numbers as CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from dualcl.results.files import csv_cell
from dualcl.results.published import Number, groups, numbers_beside, our_metric
from dualcl.results.published.differences import compare_protocol
from dualcl.results.records import Record, run_row
from dualcl.results.tables import Summary, Table


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file of these rows, with text that no spreadsheet runs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow([round(v, 9) if isinstance(v, float) else csv_cell(v) for v in row])
    return out.getvalue()


def render(summary: Summary) -> str:
    """One row per stream and method: mean, std, n of every measure, in s and MiB; empty where undefined.

    `mixed`, where runs that do not compare were put together on request: what differs.
    """
    keys = list(dict.fromkeys(key for table in summary.tables for row in table.rows for key in row.stats))
    header = ["preset", "method", "joint", "seeds"]
    header += [f"{key}_{part}" for key in keys for part in ("mean", "std", "n")]
    caveats = any(row.caveats for table in summary.tables for row in table.rows)
    header += ["caveats"] * caveats
    mixed = any(table.mixed for table in summary.tables)
    header += ["mixed"] * mixed
    lines: list[list[Any]] = []
    for table in summary.tables:
        for row in table.rows:
            line: list[Any] = [table.preset, row.label, row.joint, len(row.seeds)]
            for key in keys:
                stat = row.stats.get(key)
                line += [stat.mean, stat.std, stat.n] if stat else [None, None, 0]
            lines.append(line + ["; ".join(row.caveats)] * caveats + ["; ".join(table.mixed)] * mixed)
    return csv_text(header, lines)


def differences(tables: Sequence[Table]) -> str:
    """Plain numbers of all paired differences, not rounded: one row per stream, metric and method; empty if undefined.

    `low` and `high` bound the interval of the level in `interval_level`, which Holm's procedure decides; `comparisons`
    counts the family that p_holm is corrected for (see `statistics.compare`).
    """
    header = ["preset", "metric", "baseline", "method", "joint", "seeds", "n", "method_mean", "baseline_mean"]
    header += ["difference", "std", "low", "high", "interval_level", "p", "p_holm", "comparisons", "confidence"]
    header += ["significant", "caveats"]
    lines: list[list[Any]] = []
    for table in tables:
        rows = {row.label: row for row in table.rows}
        for metric, found in table.differences.by_metric.items() if table.differences else ():
            assert table.differences is not None
            family = sum(len(d.seeds) > 1 for d in found.values())
            for label, d in found.items():
                numbers = [d.method_mean, d.baseline_mean, d.mean, d.std, d.low, d.high, d.level, d.p, d.p_holm]
                exact = [None if number is None else repr(float(number)) for number in numbers]
                seeds = " ".join(map(str, d.seeds))
                line = [table.preset, metric, table.differences.baseline, label, rows[label].joint, seeds, len(d.seeds)]
                line += [*exact, family, repr(table.differences.confidence)]
                tested = None if d.p_holm is None else d.significant
                lines.append([*line, tested, "; ".join(rows[label].caveats)])
    return csv_text(header, lines)


def runs(records: Sequence[Record]) -> str:
    """Plain numbers: one row per run, finished or not, with every metric and where it comes from."""
    rows = [run_row(record) for record in records]
    header = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text(header, ([row.get(key) for key in header] for row in rows))


def published(summary: Summary) -> str:
    """Published numbers beside the tables of a report, one row each, with what differs from ours."""
    names = [f.name for f in fields(Number)]
    rows = []
    for table in summary.tables:
        records = [r for r in summary.records if r.table == table.preset and r.kind is table.kind]
        for group in groups(numbers_beside(records[0])):
            found = compare_protocol(group, table.records or records)
            differs = "; ".join(f"{what} {theirs}, ours {ours}" for what, theirs, ours in found.differs)
            for n in group.numbers:
                cells = [getattr(n, name) for name in names]
                cells = [";".join(f"{k}={v}" for k, v in c.items()) if isinstance(c, dict) else c for c in cells]
                rows.append([table.preset, *cells, our_metric(n), differs, ", ".join(found.unseen)])
    return csv_text(["preset", *names, "our_metric", "differs", "not_seen_there"], rows)
