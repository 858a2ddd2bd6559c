"""Tables over methods and seeds: which runs may share one, mean and standard deviation, and five ways to write it."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualcl.benchmark.errors import UserError, nearest
from dualcl.results.metrics import COST, KINDS, METRICS, MatrixKind, Metric
from dualcl.results.records import Record, comparable, run_row, scan_records

FORMATS = ("text", "md", "csv", "tex")
DASH = "–"
#: fewer seeds than this and a standard deviation says little
FEW_SEEDS = 3

#: identity that may differ between seeds, yet must agree between methods at the same seed
PER_SEED = frozenset({"class_order", "class_order_hash", "order_seed"})
#: last parts of configuration keys that differ between seeds or machines, and do not make another variant of a method
_FREE_CONFIG = PER_SEED | {
    "seed",
    "device",
    "threads",
    "checkpoint_seconds",
    "log_every",
    "workers",
    "cache_mib",
    "root",
}


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation (ddof = 1; None for one seed) over the `n` seeds where a metric is defined."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """One method: its finished runs, one per seed, and a Stat per metric (None where undefined)."""

    label: str
    joint: bool
    seeds: tuple[int, ...]
    stats: dict[str, Stat | None]


@dataclass(frozen=True)
class Table:
    """One data stream: rows of methods, best metrics, and the runs that have no result."""

    preset: str
    subtitle: str
    #: how generated images were measured, "" where nothing is generated
    measured: str
    kind: MatrixKind
    rows: list[Row]
    #: metric -> labels of the rows that share the best displayed mean
    best: dict[str, frozenset[str]]
    unfinished: list[str]
    warnings: list[str]
    #: the finished runs behind the rows
    records: list[Record]

    @property
    def metrics(self) -> list[Metric]:
        """The metrics shown, in order."""
        return [METRICS[key] for key in (*self.kind.columns, *COST)]


@dataclass(frozen=True)
class Summary:
    """Everything found below some directories: a table per stream, all records, warnings that concern no one table."""

    tables: list[Table]
    records: list[Record]
    problems: list[str]

    @property
    def warnings(self) -> list[str]:
        """All warnings, those of a table with its preset in front."""
        return [*self.problems, *(f"{t.preset}: {w}" for t in self.tables for w in t.warnings)]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, leaf in value.items():
        if isinstance(leaf, Mapping) and leaf:
            yield from _flat(leaf, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", leaf


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _name(record: Record) -> str:
    return f"{record.label} seed {record.seed}"


def _identity_conflicts(records: Sequence[Record]) -> list[str]:
    """One line per identity key on which runs disagree that would share a table."""
    conflicts: dict[str, str] = {}
    first: dict[tuple[str, int | None], tuple[Any, Record]] = {}
    flat = [
        (r, dict(_flat({**r.data["identity"], "n_tasks": r.n_tasks, "matrix": r.data["matrix"]["kind"]})))
        for r in records
    ]
    for key in dict.fromkeys(k for _, identity in flat for k in identity):
        for record, identity in flat:
            # weights drawn from the seed differ between seeds
            drawn = key == "weights_sha256" and identity.get("weights") == "random"
            per_seed = drawn or key.split(".")[-1] in PER_SEED
            value = identity.get(key)
            known, other = first.setdefault((key, record.seed if per_seed else None), (value, record))
            if known != value:
                conflicts.setdefault(
                    key, f"{key} is {_short(known)} in {_name(other)} and {_short(value)} in {_name(record)}"
                )
    return list(conflicts.values())


def tell_apart(records: Sequence[Record]) -> list[Record]:
    """The records of a stream; where one label stands for several settings (a sweep), the label names them."""
    groups: dict[str, list[tuple[Record, dict[str, Any]]]] = {}
    for record in records:
        flat = {k: v for k, v in _flat(record.data["config"]) if k.split(".")[-1] not in _FREE_CONFIG}
        groups.setdefault(record.label, []).append((record, flat))
    out = []
    for label, group in groups.items():
        keys = dict.fromkeys(key for _, flat in group for key in flat)
        varied = [k for k in keys if any(flat.get(k) != group[0][1].get(k) for _, flat in group)]
        for record, flat in group:
            settings = ", ".join(f"{k.removeprefix('method.')}={flat.get(k)}" for k in varied)
            run = {**record.data["run"], "label": f"{label} ({settings})" if settings else label}
            out.append(Record(record.path, {**record.data, "run": run}))
    return out


def _without_copies(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """One record per (label, seed); UserError when two differ, a warning when they are copies."""
    kept: dict[tuple[str, int], Record] = {}
    warnings = []
    for record in records:
        earlier = kept.setdefault((record.label, record.seed), record)
        if earlier is record:
            continue
        if comparable(earlier) != comparable(record):
            raise UserError(
                f"{_name(record)} on {record.table} is there twice with different results: "
                f"{earlier.directory} and {record.directory}; report only one of the two directories"
            )
        warnings.append(f"{_name(record)} is there twice, with equal results; {record.directory} is left out")
    return list(kept.values()), warnings


def _stat(values: Sequence[float | None]) -> Stat | None:
    known = [v for v in values if v is not None]
    if not known:
        return None
    return Stat(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def _scale(rows: Sequence[Row], metric: Metric) -> tuple[float, str, int]:
    """Divisor, unit and decimals of a column: seconds become minutes or hours when the longest run needs it."""
    if metric.key != "time_s":
        return 1.0, metric.unit, metric.decimals
    longest = max((stat.mean for row in rows if (stat := row.stats.get("time_s"))), default=0.0)
    if longest < 120:
        return 1.0, "s", 1
    return (60.0, "min", 1) if longest < 7200 else (3600.0, "h", 2)


def _best(rows: Sequence[Row], metric: Metric) -> frozenset[str]:
    by, _, decimals = _scale(rows, metric)
    shown = {
        row.label: round(stat.mean / by, decimals)
        for row in rows
        if not row.joint and (stat := row.stats.get(metric.key))
    }
    if len(set(shown.values())) < 2:
        return frozenset()  # nothing to tell apart
    best = max(shown.values()) if metric.higher_is_better else min(shown.values())
    return frozenset(label for label, value in shown.items() if value == best)


def _values(records: Sequence[Record], key: str) -> list[str]:
    return sorted({str(v) for r in records if (v := (r.data.get("environment") or {}).get(key)) is not None})


def _warnings(records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
    lines = []
    few = [f"{row.label} ({len(row.seeds)})" for row in rows if len(row.seeds) < FEW_SEEDS]
    if few:
        lines.append(f"fewer than {FEW_SEEDS} seeds, differences may be chance: {', '.join(few)}")
    if len({row.seeds for row in rows}) > 1:
        seeds = "; ".join(f"{row.label}: {', '.join(map(str, row.seeds))}" for row in rows)
        lines.append(f"not the same seeds for every method ({seeds})")
    skipped = sorted({str(i) for r in records for i in r.data["network"].get("skipped_images") or []})
    if skipped:
        shown = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        lines.append(f"unreadable images were left out ({len(skipped)}): {shown}")
    for key, what in {"dualcl": "versions of dualcl", "commit": "commits", "torch": "versions of torch"}.items():
        if len(values := _values(records, key)) > 1:
            lines.append(f"mixed {what}: {', '.join(v[:12] for v in values)}")
    if any(r.data["identity"].get("weights") == "random" for r in records):
        lines.append("the backbone is not pretrained: its weights are random")
    if len(devices := _values(records, "device")) > 1:
        lines.append(f"mixed devices, time and memory do not compare: {', '.join(devices)}")
    if dirty := sum(bool((r.data.get("environment") or {}).get("dirty")) for r in records):
        lines.append(f"{dirty} of {len(records)} runs came from a working tree with uncommitted changes")
    return lines


def _subtitle(record: Record) -> str:
    identity = record.data["identity"]
    parts = [_count(record.n_tasks, record.kind.item)]
    parts += [f"{k.split('_')[0]} {identity[k]}" for k in ("data", "split_name", "backbone") if identity.get(k)]
    return ", ".join(parts)


def _count(n: int, item: str) -> str:
    return f"{n} {item}{'' if n == 1 else 's'}"


#: formulas of kernels, on features a and b
_KERNELS = {"poly2": "(a·b + 1)²"}


def _measured(records: Sequence[Record]) -> str:
    """Kernel, estimator, features, counts and sampling of records with generated images, in one line."""
    identity = records[0].data["identity"]
    sampling = identity.get("eval") if isinstance(identity.get("eval"), Mapping) else None
    parts = []
    if identity.get("kernel"):
        estimator = f", {identity['estimator']} estimator" if identity.get("estimator") else ""
        formula = f" {_KERNELS[str(identity['kernel'])]}" if str(identity["kernel"]) in _KERNELS else ""
        parts.append(f"squared MMD with kernel {identity['kernel']}{formula}{estimator}")
    if identity.get("features"):
        digest = f" (sha256 {str(identity['features_sha256'])[:12]})" if identity.get("features_sha256") else ""
        parts.append(f"features of {identity['features']}{digest}")
    if sampling and sampling.get("n"):
        how = [f"{sampling['steps']} steps" if sampling.get("steps") else "", str(sampling.get("scheduler") or "")]
        how += [f"guidance {sampling['guidance']:g}" if isinstance(sampling.get("guidance"), (int, float)) else ""]
        shown = ", ".join(part for part in how if part)
        parts.append(f"{sampling['n']} generated images per concept" + f" ({shown})" * bool(shown))
        counts = [t["n_train"] for r in records for t in r.data["tasks"] if isinstance(t.get("n_train"), int)]
        if counts:
            span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
            parts.append(f"{span} real ones")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def make_table(records: Sequence[Record], *, allow_mixed: bool = False) -> Table:
    """The table of one data stream (records of one preset and its ablations, at least one; see `tell_apart`).

    Raises UserError when finished runs differ in what must agree, unless `allow_mixed`.
    """
    preset = records[0].table
    finished, warnings = _without_copies([r for r in records if r.finished])
    conflicts = _identity_conflicts(finished)
    if conflicts and not allow_mixed:
        more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
        raise UserError(
            f"runs on {preset} do not compare: {conflicts[0]}{more}; report them apart, or add --allow-mixed"
        )
    warnings += [f"mixed on request: {line}" for line in conflicts]
    kind = (finished or list(records))[0].kind
    groups: dict[str, list[Record]] = {}
    for record in sorted(finished, key=lambda r: (r.joint, r.label, r.seed)):
        groups.setdefault(record.label, []).append(record)
    keys = dict.fromkeys(key for record in finished for key in record.metrics)
    rows = [
        Row(
            label,
            any(r.joint for r in group),
            tuple(r.seed for r in group),
            {key: _stat([r.metrics.get(key) for r in group]) for key in keys},
        )
        for label, group in groups.items()
    ]
    unfinished = [
        f"{_name(r)}: {r.status}, {len(r.data['matrix']['rows'])} of {_count(r.n_tasks, r.kind.item)} evaluated"
        + (f" ({r.data['error']})" if r.data.get("error") else "")
        for r in records
        if not r.finished
    ]
    return Table(
        preset,
        _subtitle((finished or list(records))[0]),
        _measured(finished or list(records)),
        kind,
        rows,
        {key: _best(rows, METRICS[key]) for key in keys},
        unfinished,
        warnings + _warnings(finished, rows),
        finished,
    )


def summarise(dirs: Iterable[str | os.PathLike[str]], *, allow_mixed: bool = False) -> Summary:
    """Tables of all streams below `dirs`; unreadable records become warnings.

    Raises UserError when there is no readable record, or when runs may not share a table.
    """
    places = [os.fspath(d) for d in dirs]
    records, problems = scan_records(places)
    if not records:
        why = f"; {problems[0]}" if problems else "; give the directory that `dualcl run` or `compare` wrote"
        raise UserError(f"nothing to report: no record.json below {', '.join(places) or 'no directory'}{why}")
    streams: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        place = list(KINDS).index(record.data["matrix"]["kind"])
        streams.setdefault((place, record.table), []).append(record)
    ordered = [tell_apart(streams[key]) for key in sorted(streams)]
    tables = [make_table(stream, allow_mixed=allow_mixed) for stream in ordered]
    return Summary(tables, [r for stream in ordered for r in stream], [f"left out: {p}" for p in problems])


def sections(summary: Summary) -> list[tuple[MatrixKind, list[Table]]]:
    """The tables by kind: what a report with both domains keeps apart."""
    kinds = [(kind, [t for t in summary.tables if t.kind is kind]) for kind in KINDS.values()]
    return [(kind, tables) for kind, tables in kinds if tables]


def arrow(metric: Metric) -> str:
    """Which way is better."""
    return "↑" if metric.higher_is_better else "↓"


def cell(table: Table, row: Row, metric: Metric, plus_minus: str = " ± ") -> str:
    """A cell as text: mean, with the standard deviation where there is more than one seed; a dash when undefined."""
    stat = row.stats.get(metric.key)
    if stat is None:
        return DASH
    by, _, decimals = _scale(table.rows, metric)
    text = f"{stat.mean / by:.{decimals}f}"
    if stat.std is None or (metric.exact and stat.std == 0):
        return text
    return f"{text}{plus_minus}{stat.std / by:.{decimals}f}"


def unit(table: Table, metric: Metric) -> str:
    """The unit that a column of the table is shown in."""
    return _scale(table.rows, metric)[1]


def row_name(row: Row) -> str:
    """A row's label, with joint training marked as the upper bound that it is."""
    return f"{row.label} (upper bound)" if row.joint else row.label


