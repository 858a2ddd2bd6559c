"""Tables over methods and seeds: which runs may share one, mean and standard deviation, differences between methods.

How one is written is a matter of `writers`; the texts that they share (a cell, a note) are made here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.results.metrics import COST, COSTS, KINDS, METRICS, declared_measures, measures_of
from dualcl.results.record_type import MatrixKind, Measure
from dualcl.results.records import Record, comparable, scan_records
from dualcl.results.statistics import CONFIDENCE, Difference, Ranking, check_confidence, compare, rank_methods

DASH = "–"
#: behind the name of a row with caveats
DAGGER = "†"
#: what the others are compared with, where it is there
BASELINE = "clora"
#: fewer seeds than this and a standard deviation says little
FEW_SEEDS = 3

#: identity that may differ between seeds, yet must agree between methods at the same seed
PER_SEED = frozenset({"class_order", "class_order_hash", "order_seed"})
#: identity of what not every run measures: without it the cell is a dash
MAY_LACK = frozenset({"prior_hash", "anchor_pictures"})
#: files of tensors in a record's content, whose own hashes stand in the identity
_FILES = ("weights", "base", "features")
#: configuration keys that differ between seeds or machines, and do not make another variant of a method
_FREE_CONFIG = {
    "seed",
    "device",
    "threads",
    "stream.order_seed",
    "stream.class_order",
    "train.checkpoint_seconds",
    "train.log_every",
    "input.workers",
    "input.cache_mib",
    "input.cache_gib",
    "data.root",
    "data.prior_captions",
}

#: configuration keys that say where a file lies -> what of the identity says which file it is
_PLACES = {"backbone.weights": "weights_sha256", "eval.features": "features_sha256"}


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation (ddof = 1; None for one seed) over the `n` seeds where a metric is defined."""

    mean: float
    std: float | None
    n: int


#: what presets say of a method without settings
NOTHING_TO_TUNE = "nothing to tune"


@dataclass(frozen=True)
class Row:
    """One method: its finished runs, one per seed, and a Stat per metric (None where undefined)."""

    label: str
    joint: bool
    seeds: tuple[int, ...]
    stats: dict[str, Stat | None]
    #: what a reader must know of its runs
    caveats: tuple[str, ...] = ()
    #: on what, and how, sweeps on other streams chose its settings
    tuned: tuple[str, ...] = ()
    #: False: its preset says that there is nothing to tune
    tunable: bool = True


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
    #: those of the kind, those that the records declare, those of cost
    measures: dict[str, Measure]
    #: None for fewer than two rows, and for runs that were mixed on request
    differences: Differences | None = None
    #: what differs between runs that do not compare, put together on request
    mixed: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[Measure]:
        """The measures shown, in order."""
        return [m for m in self._there if m.column and (not m.beside or self._differ(m.key, m.beside))]

    @property
    def all_metrics(self) -> list[Measure]:
        """All measures of the matrix, in order, where the table shows only some of them; else none."""
        found = [measure for measure in self._there if measure.key not in COST]
        return found if self.rows and not all(measure in self.metrics for measure in found) else []

    def _differ(self, *keys: str) -> bool:
        """Whether two measures differ in some run, by more than the order of a sum."""
        pairs = ([record.metrics.get(key) for key in keys] for record in self.records)
        return any(a != b and (a is None or b is None or abs(a - b) > 1e-9) for a, b in pairs)

    @property
    def _there(self) -> list[Measure]:
        """Without the optional measures that no run has."""
        return [m for m in self.measures.values() if not m.optional or any(row.stats[m.key] for row in self.rows)]


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


def _content_conflicts(records: Sequence[Record]) -> dict[str, str]:
    """What was read from files, by content: a line for each thing that is another in two records that say it."""
    conflicts: dict[str, str] = {}
    first: dict[tuple[str, str], tuple[str, Record]] = {}
    for record in records:
        for key, value in (record.data.get("content") or {}).items():
            if key in _FILES:
                continue
            # methods may be given other words; the seeds of one are of the same
            known, other = first.setdefault((key, record.label if key == "words" else ""), (value, record))
            if known != value:
                there, here = f"{known[:12]} in {_name(other)}", f"{value[:12]} in {_name(record)}"
                conflicts.setdefault(key, f"the content of {key.rstrip('.')} has changed, sha256 {there} and {here}")
    return conflicts


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
            if key in MAY_LACK and value is None:
                continue
            known, other = first.setdefault((key, record.seed if per_seed else None), (value, record))
            if known != value:
                conflicts.setdefault(
                    key, f"{key} is {_short(known)} in {_name(other)} and {_short(value)} in {_name(record)}"
                )
    # another choice of images says more than another hash of them, and that more than what follows from it
    chosen: dict[str, str] = {key: conflicts[key] for key in ("data", "split_name") if key in conflicts}
    found: dict[str, str] = {**chosen, **_content_conflicts(records), **conflicts}
    return list(found.values())


