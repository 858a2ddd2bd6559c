"""Sweeps: a grid of settings of one method, measured on validation data only, with the best point named."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.config.presets import Preset, load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.config.tuned import FORMAT, stream_of
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.files import atomic_write, write_json
from dualcl.benchmark.core.settings import Resolved, parse_assignment
from dualcl.benchmark.core.text import align
from dualcl.benchmark.domains import domain_class
from dualcl.benchmark.grids.plan import Outcome, Planned, check_seed_given_once
from dualcl.datasets import dataset_class
from dualcl.datasets.reading.content import Picture, pictures
from dualcl.methods import method_info
from dualcl.results.files import csv_cell
from dualcl.results.metrics import COST, KINDS, METRICS
from dualcl.results.records import load_record

#: fraction of the training images on which a sweep chooses
HOLDOUT = 0.2
#: concepts of a sweep, where a data set has some to spare beside those that are reported on
SWEEP_CONCEPTS = 5
#: what must not vary, by section: points are compared on the same data, measured in the same way
SAME = {"data": "on different data", "stream": "on different streams", "eval": "in different ways"}
#: beside the method's own, what its settings were chosen under; epochs, steps and batch size are the comparison's
UNDER = ("train.optimizer", "train.schedule", "train.milestones", "train.grad_clip")


@dataclass(frozen=True)
class Axis:
    """One `--over`, or a key of the preset's search space: a key and its values as typed."""

    key: str
    values: tuple[str, ...]


def _split_values(text: str) -> list[str]:
    """`1,[2,3],"a,b"` -> ["1", "[2,3]", '"a,b"']."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and depth <= 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def parse_axis(text: str) -> Axis:
    """`key=v1,v2` -> Axis; commas inside brackets or quotes belong to a value. UserError for anything else."""
    key, sep, rest = text.partition("=")
    key = key.strip()
    if not sep or not key:
        raise UserError(f"--over wants key=v1,v2,..., got {text!r}")
    if key == "seed":
        raise UserError("--over seed=... is what --seeds is for; give --seeds 0,1,2")
    if (how := SAME.get(key.partition(".")[0])) is not None:
        raise UserError(f"--over {key} would measure the points {how}; fix it with --set {key}=...")
    values = _split_values(rest)
    for i, value in enumerate(values):
        if not value:
            raise UserError(f"--over {key} has an empty value; separate the values with single commas")
        if value in values[:i]:
            raise UserError(f"--over {key} names the value {value} twice; give it once")
    return Axis(key, tuple(values))


def typed(value: Any) -> str:
    """A value of a preset as one would type it: 0.0001 -> 1e-4."""
    if isinstance(value, float) and value and not 1e-2 <= abs(value) < 1e3:
        mantissa, exponent = f"{value:e}".split("e")
        short = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        if float(short) == value:
            return short
    return value if isinstance(value, str) and parse_assignment(f"x={value}")[1] == value else json.dumps(value)


def axes_of(preset: Preset, method: str) -> list[Axis]:
    """The search space that a preset gives a method (`search:`); empty when it gives none."""
    return [Axis(f"method.{key}", tuple(map(typed, v))) for key, v in preset.search.get(method, {}).items()]


def space(preset: str, method: str) -> list[Axis]:
    """As `axes_of`; UserError when the preset gives the method none."""
    loaded = load_preset(preset, method)
    method = method_info(method).name
    axes = axes_of(loaded, method)
    if not axes:
        there = f" (it has some for {', '.join(loaded.search)})" if loaded.search else ""
        raise UserError(f"preset {preset} has no search space for {method}{there}; give --over key=v1,v2,...")
    return axes


@dataclass(frozen=True)
class Point:
    """One point of the grid with its runs, one per seed."""

    settings: tuple[tuple[str, str], ...]
    runs: tuple[Planned, ...]

    @property
    def name(self) -> str:
        """`key=value,key=value`."""
        return ",".join(f"{k}={v}" for k, v in self.settings)

    @property
    def fixed(self) -> dict[str, str]:
        """What `--set` gave that its settings were measured under."""
        resolved, varied = self.runs[0].resolved, {key.removesuffix("_") for key, _ in self.settings}
        return {
            key: typed(value)
            for key, value in sorted(resolved.flat().items())
            if resolved.sources.get(key, "").startswith("--set")
            and (key.startswith("method.") or key in UNDER)
            and key.removesuffix("_") not in varied
        }

    @property
    def use(self) -> dict[str, str]:
        """All that another run needs to be given."""
        return {**dict(self.settings), **self.fixed}


def _folder_name(name: str) -> str:
    """`name` as a folder; a hash keeps apart what a folder's name cannot tell apart."""
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "_", name)
    if safe == name and len(name) <= 120:
        return name
    return f"{safe[:120]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: the grid, where it comes from, the metric that decides, and the data it is measured on."""

    preset: str
    method: str
    select: str
    measured_on: str
    points: tuple[Point, ...]
    #: "--over", or the preset whose search space it is
    space: str = "--over"

    @property
    def plan(self) -> list[Planned]:
        """All runs; the first seed of every point comes first."""
        return [run for runs in zip(*(p.runs for p in self.points), strict=True) for run in runs]

    @property
    def tuning(self) -> str:
        """What a preset's `tuning:` may say of the method after this sweep."""
        points, seeds = len(self.points), len(self.points[0].runs)
        everywhere = set.intersection(*(set(point.fixed.items()) for point in self.points))
        fixed = ", ".join(f"{key}={value}" for key, value in sorted(everywhere))
        return (
            f"dualcl sweep on {self.preset}: {points} point{'s' * (points > 1)}, {seeds} seed{'s' * (seeds > 1)}, "
            f"by {self.select} on {self.measured_on}{f', at {fixed}' * bool(fixed)}"
        )


