"""Tables over methods and seeds: which runs may share one, mean and standard deviation, and five ways to write it."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import os
import re
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.results.files import csv_cell
from dualcl.results.metrics import COST, KINDS, METRICS, MatrixKind, Metric
from dualcl.results.records import Record, comparable, run_row, scan_records
from dualcl.results.statistics import CONFIDENCE, Difference, Ranking, check_confidence, compare, rank_methods

FORMATS = ("text", "md", "csv", "tex")
DASH = "–"
#: behind the name of a row with caveats
DAGGER = "†"
#: what the others are compared with, where it is there
BASELINE = "clora"
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
    "cache_gib",
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
    #: what a reader must know of its runs
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Differences:
    """The methods of a table against one of them, in every metric of `MatrixKind.compared` that has values."""

    #: a label
    baseline: str
    #: why this one, where that needs saying
    why: str
    confidence: float
    #: metric -> label -> difference
    by_metric: dict[str, dict[str, Difference]]

    @property
    def shown(self) -> bool:
        """Whether some comparison has the two seeds that a test needs."""
        return any(len(d.seeds) > 1 for found in self.by_metric.values() for d in found.values())


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
    #: None for fewer than two rows, and for runs that were mixed on request
    differences: Differences | None = None
    mixed: bool = False

    @property
    def metrics(self) -> list[Metric]:
        """The metrics shown, in order."""
        return [METRICS[key] for key in (*self.kind.columns, *COST)]

    @property
    def all_metrics(self) -> list[Metric]:
        """All metrics of the matrix, in order, where the table shows only some of them; else none."""
        keys = {key for row in self.rows for key in row.stats if key not in COST}
        return [metric for key, metric in METRICS.items() if key in keys] if keys - {*self.kind.columns} else []


@dataclass(frozen=True)
class Summary:
    """Everything found below some directories: a table per stream, all records, warnings that concern no one table."""

    tables: list[Table]
    records: list[Record]
    problems: list[str]
    #: of intervals and tests
    confidence: float = CONFIDENCE

    @cached_property
    def rankings(self) -> dict[str, Ranking | str]:
        """By heading of their kind, where it has two streams or more: mean ranks, or why there are none."""
        out = {}
        for kind, tables in sections(self):
            streams = {t.preset: _values_by_seed(t, kind.quality) for t in tables if t.rows and not t.mixed}
            if len(streams) > 1:
                out[kind.heading] = rank_methods(streams, METRICS[kind.quality].higher_is_better, self.confidence)
        return out

    def names(self, kind: MatrixKind) -> dict[str, str]:
        """label -> how the tables of a kind write it; with † where it has caveats in some of them."""
        rows = [row for table in self.tables if table.kind is kind for row in table.rows]
        return {row.label: row_name(row) for row in sorted(rows, key=lambda row: bool(row.caveats))}

    @property
    def warnings(self) -> list[str]:
        """All warnings, those of a table with its preset in front."""
        return [*self.problems, *(f"{t.preset}: {w}" for t in self.tables for w in t.warnings)]


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Objects are made by the million here, and few in cycles: to look for those less often saves a fifth of the time.

    Also a decorator.
    """
    usual = gc.get_threshold()
    gc.set_threshold(100_000, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, leaf in value.items():
        if isinstance(leaf, dict) and leaf:
            yield from _flat(leaf, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", leaf


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _name(record: Record) -> str:
    return f"{record.label} seed {record.seed}"


def _budget(record: Record) -> dict[str, Any]:
    """What every method of a table gets beside the data: the training budget, and how the classifier starts."""
    config = record.data["config"]
    flat = dict(_flat({name: config[name] for name in ("train", "head") if isinstance(config.get(name), Mapping)}))
    return {key: value for key, value in flat.items() if key.split(".")[-1] not in _FREE_CONFIG}


def _identity_conflicts(records: Sequence[Record]) -> list[str]:
    """One line per identity key on which runs disagree that would share a table."""
    conflicts: dict[str, str] = {}
    first: dict[tuple[str, int | None], tuple[Any, Record]] = {}
    flat = [
        (r, dict(_flat({**r.data["identity"], "n_tasks": r.n_tasks, "matrix": r.data["matrix"]["kind"], **_budget(r)})))
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


def _set(value: Any) -> Any:
    """A setting, None where nothing is set: older records lack later keys, whose defaults are off or empty."""
    return None if value is None or value is False or value in ("", [], {}) else value


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(config: Mapping[str, Any], known: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """What of a configuration makes a variant of a method, by dotted key; one and the same dict for shared sections."""
    key = tuple(
        (name, id(part) if isinstance(part, dict) else repr(part))
        for name, part in config.items()
        if name not in _FREE_CONFIG
    )
    if key not in known:
        known[key] = {k: _set(v) for k, v in _flat(config) if k.split(".")[-1] not in _FREE_CONFIG}
    return known[key]


def tell_apart(records: Sequence[Record]) -> list[Record]:
    """The records of a stream; where one label stands for several settings (a sweep), the label names them.

    A record in which none of the varied keys is set keeps its label.
    """
    groups: dict[str, list[tuple[Record, dict[str, Any]]]] = {}
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        groups.setdefault(record.label, []).append((record, _settings(record.data["config"], known)))
    out = []
    for label, group in groups.items():
        different = {id(flat): flat for _, flat in group}.values()
        keys = dict.fromkeys(key for flat in different for key in flat)
        varied = [k for k in keys if any(flat.get(k) != group[0][1].get(k) for flat in different)]
        for record, flat in group:
            names = [f"{k.removeprefix('method.')}={_written(flat.get(k))}" for k in varied]
            plain = all(flat.get(k) is None for k in varied)
            run = {**record.data["run"], "label": label if plain else f"{label} ({', '.join(names)})"}
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


def _values_by_seed(table: Table, metric: str) -> dict[str, dict[int, float | None]]:
    """label -> seed -> value; upper bounds left out."""
    out: dict[str, dict[int, float | None]] = {row.label: {} for row in table.rows if not row.joint}
    for record in table.records:
        if record.label in out:
            out[record.label][record.seed] = record.metrics.get(metric)
    return out


def _find_row(table: Table, name: str) -> str | None:
    """The label that `name` is, or the only one of the method `name`; None without any.

    Raises UserError when the method has several rows and none is called so.
    """
    if any(row.label == name for row in table.rows):
        return name
    labels = list(dict.fromkeys(r.label for r in table.records if r.data["run"]["method"] == name))
    if len(labels) > 1:
        raise UserError(f"baseline {name!r} has several rows on {table.preset}: {'; '.join(labels)}; name one of them")
    return labels[0] if labels else None


def _best_row(table: Table) -> str | None:
    """The best method in the kind's quality; one with a single seed only where there are no others."""
    metric = METRICS[table.kind.quality]
    known = {row.label: stat for row in table.rows if not row.joint and (stat := row.stats.get(metric.key))}
    several = {label: stat for label, stat in known.items() if stat.n > 1}
    sign = -1 if metric.higher_is_better else 1
    return min(several or known, key=lambda label: (sign * known[label].mean, label), default=None)


def _choose_baseline(table: Table, wanted: str | None) -> tuple[str | None, str]:
    """The label of the baseline, and why that one."""
    why = ""
    if wanted is not None:
        if (label := _find_row(table, wanted)) is not None:
            return label, ""
        why = f"{wanted} has no finished run here. "
    if (label := next((row.label for row in table.rows if row.label == BASELINE), None)) is not None:
        return label, why.strip()
    title = METRICS[table.kind.quality].title
    why += f"The baseline is the best row in {title}: chosen by its result, it looks better than it would on new seeds."
    return _best_row(table), why


def _differences(table: Table, wanted: str | None, confidence: float) -> Differences | None:
    baseline, why = _choose_baseline(table, wanted)
    if baseline is None or len(table.rows) < 2:
        return None
    by_metric = {}
    for key in table.kind.compared:
        values: dict[str, dict[int, float | None]] = {row.label: {} for row in table.rows}
        for record in table.records:
            values[record.label][record.seed] = record.metrics.get(key)
        base = values.pop(baseline)
        found = {d.label: d for d in compare(values, base, confidence)}
        if any(d.seeds for d in found.values()):
            by_metric[key] = found
    return Differences(baseline, why, confidence, by_metric) if by_metric else None


def make_table(
    records: Sequence[Record],
    *,
    allow_mixed: bool = False,
    baseline: str | None = None,
    confidence: float = CONFIDENCE,
) -> Table:
    """The table of one data stream (records of one preset and its ablations, at least one; see `tell_apart`).

    Its methods are compared with `baseline`: a label or a method; by default, and where that is missing, BASELINE, or
    the best row. Raises UserError when finished runs differ in what must agree, unless `allow_mixed`, and when the
    baseline has several rows.
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
            tuple(dict.fromkeys(line for r in group for line in r.caveats)),
        )
        for label, group in groups.items()
    ]
    unfinished = [
        f"{_name(r)}: {r.status}, {len(r.data['matrix']['rows'])} of {_count(r.n_tasks, r.kind.item)} evaluated"
        + (f" ({r.data['error']})" if r.data.get("error") else "")
        for r in records
        if not r.finished
    ]
    table = Table(
        preset,
        _subtitle((finished or list(records))[0]),
        _measured(finished or list(records)),
        kind,
        rows,
        {key: _best(rows, METRICS[key]) for key in keys},
        unfinished,
        warnings + _warnings(finished, rows),
        finished,
        mixed=bool(conflicts),
    )
    # runs that do not compare make no pairs
    return table if conflicts else replace(table, differences=_differences(table, baseline, confidence))


def streams(records: Iterable[Record]) -> list[list[Record]]:
    """The records by kind and table, in the order of a report, and told apart."""
    found: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        place = list(KINDS).index(record.data["matrix"]["kind"])
        found.setdefault((place, record.table), []).append(record)
    return [tell_apart(found[key]) for key in sorted(found)]


@rare_collections()
def summarise(
    dirs: Iterable[str | os.PathLike[str]],
    *,
    allow_mixed: bool = False,
    baseline: str | None = None,
    confidence: float = CONFIDENCE,
) -> Summary:
    """Tables of all streams below `dirs`; unreadable records become warnings. `baseline`: see `make_table`.

    Raises UserError when there is no readable record, when runs may not share a table, when no run has the baseline's
    name, and for a confidence that is none.
    """
    check_confidence(confidence)
    places = [os.fspath(d) for d in dirs]
    records, problems = scan_records(places)
    if not records:
        why = f"; {problems[0]}" if problems else "; give the directory that `dualcl run` or `compare` wrote"
        raise UserError(f"nothing to report: no record.json below {', '.join(places) or 'no directory'}{why}")
    ordered = streams(records)
    tables = [
        make_table(stream, allow_mixed=allow_mixed, baseline=baseline, confidence=confidence) for stream in ordered
    ]
    told_apart = [r for stream in ordered for r in stream]
    names = {name for r in told_apart for name in (r.label, str(r.data["run"]["method"]))}
    if baseline is not None and baseline not in names:
        raise UserError(f"no run of the baseline {baseline!r}; {nearest(baseline, names, 'rows')}")
    return Summary(tables, told_apart, [f"left out: {p}" for p in problems], confidence)


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
    """A row's label, with joint training marked as the upper bound that it is, and † where it has caveats."""
    name = f"{row.label} (upper bound)" if row.joint else row.label
    return f"{name} {DAGGER}" if row.caveats else name


def caveat_lines(table: Table) -> list[str]:
    """What † stands for, one line per row that has one."""
    return [f"{row_name(row)}: {'; '.join(row.caveats)}" for row in table.rows if row.caveats]


def seeds_note(table: Table) -> str:
    """What the numbers are: over how many seeds, and which is bold."""
    counts = sorted({len(row.seeds) for row in table.rows})
    if not counts:
        return "No finished run yet."
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts[-1] == 1:
        return "One seed, so no standard deviation."
    return f"Mean ± standard deviation (ddof = 1) over {span} seeds."


def difference_title(table: Table) -> str:
    """What the table of differences is, with the seeds where all comparisons have the same ones."""
    assert table.differences is not None
    seeds = {tuple(shared_seeds(table, row)) for row in compared_rows(table)}
    which = f"seeds {', '.join(map(str, *seeds))}" if len(seeds) == 1 else "shared seeds"
    return f"Differences to {table.differences.baseline}, paired over {which}"


def compared_rows(table: Table) -> list[Row]:
    """All rows but the baseline's."""
    assert table.differences is not None
    return [row for row in table.rows if row.label != table.differences.baseline]


def shared_seeds(table: Table, row: Row) -> list[int]:
    """The seeds that a row and the baseline have in common."""
    assert table.differences is not None
    base = next(r for r in table.rows if r.label == table.differences.baseline)
    return sorted({*row.seeds} & {*base.seeds})


def difference_unit(metric: Metric) -> str:
    """The unit of a difference: percent become points."""
    return "points" if metric.unit == "%" else metric.unit


def _signed(value: float, decimals: int) -> str:
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text


def _shown_p(p: float | None) -> str:
    return DASH if p is None else "< 0.001" if p < 0.0005 else f"{p:.3f}"


def difference_parts(difference: Difference, metric: Metric, plus_minus: str = " ± ") -> tuple[str, str, str]:
    """Mean ± standard deviation, interval and corrected p as text; a dash for what there is not."""
    if difference.mean is None:
        return DASH, DASH, DASH
    mean, interval = _signed(difference.mean, metric.decimals), f"[{DASH}]"
    if difference.std is not None:
        mean += f"{plus_minus}{difference.std:.{metric.decimals}f}"
    if difference.low is not None and difference.high is not None:
        interval = f"[{_signed(difference.low, metric.decimals)}, {_signed(difference.high, metric.decimals)}]"
    return mean, interval, _shown_p(difference.p_holm)


def few_seeds(table: Table, row: Row, difference: Difference) -> str:
    """The number of seeds behind a cell, where a metric is not defined in all that are shared."""
    n = len(difference.seeds)
    return f" (n = {n})" if 0 < n < len(shared_seeds(table, row)) else ""


def difference_cell(table: Table, row: Row, metric: Metric) -> str:
    """A cell of the differences: mean ± standard deviation, interval, p, and * where significant."""
    assert table.differences is not None
    difference = table.differences.by_metric[metric.key][row.label]
    mean, interval, p = difference_parts(difference, metric)
    if difference.mean is None:
        return DASH
    p = "" if difference.p_holm is None else f", p {p}"
    return f"{mean} {interval}{p}{'*' * difference.significant}{few_seeds(table, row, difference)}"


def difference_metrics(table: Table) -> list[Metric]:
    """The metrics that are compared."""
    return [METRICS[key] for key in table.differences.by_metric] if table.differences else []


def difference_notes(table: Table, *, short: bool = False) -> list[str]:
    """How to read the differences, and what weakens them; `short` for cells without standard deviation and p."""
    found = table.differences
    assert found is not None
    minus = f"Method minus {found.baseline} at the same seed:"
    if short:
        lines = [f"{minus} mean and confidence interval (paired t-test, Holm's correction for the column)."]
    else:
        lines = [
            f"{minus} mean ± standard deviation (ddof = 1) of the differences, [confidence interval], p of the "
            "two-sided paired t-test with Holm's correction for the column."
        ]
    alpha, level = f"{1 - found.confidence:.6g}", f"{100 * found.confidence:g} %"
    every = [d for of_metric in found.by_metric.values() for d in of_metric.values()]
    marked = any(d.significant for d in every)
    lines.append(
        f"* significant: corrected p < {alpha}." if marked else f"No difference is significant (corrected p < {alpha})."
    )
    lines[-1] += (
        f" An interval has the level at which Holm's procedure decided, at least {level}: it leaves 0 out exactly "
        "where the difference is significant."
    )
    few = [f"{row.label} ({n})" for row in compared_rows(table) if (n := len(shared_seeds(table, row))) < FEW_SEEDS]
    if few:
        lines.append(f"Fewer than {FEW_SEEDS} shared seeds, which is hardly evidence: {', '.join(few)}.")
    same = [
        f"{label} ({METRICS[key].title})"
        for key, of_metric in found.by_metric.items()
        for label, d in of_metric.items()
        if d.constant
    ]
    if same:
        lines.append(f"The same difference at every seed, so no interval and no test: {', '.join(same)}.")
    return [*lines, found.why] if found.why else lines


def ranking_lines(summary: Summary, kind: MatrixKind) -> list[str]:
    """The ranks over the streams of a kind in words, or why there are none; nothing for a single stream."""
    ranking = summary.rankings.get(kind.heading)
    if ranking is None:
        return []
    title = METRICS[kind.quality].title
    if isinstance(ranking, str):
        return [f"No ranks over streams: {ranking}."]
    names = summary.names(kind)
    ranks = ", ".join(f"{names[label]} {rank:.2f}" for label, rank in ranking.ranks.items())
    level = f"{100 * ranking.confidence:g} %"
    lines = [
        f"Mean ranks in {title} over {len(ranking.streams)} streams ({', '.join(ranking.streams)}), 1 is best: "
        f"{ranks}.",
        f"Friedman's test: p {_shown_p(ranking.friedman_p)}; Nemenyi's critical difference at {level}: "
        f"{ranking.critical_difference:.2f} (Demsar, JMLR 2006).",
    ]
    if not ranking.differs:
        lines[-1] += " Friedman's test finds no difference, so the methods are not told apart."
    elif ranking.groups:
        groups = "; ".join(", ".join(names[label] for label in group) for group in ranking.groups)
        lines[-1] += f" Not told apart: {groups}."
    if ranking.left_out:
        lines.append(f"Left out, for they share too few methods or seeds: {', '.join(ranking.left_out)}.")
    return lines


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


def _markdown_cells(table: Table, row: Row, metrics: Sequence[Metric]) -> list[str]:
    cells = [cell(table, row, m) for m in metrics]
    return [f"**{c}**" if row.label in table.best[m.key] else c for c, m in zip(cells, metrics, strict=True)]


def _markdown_differences(table: Table) -> list[str]:
    if table.differences is None or not table.differences.shown:
        return []
    metrics = difference_metrics(table)
    head = [f"method − {table.differences.baseline}", "seeds"]
    head += [f"{m.title} {arrow(m)} ({difference_unit(m)})" for m in metrics]
    rows = [
        [row_name(row), str(len(shared_seeds(table, row))), *(difference_cell(table, row, m) for m in metrics)]
        for row in compared_rows(table)
    ]
    return [
        f"#### {markdown_text(difference_title(table))}",
        "",
        *_markdown_grid([*map(markdown_text, head)], ([*map(markdown_text, row)] for row in rows)),
        "",
        *(f"- {markdown_text(line)}" for line in difference_notes(table)),
        "",
    ]


def to_markdown(table: Table) -> str:
    """A GitHub table, best values bold; below it all metrics where it does not show them, and the differences."""
    lines = [f"### {markdown_text(table.preset)}", "", markdown_text(table.subtitle) + ". " + seeds_note(table), ""]
    if table.measured:
        lines += [markdown_text(table.measured) + ".", ""]
    if table.rows:
        heads = [f"{markdown_text(m.title)} {arrow(m)} ({unit(table, m)})" for m in table.metrics]
        lines += _markdown_grid(
            ["method", "seeds", *heads],
            (
                [markdown_text(row_name(row)), str(len(row.seeds)), *_markdown_cells(table, row, table.metrics)]
                for row in table.rows
            ),
        )
        lines.append("")
    for line in caveat_lines(table):
        lines += [markdown_text(line), ""]
    if table.unfinished:
        lines += ["Without a result:", "", *(f"- {markdown_text(line)}" for line in table.unfinished), ""]
    if table.warnings:
        lines += ["Mind:", "", *(f"- {markdown_text(line)}" for line in table.warnings), ""]
    if every := table.all_metrics:
        heads = [f"{markdown_text(m.title)} {arrow(m)} ({unit(table, m)})" for m in every]
        rows = ([markdown_text(row_name(row)), *_markdown_cells(table, row, every)] for row in table.rows)
        lines += ["#### All metrics of the matrix", "", *_markdown_grid(["method", *heads], rows), ""]
    return "\n".join([*lines, *_markdown_differences(table)])


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


def _tex_way(metric: Metric) -> str:
    return r"$\uparrow$" if metric.higher_is_better else r"$\downarrow$"


def _tex_cells(table: Table, row: Row, metrics: Sequence[Metric]) -> list[str]:
    cells = []
    for metric in metrics:
        text = cell(table, row, metric, r" $\pm$ ").replace(DASH, "--")
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
    for metric in difference_metrics(table):
        body += [r"\midrule"] if body else []
        for index, row in enumerate(compared_rows(table)):
            difference = found.by_metric[metric.key][row.label]
            mean, interval, p = difference_parts(difference, metric)
            cells = [tex_text(text).replace("-", "$-$").replace(DASH, "--") for text in (mean, interval, p)]
            first = f"{metric.latex} [{tex_text(difference_unit(metric))}] {_tex_way(metric)}" if index == 0 else ""
            name, n = tex_text(row_name(row)), str(len(difference.seeds))
            cells[2] += r"\,*" if difference.significant else ""
            body.append(" & ".join([first, name, n, *cells]) + r" \\")
    baseline = tex_text(found.baseline)
    return _tex_grid(
        f"{tex_text(table.preset)}: {tex_text(difference_title(table))}.",
        "llrrrr",
        ["metric", rf"method $-$ {baseline}", "seeds", "difference", "interval", "$p$ (Holm)"],
        body,
        [tex_text(line) for line in difference_notes(table)],
    )


def to_latex(table: Table) -> str:
    r"""Booktabs tables (\usepackage{booktabs}), best values bold; what has no result follows as a comment.

    All metrics follow in a table of their own where the first does not show them, then the differences.
    """
    heads = [f"{m.latex} [{tex_text(unit(table, m))}] {_tex_way(m)}" for m in table.metrics]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{tex_text(table.preset)}: {tex_text(table.subtitle)}. "
        + tex_text(seeds_note(table))
        + (f" {tex_text(table.measured)}." if table.measured else "")
        + "}",
        rf"\begin{{tabular}}{{lr{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(["method", "seeds", *heads]) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = _tex_cells(table, row, table.metrics)
        lines.append(" & ".join([tex_text(row_name(row)), str(len(row.seeds)), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    caveats = [tex_text(line) for line in caveat_lines(table)]
    lines += [*(rf"\par\footnotesize {line}" for line in caveats), r"\end{table}"]
    lines += [f"% without a result: {' '.join(line.split())}" for line in table.unfinished]
    if every := table.all_metrics:
        lines += _tex_grid(
            f"{tex_text(table.preset)}: all metrics of the matrix.",
            "l" + "r" * len(every),
            ["method", *(f"{m.latex} [{tex_text(unit(table, m))}] {_tex_way(m)}" for m in every)],
            [" & ".join([tex_text(row_name(row)), *_tex_cells(table, row, every)]) + r" \\" for row in table.rows],
            caveats,
        )
    return "\n".join([*lines, *_tex_differences(table), ""])


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
    metrics = difference_metrics(table)
    assert table.differences is not None
    grid = [
        [f"method − {table.differences.baseline}", "seeds", *(f"{m.title} {arrow(m)} " for m in metrics)],
        ["", "", *(f"{difference_unit(m)} " for m in metrics)],
    ]
    for row in compared_rows(table):
        cells = []
        for metric in metrics:
            difference = table.differences.by_metric[metric.key][row.label]
            mean, interval, _ = difference_parts(replace(difference, std=None), metric)
            text = mean if difference.mean is None else f"{mean} {interval}{few_seeds(table, row, difference)}"
            cells.append(text + ("*" if difference.significant else " "))
        grid.append([row_name(row), str(len(shared_seeds(table, row))), *cells])
    return grid


def to_text(table: Table, *, ascii_only: bool = False, width: int | None = None) -> str:
    """An aligned table for a terminal, in blocks of columns that fit `width`; the best of a column ends in `*`.

    The differences follow, where there are any to test.
    """
    grid = [
        ["method", "seeds", *(f"{m.title} {arrow(m)} " for m in table.metrics)],
        ["", "", *(f"{unit(table, m)} " for m in table.metrics)],
    ]
    for row in table.rows:
        # a blank in the place of the star keeps the digits of a column under each other
        cells = [cell(table, row, m) + ("*" if row.label in table.best[m.key] else " ") for m in table.metrics]
        grid.append([row_name(row), str(len(row.seeds)), *cells])
    lines = [f"{table.preset}: {table.subtitle}", *([table.measured] if table.measured else []), ""]
    lines += _text_grid(_plain_grid(grid, ascii_only), 2, width) if table.rows else []
    lines.append(seeds_note(table) + (" * marks the best of a column." if any(table.best.values()) else ""))
    lines += _wrapped(caveat_lines(table), width)
    lines += [f"no result: {line}" for line in table.unfinished]
    if table.differences is not None and table.differences.shown:
        lines += ["", *_wrapped([difference_title(table)], width), ""]
        lines += _text_grid(_plain_grid(_text_differences(table), ascii_only), 2, width)
        lines += _wrapped(difference_notes(table, short=True), width)
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


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file of these rows, with text that no spreadsheet runs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow([round(v, 9) if isinstance(v, float) else csv_cell(v) for v in row])
    return out.getvalue()


def to_csv(tables: Sequence[Table]) -> str:
    """Plain numbers, one row per stream and method: mean, std, n of every metric; s and MiB; empty where undefined."""
    keys = list(dict.fromkeys(key for table in tables for row in table.rows for key in row.stats))
    header = ["preset", "method", "joint", "seeds"]
    header += [f"{key}_{part}" for key in keys for part in ("mean", "std", "n")]
    caveats = any(row.caveats for table in tables for row in table.rows)
    header += ["caveats"] * caveats
    lines: list[list[Any]] = []
    for table in tables:
        for row in table.rows:
            line: list[Any] = [table.preset, row.label, row.joint, len(row.seeds)]
            for key in keys:
                stat = row.stats.get(key)
                line += [stat.mean, stat.std, stat.n] if stat else [None, None, 0]
            lines.append(line + ["; ".join(row.caveats)] * caveats)
    return csv_text(header, lines)


def differences_csv(tables: Sequence[Table]) -> str:
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


def runs_csv(records: Sequence[Record]) -> str:
    """Plain numbers: one row per run, finished or not, with every metric and where it comes from."""
    rows = [run_row(record) for record in records]
    header = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text(header, ([row.get(key) for key in header] for row in rows))


def render(summary: Summary, form: str = "text", *, ascii_only: bool = False, width: int | None = None) -> str:
    """All tables in one of FORMATS; `ascii_only` and `width` concern text. UserError for another format."""
    parts = sections(summary)
    if form == "csv":
        return to_csv(summary.tables)
    if form == "text":
        blocks = [to_text(table, ascii_only=ascii_only, width=width) for table in summary.tables]
        ranks = [
            "\n".join([*_wrapped(lines, width), "", ""]) for kind, _ in parts if (lines := ranking_lines(summary, kind))
        ]
        return "\n".join([*blocks, *(_plain(text, ascii_only) for text in ranks)])
    if form in ("md", "tex"):
        write = to_markdown if form == "md" else to_latex
        heading = "## {}\n\n" if form == "md" and len(parts) > 1 else ""
        blocks = []
        for kind, tables in parts:
            for index, table in enumerate(tables):
                blocks.append(heading.format(kind.heading) * (index == 0) + write(table))
            lines = ranking_lines(summary, kind)
            if lines and form == "md":
                blocks.append("\n".join(["### Ranks over streams", "", *(f"- {markdown_text(t)}" for t in lines), ""]))
            blocks += [f"% {' '.join(line.split())}" for line in lines if form == "tex"]
        return "\n".join(blocks)
    raise UserError(f"unknown table format {form!r}; {nearest(form, FORMATS, 'formats')}")