def _measure_conflicts(records: Sequence[Record]) -> list[str]:
    """One line per measure of a plug-in that records declare differently; they need not all have it."""
    conflicts: dict[str, str] = {}
    first: dict[str, tuple[str, Record]] = {}
    for record in records:
        for measure in declared_measures(record.data["matrix"]):
            said = f"in {measure.unit}, {measure.better} is better,"
            known, other = first.setdefault(measure.key, (said, record))
            if known != said:
                conflicts.setdefault(
                    measure.key, f"{measure.key} is {known} in {_name(other)} and {said} in {_name(record)}"
                )
    return list(conflicts.values())


def _measured_in(records: Sequence[Record], measures: Iterable[Measure]) -> list[str]:
    """What only some of the runs have."""
    lines = []
    for field, title in [(m.field, m.title) for m in measures if m.field is not None and m.optional]:
        n = sum(any(row.get(field.name) is not None for row in r.data["matrix"]["rows"]) for r in records)
        if 0 < n < len(records):
            lines.append(f"{title}: measured in {n} of {len(records)} runs")
    return lines


def _other_code(records: Sequence[Record]) -> list[str]:
    """Rows whose runs came from different files of a method or of the data, by the hashes of those files."""
    lines = []
    for key, what in {"method_source": "method", "data_source": "data set"}.items():
        found: dict[str, dict[str, None]] = {}
        for record in records:
            source = record.data["run"].get(key) or {}
            found.setdefault(record.label, {})[str(source.get("sha256") or "built in")[:12]] = None
        lines += [
            f"{label}: different code of the {what} under one name ({', '.join(hashes)})"
            for label, hashes in found.items()
            if len(hashes) > 1
        ]
    return lines


def _set(value: Any) -> Any:
    """A setting, None where nothing is set: older records lack later keys, whose defaults are off or empty."""
    return None if value is None or value is False or value in ("", [], {}) else value