def validation(preset: str, method: str, resolved: Resolved) -> tuple[list[str], str]:
    """What makes a sweep run on validation data, as `--set` assignments, and the name of that data.

    Labelled images: a part of the training images (`data.holdout`). Concepts: others than those that are reported on,
    by number (`data.skip`), set apart in every run (`data.validation`), or of another draw (`to_tune_on` of the data
    set's Config). Raises UserError where a setting or the data set would leave nothing but what is reported on.
    """
    flat, sources = resolved.flat(), resolved.sources

    def given(key: str) -> bool:
        return sources.get(key) == "--set"

    if "data.holdout" in flat:
        if not flat["data.holdout"] and given("data.holdout"):
            raise UserError(
                "data.holdout=0 would choose on the test images, and a sweep never does; leave it out, or give a "
                f"fraction of the training images such as {HOLDOUT}"
            )
        holdout = flat["data.holdout"] or HOLDOUT
        own = [] if flat["data.holdout"] else [f"data.holdout={holdout}"]
        return own, f"validation images (data.holdout={holdout}: that part of the training images)"

    def shorter(concepts: int) -> list[str]:
        """A stream of all concepts of the sweep where the preset's own is longer."""
        tasks = flat["stream.tasks"]
        return [f"stream.tasks={concepts}"] if tasks is not None and tasks > concepts else []

    if "data.skip" in flat:
        planned = resolve(preset, method).flat()
        first = planned["data.skip"]
        end = first + max(planned["data.concepts"], flat["data.concepts"])
        skip = flat["data.skip"] if given("data.skip") else end
        concepts = flat["data.concepts"] if given("data.concepts") else SWEEP_CONCEPTS
        if skip < end and skip + concepts > first:
            raise UserError(
                f"data.skip={skip} with data.concepts={concepts} holds concepts that are reported on, number "
                f"{first + 1} to {end}, and a sweep never chooses on these; leave data.skip out, or give {end} or more"
            )
        own = [] if given("data.skip") else [f"data.skip={skip}"]
        own += [] if given("data.concepts") else [f"data.concepts={concepts}"]
        return own + shorter(concepts), f"{concepts} other concepts (data.skip={skip})"
    if others := getattr(resolved.sections["data"], "to_tune_on", {}):
        own = [f"data.{key}={value}" for key, value in others.items() if flat[f"data.{key}"] != value]
        return own, f"other concepts ({', '.join(f'data.{key}={value}' for key, value in others.items())})"
    if "data.validation" in flat:
        concepts = flat["data.validation"]
        own = ["data.tuning=true"]
        spares = getattr(resolved.sections["data"], "spares_concepts", False)
        if spares and not concepts:
            concepts = SWEEP_CONCEPTS
            own.append(f"data.validation={concepts}")
        if not concepts:
            raise UserError(
                f"{resolved.data_name} has no concepts but those that are reported on, and a sweep never chooses on "
                "these; set data.validation=N here and in every run: the last N concepts are then kept for sweeps"
            )
        everywhere = "" if spares else ", to be set in every run"
        return own + shorter(concepts), f"{concepts} validation concepts (data.validation={concepts}{everywhere})"
    raise UserError(
        f"the data set {resolved.data_name} holds nothing out, and a sweep never chooses on what is reported; give its "
        "Config a key holdout (labelled images) or validation (concepts)"
    )