def seeds_note(table: Table) -> str:
    """What the numbers are: over how many seeds, and which is bold."""
    counts = sorted({len(row.seeds) for row in table.rows})
    if not counts:
        return "No finished run yet."
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts[-1] == 1:
        return "One seed, so no standard deviation."
    return f"Mean ± standard deviation (ddof = 1) over {span} seeds."


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    out = text.replace("\\", "\\\\")
    for mark in "|*_<>`[]":
        out = out.replace(mark, "\\" + mark)
    return " ".join(out.split())


def to_markdown(table: Table) -> str:
    """A GitHub table, best values bold."""
    lines = [f"### {markdown_text(table.preset)}", "", markdown_text(table.subtitle) + ". " + seeds_note(table), ""]
    if table.measured:
        lines += [markdown_text(table.measured) + ".", ""]
    if table.rows:
        heads = [f"{markdown_text(m.title)} {arrow(m)} ({unit(table, m)})" for m in table.metrics]
        lines += [
            "| " + " | ".join(["method", "seeds", *heads]) + " |",
            "| " + " | ".join(["---", *["---:"] * (len(heads) + 1)]) + " |",
        ]
        for row in table.rows:
            cells = [cell(table, row, m) for m in table.metrics]
            cells = [
                f"**{c}**" if row.label in table.best[m.key] else c for c, m in zip(cells, table.metrics, strict=True)
            ]
            lines.append("| " + " | ".join([markdown_text(row_name(row)), str(len(row.seeds)), *cells]) + " |")
        lines.append("")
    if table.unfinished:
        lines += ["Without a result:", "", *(f"- {markdown_text(line)}" for line in table.unfinished), ""]
    if table.warnings:
        lines += ["Mind:", "", *(f"- {markdown_text(line)}" for line in table.warnings), ""]
    return "\n".join(lines)


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "²": r"\textsuperscript{2}",
    "³": r"\textsuperscript{3}",
    **{mark: "\\" + mark for mark in "&%$#_{}"},
}