def _written(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _settings(record: Record, known: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """What of a configuration makes a variant of a method, by dotted key; one and the same dict for shared sections.

    A file is told by its hash where the identity has it: the same weights are the same wherever they lie.
    """
    config, identity = record.data["config"], record.data["identity"]
    hashes = {place: identity[key] for place, key in _PLACES.items() if isinstance(identity.get(key), str)}
    key = tuple(hashes.values()) + tuple(
        (name, id(part) if isinstance(part, dict) else repr(part))
        for name, part in config.items()
        if name not in _FREE_CONFIG
    )
    if key not in known:
        flat = {k: _set(v) for k, v in _flat(config) if k not in _FREE_CONFIG}
        known[key] = {k: hashes.get(k, v) if isinstance(v, str) else v for k, v in flat.items()}
    return known[key]


def _without_defaults(record: Record, flat: Mapping[str, Any], keys: Set[str]) -> dict[str, Any]:
    """The settings without those of `keys` that nobody set."""
    sources = record.data.get("sources") or {}
    return {k: v for k, v in flat.items() if k not in keys or sources.get(k) != "default"}


def tell_apart(records: Sequence[Record]) -> list[Record]:
    """The records of a stream; a label that stands for several settings (a sweep) names those that are set.

    A record in which none of the varied keys is set keeps its label. An option that earlier records did not know yet is
    varied where it is set: at its default it is what they did.
    """
    groups: dict[str, list[tuple[Record, dict[str, Any]]]] = {}
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        groups.setdefault(record.label, []).append((record, _settings(record, known)))
    out = []
    for label, group in groups.items():
        different = {id(flat): flat for _, flat in group}.values()
        keys = dict.fromkeys(key for flat in different for key in flat)
        if new := {key for key in keys if any(key not in flat for flat in different)}:
            group = [(record, _without_defaults(record, flat, new)) for record, flat in group]
            different = {id(flat): flat for _, flat in group}.values()
        varied = [k for k in keys if any(flat.get(k) != group[0][1].get(k) for flat in different)]
        # a file is named by the place where the first of its runs found it
        places: dict[str, str] = {}
        for record, flat in group if not _PLACES.keys().isdisjoint(varied) else ():
            for key, value in _flat(record.data["config"]):
                if key in _PLACES and key in flat:
                    places.setdefault(flat[key], _written(value))
        # another file at the same place is another file
        shared = [place for place in places.values() if [*places.values()].count(place) > 1]
        places = {sha: f"{place} {sha[:8]}" if place in shared else place for sha, place in places.items()}
        for record, flat in group:
            told = {k: _written(flat[k]) for k in varied if flat.get(k) is not None}
            names = [
                f"{k.removeprefix('method.')}={places.get(value, value) if k in _PLACES else value}"
                for k, value in told.items()
            ]
            run = {**record.data["run"], "label": f"{label} ({', '.join(names)})" if names else label}
            out.append(Record(record.path, {**record.data, "run": run}))
    return out


def _result(record: Record) -> dict[str, Any]:
    """What two copies of a run share: all that is determined, but for the places of files that the identity names."""
    data, identity = comparable(record), record.data["identity"]
    data.pop("config_hash", None)
    for place in (place for place, key in _PLACES.items() if isinstance(identity.get(key), str)):
        section, _, name = place.partition(".")
        if isinstance(data["config"].get(section), dict):
            data["config"][section].pop(name, None)
    return data


def _without_copies(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """One record per (label, seed); UserError when two differ, a warning when they are copies."""
    kept: dict[tuple[str, int], Record] = {}
    warnings = []
    for record in records:
        earlier = kept.setdefault((record.label, record.seed), record)
        if earlier is record:
            continue
        if _result(earlier) != _result(record):
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


def _scale(rows: Sequence[Row], metric: Measure) -> tuple[float, str, int]:
    """Divisor, unit and decimals of a column: seconds become minutes or hours when the longest run needs it."""
    if metric.key != "time_s":
        return 1.0, metric.unit, metric.decimals
    longest = max((stat.mean for row in rows if (stat := row.stats.get("time_s"))), default=0.0)
    if longest < 120:
        return 1.0, "s", 1
    return (60.0, "min", 1) if longest < 7200 else (3600.0, "h", 2)


def _best(rows: Sequence[Row], metric: Measure) -> frozenset[str]:
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
    return sorted({value for r in records for value in r.made_in(key)})


def _warnings(records: Sequence[Record], rows: Sequence[Row]) -> list[str]:
    lines = []
    few = [f"{row.label} ({len(row.seeds)})" for row in rows if len(row.seeds) < FEW_SEEDS]
    if few:
        which = ", ".join(few) if len(few) < len(rows) else "all rows"
        lines.append(f"fewer than {FEW_SEEDS} seeds, differences may be chance: {which}")
    if len({row.seeds for row in rows}) > 1:
        seeds = "; ".join(f"{row.label}: {', '.join(map(str, row.seeds))}" for row in rows)
        lines.append(f"not the same seeds for every method ({seeds})")
    known = sum("data" in (r.data.get("content") or {}) for r in records)
    if 0 < known < len(records):
        lines.append(
            f"{len(records) - known} of {len(records)} runs say no hash of their data, which may be other data"
        )
    skipped = sorted({str(i) for r in records for i in r.data["network"].get("skipped_images") or []})
    if skipped:
        shown = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        lines.append(f"unreadable images were left out ({len(skipped)}): {shown}")
    lines += sorted({str(n) for r in records for n in r.data["network"].get("notes") or []})
    for key, what in {"dualcl": "versions of dualcl", "commit": "commits", "torch": "versions of torch"}.items():
        if len(values := _values(records, key)) > 1:
            lines.append(f"mixed {what}: {', '.join(v[:12] for v in values)}")
    if any(r.data["identity"].get("weights") == "random" for r in records):
        lines.append("the backbone is not pretrained: its weights are random")
    if len(devices := _values(records, "device")) > 1:
        lines.append(f"mixed devices, time and memory do not compare: {', '.join(devices)}")
    if moved := [f"{r.label}, seed {r.seed}" for r in records if len(r.environments) > 1]:
        lines.append(f"began in another environment than they ended in: {'; '.join(moved)}")
    if dirty := sum(bool(r.dirty) for r in records):
        lines.append(f"{dirty} of {len(records)} runs came from a working tree with uncommitted changes")
    return lines


def _subtitle(records: Sequence[Record]) -> str:
    record, identity = records[0], records[0].data["identity"]
    parts = [_count(record.n_tasks, record.kind.item)]
    parts += [f"{k.split('_')[0]} {identity[k]}" for k in ("data", "split_name", "backbone") if identity.get(k)]
    same = dict.fromkeys(str(line) for r in records for line in r.data["network"].get("repeated_pictures") or [])
    return ", ".join(parts) + (f"; same pictures: {'; '.join(same)}" if same else "")


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
            parts.append(f"{span} {identity.get('reference') or 'real ones'}")
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
    records: Sequence[Record], *, allow_mixed: bool = False, baseline: str | None = None, confidence: float = CONFIDENCE
) -> Table:
    """The table of one data stream (records of one preset and its ablations, at least one; see `tell_apart`).

    Its methods are compared with `baseline`: a label or a method; by default, and where that is missing, BASELINE, or
    the best row. Raises UserError when finished runs differ in what must agree, unless `allow_mixed`, and when the
    baseline has several rows.
    """
    preset = records[0].table
    finished, warnings = _without_copies([r for r in records if r.finished])
    conflicts = [*_identity_conflicts(finished), *_measure_conflicts(finished)]
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
    measures = {m.key: m for r in finished for m in measures_of(r.data)} or {m.key: m for m in (*kind.measures, *COSTS)}
    rows = [
        Row(
            label,
            any(r.joint for r in group),
            tuple(r.seed for r in group),
            {key: _stat([r.metrics.get(key) for r in group]) for key in measures},
            tuple(dict.fromkeys(line for r in group for line in r.caveats)),
            tuple(dict.fromkeys(str(r.data["run"]["tuning"]) for r in group if r.data["run"].get("tuned_on"))),
            any(r.data["run"].get("tuning") != NOTHING_TO_TUNE for r in group),
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
        _subtitle(finished or list(records)),
        _measured(finished or list(records)),
        kind,
        rows,
        {key: _best(rows, measure) if not conflicts else frozenset() for key, measure in measures.items()},
        unfinished,
        [*warnings, *_warnings(finished, rows), *_measured_in(finished, measures.values()), *_other_code(finished)],
        finished,
        measures,
        mixed=tuple(conflicts),
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


def arrow(metric: Measure) -> str:
    """Which way is better."""
    return "↑" if metric.higher_is_better else "↓"


def cell(table: Table, row: Row, metric: Measure, plus_minus: str = " ± ") -> str:
    """A cell as text: mean, with the standard deviation where there is more than one seed; a dash when undefined."""
    stat = row.stats.get(metric.key)
    if stat is None:
        return DASH
    by, _, decimals = _scale(table.rows, metric)
    text = f"{stat.mean / by:.{decimals}f}"
    if stat.std is None or (metric.exact and stat.std == 0):
        return text
    return f"{text}{plus_minus}{stat.std / by:.{decimals}f}"


def unit(table: Table, metric: Measure) -> str:
    """The unit that a column of the table is shown in."""
    return _scale(table.rows, metric)[1]


def row_name(row: Row) -> str:
    """A row's label, with joint training marked as the upper bound that it is, and † where it has caveats."""
    name = f"{row.label} (upper bound)" if row.joint else row.label
    return f"{name} {DAGGER}" if row.caveats else name


def caveat_lines(table: Table) -> list[str]:
    """What † stands for, one line per row that has one; then which rows were tuned on another stream."""
    tuned: dict[str, list[str]] = {}
    for row in table.rows:
        if row.tuned or row.tunable:
            tuned.setdefault(" / ".join(row.tuned), []).append(row.label)
    others = tuned.pop("", [])
    lines = [f"tuned on {li.removeprefix('dualcl sweep on ')}: {', '.join(found)}" for li, found in tuned.items()]
    lines += [f"not tuned on another stream: {', '.join(others)}"] if tuned and others else []
    return [*(f"{row_name(row)}: {'; '.join(row.caveats)}" for row in table.rows if row.caveats), *lines]


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


def difference_unit(metric: Measure) -> str:
    """The unit of a difference: percent become points."""
    return "points" if metric.unit == "%" else metric.unit


def _signed(value: float, decimals: int) -> str:
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text


def _shown_p(p: float | None) -> str:
    return DASH if p is None else "< 0.001" if p < 0.0005 else f"{p:.3f}"


def difference_parts(difference: Difference, metric: Measure, plus_minus: str = " ± ") -> tuple[str, str, str]:
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


def difference_cell(table: Table, row: Row, metric: Measure) -> str:
    """A cell of the differences: mean ± standard deviation, interval, p, and * where significant."""
    assert table.differences is not None
    difference = table.differences.by_metric[metric.key][row.label]
    mean, interval, p = difference_parts(difference, metric)
    if difference.mean is None:
        return DASH
    p = "" if difference.p_holm is None else f", p {p}"
    return f"{mean} {interval}{p}{'*' * difference.significant}{few_seeds(table, row, difference)}"


def difference_metrics(table: Table) -> list[Measure]:
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