def plan_sweep(
    preset: str,
    method: str,
    over: Sequence[str] | None,
    seeds: Sequence[int] | None,
    sets: Sequence[str],
    out: Path,
    *,
    select: str | None = None,
) -> Sweep:
    """Checks the whole grid. Each point's runs go to `<out>/<method>/<key=value,...>/seed<k>`.

    No `over`: the method's search space of the preset. No `select`: what the preset chooses by, else the domain's
    measure of quality. Every run is on validation data, see `validation`. Raises UserError for the first thing that is
    wrong, before anything runs.
    """
    said = "--select"
    if select is None:
        loaded = load_preset(preset, method)
        select = loaded.select or KINDS[domain_class(loaded.domain).matrix_kind].quality
        said = f"search.select of preset {loaded.name}:"
    if select not in METRICS:
        raise UserError(f"unknown metric {said} {select!r}; {nearest(select, METRICS, 'metrics')}")
    axes = [parse_axis(text) for text in over] if over else space(preset, method)
    fixed = {parse_assignment(text)[0] for text in sets}
    for i, axis in enumerate(axes):
        if axis.key in {a.key for a in axes[:i]}:
            raise UserError(f"--over names {axis.key} twice; list all its values in one --over")
        if axis.key in fixed:
            where = "--over" if over else f"the search space of preset {preset}"
            raise UserError(f"{axis.key} is given by {where} and by --set; keep one of the two")
    if seeds is not None:
        check_seed_given_once(sets, "--seeds")

    def settings_of(values: Iterable[str]) -> tuple[tuple[str, str], ...]:
        return tuple((axis.key, value) for axis, value in zip(axes, values, strict=True))

    grid = [settings_of(values) for values in itertools.product(*(axis.values for axis in axes))]
    first = resolve(preset, method, [*sets, *(f"{k}={v}" for k, v in grid[0])], seed=seeds[0] if seeds else None)
    own, measured_on = validation(preset, method, first)
    sets = [*sets, *own]
    points: list[Point] = []
    seen: dict[str, str] = {}
    for settings in grid:
        name = ",".join(f"{k}={v}" for k, v in settings)
        given = [*sets, *(f"{k}={v}" for k, v in settings)]
        runs = []
        for seed in [None] if seeds is None else seeds:
            resolved = resolve(preset, method, given, seed=seed)
            used = resolved.general.seed
            folder = out / first.method / _folder_name(name) / f"seed{used}"
            runs.append(Planned(resolved, preset, tuple(given), folder, f"{name} seed {used}"))
        twin = seen.setdefault(json.dumps(runs[0].resolved.flat(), default=str), name)
        if twin != name:
            raise UserError(f"--over: {twin} and {name} are the same setting; give it once")
        points.append(Point(settings, tuple(runs)))
    source = "--over" if over else f"preset {first.preset}"
    return Sweep(first.preset, first.method, select, measured_on, tuple(points), source)


@dataclass(frozen=True)
class Score:
    """What the finished runs of a point gave: (mean, standard deviation or None, n) per metric."""

    point: Point
    finished: int
    metrics: Mapping[str, tuple[float, float | None, int]]
    error: str = ""


def score_sweep(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Score]:
    """Scores from the records, the best point first: of equals the one that is better in the table's next measures.

    Points with unfinished runs come last.
    """
    by_folder = {o.planned.out: o for o in outcomes}
    scores = []
    for point in sweep.points:
        bad = [by_folder[run.out] for run in point.runs if by_folder[run.out].code]
        records = [load_record(run.out) for run in point.runs if not by_folder[run.out].code]
        metrics = {}
        for key in METRICS:
            values = [v for r in records if (v := r.metrics.get(key)) is not None]
            if values:
                std = statistics.stdev(values) if len(values) > 1 else None
                metrics[key] = (statistics.fmean(values), std, len(values))
        scores.append(Score(point, len(records), metrics, bad[0].error if bad else ""))
    order = _shown(sweep, scores)

    def rank(score: Score) -> tuple[float, ...]:
        whole = score.finished == len(score.point.runs) and sweep.select in score.metrics
        signs = {key: -1.0 if METRICS[key].higher_is_better else 1.0 for key in order}
        return float(not whole), *(signs[k] * score.metrics[k][0] if k in score.metrics else math.inf for k in order)

    return sorted(scores, key=rank)