def _tex_text(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def to_latex(table: Table) -> str:
    r"""A booktabs table (\usepackage{booktabs}), best values bold; what has no result follows as a comment."""
    heads = []
    for metric in table.metrics:
        way = r"$\uparrow$" if metric.higher_is_better else r"$\downarrow$"
        heads.append(f"{metric.latex} [{_tex_text(unit(table, metric))}] {way}")
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex_text(table.preset)}: {_tex_text(table.subtitle)}. "
        + _tex_text(seeds_note(table)).replace("±", r"$\pm$")
        + (f" {_tex_text(table.measured)}." if table.measured else "")
        + "}",
        rf"\begin{{tabular}}{{lr{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(["method", "seeds", *heads]) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = []
        for metric in table.metrics:
            text = cell(table, row, metric, r" $\pm$ ").replace(DASH, "--")
            cells.append(rf"\textbf{{{text}}}" if row.label in table.best[metric.key] else text)
        lines.append(" & ".join([_tex_text(row_name(row)), str(len(row.seeds)), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    lines += [f"% without a result: {' '.join(line.split())}" for line in table.unfinished]
    return "\n".join([*lines, ""])


_ASCII = {"±": "+-", "↑": "^", "↓": "v", "×": "x", "·": ".", "²": "^2", "³": "^3", DASH: "-"}


def _blocks(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Columns in blocks that fit `width`; every block begins with column 0, and has at least one more."""
    blocks: list[list[int]] = [[0]]
    for index in range(1, len(widths)):
        used = sum(widths[i] + 1 for i in blocks[-1]) + widths[index]
        if width is not None and used > width and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(index)
    return blocks


def to_text(table: Table, *, ascii_only: bool = False, width: int | None = None) -> str:
    """An aligned table for a terminal, in blocks of columns that fit `width`; the best of a column ends in `*`."""

    def plain(text: str) -> str:
        if not ascii_only:
            return text
        for mark, ascii_mark in _ASCII.items():
            text = text.replace(mark, ascii_mark)
        return text.encode("ascii", "replace").decode()

    grid = [
        ["method", "seeds", *(f"{m.title} {arrow(m)} " for m in table.metrics)],
        ["", "", *(f"{unit(table, m)} " for m in table.metrics)],
    ]
    for row in table.rows:
        # a blank in the place of the star keeps the digits of a column under each other
        cells = [cell(table, row, m) + ("*" if row.label in table.best[m.key] else " ") for m in table.metrics]
        grid.append([row_name(row), str(len(row.seeds)), *cells])
    grid = [[plain(text) for text in line] for line in grid]
    lines = [f"{table.preset}: {table.subtitle}", *([table.measured] if table.measured else []), ""]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    for block in _blocks(widths, width) if table.rows else []:
        for row_cells in [*grid[:2], ["-" * w for w in widths], *grid[2:]]:
            cells = [row_cells[i].rjust(widths[i]) if i else row_cells[i].ljust(widths[i]) for i in block]
            lines.append(" ".join(cells).rstrip())
        lines.append("")
    lines.append(seeds_note(table) + (" * marks the best of a column." if any(table.best.values()) else ""))
    lines += [f"no result: {line}" for line in table.unfinished]
    return plain("\n".join([*lines, ""]))


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([round(v, 9) if isinstance(v, float) else v for v in row])
    return out.getvalue()


def to_csv(tables: Sequence[Table]) -> str:
    """Plain numbers, one row per stream and method: mean, std, n of every metric; s and MiB; empty where undefined."""
    keys = list(dict.fromkeys(key for table in tables for row in table.rows for key in row.stats))
    header = ["preset", "method", "joint", "seeds"]
    header += [f"{key}_{part}" for key in keys for part in ("mean", "std", "n")]
    lines: list[list[Any]] = []
    for table in tables:
        for row in table.rows:
            line: list[Any] = [table.preset, row.label, row.joint, len(row.seeds)]
            for key in keys:
                stat = row.stats.get(key)
                line += [stat.mean, stat.std, stat.n] if stat else [None, None, 0]
            lines.append(line)
    return _csv(header, lines)


def runs_csv(records: Sequence[Record]) -> str:
    """Plain numbers: one row per run, finished or not, with every metric and where it comes from."""
    rows = [run_row(record) for record in records]
    header = list(dict.fromkeys(key for row in rows for key in row))
    return _csv(header, ([row.get(key) for key in header] for row in rows))


def render(summary: Summary, form: str = "text", *, ascii_only: bool = False, width: int | None = None) -> str:
    """All tables in one of FORMATS; `ascii_only` and `width` concern text. UserError for another format."""
    if form == "csv":
        return to_csv(summary.tables)
    if form == "text":
        return "\n".join(to_text(table, ascii_only=ascii_only, width=width) for table in summary.tables)
    if form in ("md", "tex"):
        write, parts = to_markdown if form == "md" else to_latex, sections(summary)
        heading = "## {}\n\n" if form == "md" and len(parts) > 1 else ""
        return "\n".join(
            heading.format(kind.heading) * (index == 0) + write(table)
            for kind, tables in parts
            for index, table in enumerate(tables)
        )
    raise UserError(f"unknown table format {form!r}; {nearest(form, FORMATS, 'formats')}")