def best_score(sweep: Sweep, scores: Sequence[Score]) -> Score | None:
    """The winner: the first score if all its runs finished and the metric is defined, else None."""
    first = scores[0]
    return first if first.finished == len(first.point.runs) and sweep.select in first.metrics else None


def set_line(score: Score) -> str:
    """What to add to `dualcl run` or `compare` to use the point."""
    return "--set " + " ".join(shlex.quote(f"{k}={v}") for k, v in score.point.use.items())


def _shown(sweep: Sweep, scores: Sequence[Score]) -> list[str]:
    there = {key for score in scores for key in score.metrics}
    rest = [k for k in METRICS if k in there and k != sweep.select and k not in COST]
    return [sweep.select, *rest]


def sweep_table(sweep: Sweep, scores: Sequence[Score]) -> str:
    """An aligned table, best first: settings, finished seeds, the metric that decides, the others."""
    keys = [k for k, _ in sweep.points[0].settings]
    shown = _shown(sweep, scores)
    rows = [
        [*keys, "seeds", *(f"{METRICS[k].title} {'(max)' if METRICS[k].higher_is_better else '(min)'}" for k in shown)]
    ]
    for score in scores:
        cells = [f"{score.finished}/{len(score.point.runs)}"]
        for key in shown:
            if key not in score.metrics:
                cells.append("-")
                continue
            mean, std, _ = score.metrics[key]
            decimals = METRICS[key].decimals
            cells.append(f"{mean:.{decimals}f}" + (f" +- {std:.{decimals}f}" if std is not None else ""))
        rows.append([*(v for _, v in score.point.settings), *cells])
    lines = align(rows, right=range(len(keys), len(rows[0])))
    lines[1:1] = ["-" * len(lines[0])]
    title = f"{sweep.preset}, {sweep.method}, sorted by {sweep.select} on {sweep.measured_on}"
    failed = [f"failed: {s.point.name}: {s.error}" for s in scores if s.error]
    return "\n".join([title, "", *lines, *([""] if failed else []), *failed])


def _pictures(run: Planned) -> list[Picture]:
    """Every picture of a run's data that is a file; none of data that are drawn, or not on this machine."""
    resolved = run.resolved
    if "data" not in domain_class(resolved.domain).contents(resolved):
        return []
    return pictures(dataset_class(resolved.data_reference, resolved.domain).load(resolved.sections["data"]))[1]


def write_sweep(sweep: Sweep, scores: Sequence[Score], out: Path) -> list[Path]:
    """Writes sweep.csv and sweep.json into `out`, best point first."""
    keys = [k for k, _ in sweep.points[0].settings]
    metrics = sorted({key for score in scores for key in score.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [*keys, "finished", "planned", *(f"{m}_{part}" for m in metrics for part in ("mean", "std", "n")), "error"]
    )
    for score in scores:
        cells: list[Any] = []
        for metric in metrics:
            cells += score.metrics.get(metric, (None, None, 0))
        row = [*(v for _, v in score.point.settings), score.finished, len(score.point.runs), *cells, score.error]
        writer.writerow(["" if v is None else csv_cell(v) for v in row])
    best = best_score(sweep, scores)
    run = best.point.runs[0] if best else None
    points = [
        {
            "settings": dict(score.point.settings),
            "finished": score.finished,
            "planned": len(score.point.runs),
            "metrics": {k: {"mean": m, "std": s, "n": n} for k, (m, s, n) in score.metrics.items()},
            "runs": [run.out.relative_to(out).as_posix() for run in score.point.runs],
            "error": score.error or None,
        }
        for score in scores
    ]
    tree = {
        "format": FORMAT,
        "version": 1,
        "preset": sweep.preset,
        "method": sweep.method,
        "select": sweep.select,
        "measured_on": sweep.measured_on,
        "space": sweep.space,
        "tuning": sweep.tuning,
        "stream": stream_of(load_record(run.out).data, _pictures(run)) if run else None,
        "best": {"settings": best.point.use, "use": set_line(best)} if best else None,
        "points": points,
    }
    with atomic_write(out / "sweep.csv") as file:
        file.write(text.getvalue().encode())
    write_json(out / "sweep.json", tree)
    return [out / "sweep.csv", out / "sweep.json"]
