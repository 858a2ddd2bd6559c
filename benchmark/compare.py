"""Many runs of one preset: comparisons (methods x seeds) and sweeps (a grid of settings of one method)."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.config import Resolved, flatten, load_preset, parse_assignment, resolve
from dualcl.benchmark.environment import usable_cpus
from dualcl.benchmark.errors import EXIT_FAILED, EXIT_USER, RunFailed, UserError, nearest
from dualcl.benchmark.progress import Reporter, printable
from dualcl.benchmark.record import atomic_write, write_json

#: fraction of the training images on which a sweep chooses
HOLDOUT = 0.2
#: a terminated child may still be writing a checkpoint
GRACE_SECONDS = 60.0
#: `python -m` would put the working directory on sys.path, where the folder datasets/ of a checkout hides Hugging Face's
_CHILD = "import sys; sys.path[:] = [p for p in sys.path if p]; from dualcl.benchmark.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Planned:
    """One run to be done: its checked configuration, the arguments that gave it, and its directory."""

    resolved: Resolved
    preset: str
    sets: tuple[str, ...]
    out: Path
    label: str

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.resolved.general.seed


@dataclass(frozen=True)
class Outcome:
    """How a planned run ended: exit code and, unless that is 0, the error in one line."""

    planned: Planned
    code: int
    error: str = ""


def parse_names(text: str, what: str) -> list[str]:
    """`a,b,c` -> ["a", "b", "c"]; UserError when one is empty or given twice."""
    names = [name.strip() for name in text.split(",")]
    for i, name in enumerate(names):
        if not name:
            raise UserError(f"--{what} {text!r} has an empty entry; separate the entries with single commas")
        if name in names[:i]:
            raise UserError(f"--{what} names {name!r} twice; give it once")
    return names


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]; UserError when one is no natural number or given twice."""
    seeds = []
    for name in parse_names(text, "seeds"):
        if not (name.isascii() and name.isdecimal()):
            raise UserError(f"--seeds wants whole numbers from 0 on, such as 0,1,2; got {name!r}")
        if int(name) in seeds:
            raise UserError(f"--seeds names {int(name)} twice; give it once")
        seeds.append(int(name))
    return seeds


def check_seed_given_once(sets: Iterable[str], flag: str) -> None:
    """UserError when `--set seed=...` competes with a flag that gives the seed."""
    if any(parse_assignment(text)[0] == "seed" for text in sets):
        raise UserError(f"the seed is given by {flag} and by --set seed=...; keep one of the two")


def plan_comparison(
    preset: str, methods: Sequence[str], seeds: Sequence[int] | None, sets: Sequence[str], out: Path
) -> list[Planned]:
    """Checks every method with every seed and says where each run goes: `<out>/<method>-seed<seed>`.

    No seeds: the preset's own. Raises UserError for the first thing that is wrong, before anything runs.
    """
    if seeds is not None:
        check_seed_given_once(sets, "--seeds")
    plan = []
    for seed in [None] if seeds is None else seeds:
        for method in methods:
            resolved = resolve(preset, method, sets, seed=seed)
            label = f"{method} seed {resolved.general.seed}"
            folder = out / f"{method}-seed{resolved.general.seed}"
            plan.append(Planned(resolved, preset, tuple(sets), folder, label))
    return plan


def default_methods(preset: str) -> list[str]:
    """The preset's own list (`compare:`); UserError when it has none."""
    methods = list(load_preset(preset).compare)
    if not methods:
        raise UserError(f"preset {preset} has no default methods; give --methods a,b,c (see `dualcl list methods`)")
    return methods


def is_finished(planned: Planned) -> bool:
    """Whether the directory holds a finished record of this configuration.

    Raises UserError when it holds a damaged record, or one of another configuration.
    """
    from dualcl.results.records import load_record

    path = planned.out / "record.json"
    if not path.is_file():
        return False
    record = load_record(path)
    if record.data.get("config_hash") != planned.resolved.hash():
        old, new = flatten(record.data["config"]), planned.resolved.flat(volatile=False)
        differ = [f"{k} (there {old.get(k)!r}, now {v!r})" for k, v in new.items() if old.get(k) != v]
        raise UserError(
            f"{planned.out} holds a run with another configuration: {', '.join(differ[:3]) or 'older keys'}; "
            "choose another --out or remove that folder"
        )
    return record.finished


def execute(plan: Sequence[Planned], *, jobs: int = 1, quiet: bool = False) -> list[Outcome]:
    """Does all planned runs that have no finished record; one that fails does not stop the others.

    `jobs` > 1 runs that many processes side by side, each with its share of the cores. KeyboardInterrupt stops them
    all, resumable.
    """
    overview = Reporter(quiet=quiet)
    finished = [planned for planned in plan if is_finished(planned)]
    waiting = [planned for planned in plan if planned not in finished]
    for planned in finished:
        overview.note(f"{planned.label}: finished already, in {planned.out}")
    outcomes = {planned.out: Outcome(planned, 0) for planned in finished}
    done = _side_by_side(waiting, jobs, quiet) if jobs > 1 else [_run_here(p, quiet) for p in waiting]
    outcomes.update({outcome.planned.out: outcome for outcome in done})
    return [outcomes[planned.out] for planned in plan]


def _run_here(planned: Planned, quiet: bool) -> Outcome:
    from dualcl.benchmark.runner import run

    reporter = Reporter(planned.label, quiet=quiet)
    try:
        run(planned.resolved, planned.out, reporter)
        return Outcome(planned, 0)
    except UserError as error:
        code, text = EXIT_USER, str(error)
    except RunFailed as error:
        code, text = EXIT_FAILED, str(error)
    except OSError as error:
        code, text = EXIT_USER, describe_os_error(error, planned.out)
    except Exception as error:
        # a defect: the traceback is what helps to mend it, and the other runs still deserve their turn
        reporter.close()
        traceback.print_exc()
        code, text = EXIT_FAILED, f"{type(error).__name__}: {error}"
    finally:
        reporter.close()
    _tell(f"{planned.label}: {printable(text)}")
    return Outcome(planned, code, printable(text))


def describe_os_error(error: OSError, place: str | Path) -> str:
    """`FILE: No space left on device`; writing to an open file gives no name, then `place` stands for it."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{place if error.filename is None else error.filename}: {reason}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Children:
    """Runs in processes of their own. Each is its own session, so that Ctrl-C reaches it through `stop` alone, once."""

    def __init__(self, jobs: int, quiet: bool) -> None:
        self.threads = max(1, usable_cpus() // jobs)
        self.quiet = quiet
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, planned: Planned) -> Outcome:
        """Does one run, relaying its stderr line by line."""
        sets = list(planned.sets)
        if planned.resolved.general.threads is None:
            sets.append(f"threads={self.threads}")
        command = [sys.executable, "-c", _CHILD, "run", planned.preset, planned.resolved.method]
        command += ["--seed", str(planned.seed), "--out", str(planned.out)]
        own = [text for text in sets if parse_assignment(text)[0] != "seed"]
        command += ["--set", *own] if own else []
        command += ["--quiet"] if self.quiet else []
        with self.lock:
            if self.stopped:
                return Outcome(planned, -signal.SIGTERM, "not started")
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": str(self.threads)},
                start_new_session=True,
            )
            self.running.add(child)
        last = ""
        try:
            assert child.stderr is not None
            for line in child.stderr:
                last = line.strip() or last
                _tell(f"{planned.label}  {line.rstrip()}")
            code = child.wait()
        finally:
            with self.lock:
                self.running.discard(child)
        if code == 0:
            return Outcome(planned, 0)
        if code < 0:
            why = " (out of memory?)" if code == -signal.SIGKILL else ""
            return Outcome(planned, EXIT_FAILED, f"killed by signal {-code}{why}; the same command resumes")
        text = last.removeprefix("dualcl: error: ").removeprefix("dualcl: run failed: ")
        return Outcome(planned, EXIT_USER if code == EXIT_USER else EXIT_FAILED, printable(text))

    def stop(self) -> None:
        """Asks every child to checkpoint and end, and waits for that."""
        with self.lock:
            self.stopped = True
            children = list(self.running)
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()


def _side_by_side(plan: Sequence[Planned], jobs: int, quiet: bool) -> list[Outcome]:
    if not plan:
        return []
    children = _Children(min(jobs, len(plan)), quiet)
    pool = ThreadPoolExecutor(max_workers=jobs)
    try:
        futures = [pool.submit(children.run, planned) for planned in plan]
        return [future.result() for future in futures]
    except BaseException:
        children.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """The largest exit code of the runs."""
    return max((outcome.code for outcome in outcomes), default=0)


def summary_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """How many runs finished, and one line per run that did not."""
    bad = [o for o in outcomes if o.code]
    lines = [f"{len(outcomes) - len(bad)} of {len(outcomes)} runs finished"]
    return lines + [f"failed: {o.planned.label}: {o.error}" for o in bad]


# --- sweeps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One `--over`: a key and its values as typed."""

    key: str
    values: tuple[str, ...]


def parse_axis(text: str) -> Axis:
    """`key=v1,v2` -> Axis; commas inside brackets or quotes belong to a value. UserError when it is nothing of the kind."""
    key, sep, rest = text.partition("=")
    key = key.strip()
    if not sep or not key or not rest.strip():
        raise UserError(f"--over wants key=v1,v2,..., got {text!r}")
    if key == "seed":
        raise UserError("--over seed=... is what --seeds is for; give --seeds 0,1,2")
    values = [v.strip() for v in re.findall(r"""(?:[^,\[\]{}"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+|(?<=,)(?=,|$)""", rest)]
    for i, value in enumerate(values):
        if not value:
            raise UserError(f"--over {key} has an empty value; separate the values with single commas")
        if value in values[:i]:
            raise UserError(f"--over {key} names the value {value} twice; give it once")
    return Axis(key, tuple(values))


@dataclass(frozen=True)
class Point:
    """One point of the grid with its runs, one per seed."""

    settings: tuple[tuple[str, str], ...]
    runs: tuple[Planned, ...]

    @property
    def name(self) -> str:
        """`key=value,key=value`."""
        return ",".join(f"{k}={v}" for k, v in self.settings)


def _folder_name(name: str) -> str:
    """`name` as a folder; a hash keeps apart what a folder's name cannot tell apart."""
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "_", name)
    if safe == name and len(name) <= 120:
        return name
    return f"{safe[:120]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: the grid, the metric that decides, and the images it is measured on."""

    preset: str
    method: str
    select: str
    measured_on: str
    points: tuple[Point, ...]

    @property
    def plan(self) -> list[Planned]:
        """All runs; the first seed of every point comes first."""
        return [run for runs in zip(*(p.runs for p in self.points), strict=True) for run in runs]


def plan_sweep(
    preset: str,
    method: str,
    over: Sequence[str],
    seeds: Sequence[int] | None,
    sets: Sequence[str],
    out: Path,
    *,
    select: str = "A_last",
    on_test: bool = False,
) -> Sweep:
    """Checks the whole grid. Each point's runs go to `<out>/<method>/<key=value,...>/seed<k>`.

    Hyper-parameters must not be chosen on test images: where the data set can hold out training images and the user
    says nothing else, `data.holdout` is set. Raises UserError for the first thing that is wrong, before anything runs.
    """
    from dualcl.results.metrics import METRICS

    if select not in METRICS:
        raise UserError(f"unknown metric --select {select!r}; {nearest(select, METRICS, 'metrics')}")
    axes = [parse_axis(text) for text in over]
    fixed = {parse_assignment(text)[0] for text in sets}
    for i, axis in enumerate(axes):
        if axis.key in {a.key for a in axes[:i]}:
            raise UserError(f"--over names {axis.key} twice; list all its values in one --over")
        if axis.key in fixed:
            raise UserError(f"{axis.key} is given by --over and by --set; keep one of the two")
    if seeds is not None:
        check_seed_given_once(sets, "--seeds")

    def settings_of(values: Iterable[str]) -> tuple[tuple[str, str], ...]:
        return tuple((axis.key, value) for axis, value in zip(axes, values, strict=True))

    grid = [settings_of(values) for values in itertools.product(*(axis.values for axis in axes))]
    first = resolve(preset, method, [*sets, *(f"{k}={v}" for k, v in grid[0])], seed=seeds[0] if seeds else None)
    sets = list(sets)
    holdout_source = first.sources.get("data.holdout")
    can_hold_out = "data.holdout" in first.sources
    if can_hold_out and holdout_source == "default" and not on_test:
        sets.append(f"data.holdout={HOLDOUT}")
    points, seen = [], {}
    for settings in grid:
        name = ",".join(f"{k}={v}" for k, v in settings)
        given = [*sets, *(f"{k}={v}" for k, v in settings)]
        runs = []
        for seed in [None] if seeds is None else seeds:
            resolved = resolve(preset, method, given, seed=seed)
            used = resolved.general.seed
            folder = out / method / _folder_name(name) / f"seed{used}"
            runs.append(Planned(resolved, preset, tuple(given), folder, f"{name} seed {used}"))
        twin = seen.setdefault(json.dumps(runs[0].resolved.flat(), default=str), name)
        if twin != name:
            raise UserError(f"--over: {twin} and {name} are the same setting; give it once")
        points.append(Point(settings, tuple(runs)))
    held = getattr(points[0].runs[0].resolved.sections["data"], "holdout", 0)
    if "data.holdout" in {axis.key for axis in axes}:
        measured_on = "as data.holdout says"
    elif held:
        measured_on = f"validation images (data.holdout={held}: that part of the training images)"
    elif can_hold_out:
        measured_on = "TEST images, as asked for"
    else:
        measured_on = "TEST images: this data set cannot hold out training images (no data.holdout)"
    return Sweep(preset, method, select, measured_on, tuple(points))


@dataclass(frozen=True)
class Score:
    """What the finished runs of a point gave: (mean, standard deviation or None, n) per metric."""

    point: Point
    finished: int
    metrics: Mapping[str, tuple[float, float | None, int]]
    error: str = ""


def score_sweep(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Score]:
    """Scores from the records, the best point first; points with unfinished runs come last."""
    from dualcl.results.metrics import METRICS
    from dualcl.results.records import load_record

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
    sign = -1.0 if METRICS[sweep.select].higher_is_better else 1.0

    def rank(score: Score) -> tuple[bool, float]:
        mean = score.metrics.get(sweep.select)
        whole = score.finished == len(score.point.runs) and mean is not None
        return not whole, sign * mean[0] if mean else 0.0

    return sorted(scores, key=rank)


def best_score(sweep: Sweep, scores: Sequence[Score]) -> Score | None:
    """The winner: the first score if all its runs finished and the metric is defined, else None."""
    first = scores[0]
    return first if first.finished == len(first.point.runs) and sweep.select in first.metrics else None


def set_line(score: Score) -> str:
    """What to add to `dualcl run` or `compare` to use the point."""
    import shlex

    return "--set " + " ".join(shlex.quote(f"{k}={v}") for k, v in score.point.settings)


def _shown(sweep: Sweep, scores: Sequence[Score]) -> list[str]:
    from dualcl.results.metrics import COST, METRICS

    there = {key for score in scores for key in score.metrics}
    rest = [k for k in METRICS if k in there and k != sweep.select and k not in COST]
    return [sweep.select, *rest]


def sweep_table(sweep: Sweep, scores: Sequence[Score]) -> str:
    """An aligned table, best first: settings, finished seeds, the metric that decides, the others."""
    from dualcl.results.metrics import METRICS

    keys = [k for k, _ in sweep.points[0].settings]
    shown = _shown(sweep, scores)
    rows = [[*keys, "seeds", *(f"{METRICS[k].title} {'(max)' if METRICS[k].higher_is_better else '(min)'}" for k in shown)]]
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


def align(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of cells as lines with two blanks between columns; columns in `right` are right-aligned."""
    to_right = set(right)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.rjust(w) if i in to_right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def write_sweep(sweep: Sweep, scores: Sequence[Score], out: Path) -> list[Path]:
    """Writes sweep.csv and sweep.json into `out`, best point first."""
    keys = [k for k, _ in sweep.points[0].settings]
    metrics = sorted({key for score in scores for key in score.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "finished", "planned", *(f"{m}_{part}" for m in metrics for part in ("mean", "std", "n")), "error"])
    for score in scores:
        cells: list[Any] = []
        for metric in metrics:
            cells += score.metrics.get(metric, (None, None, 0))
        row = [*(v for _, v in score.point.settings), score.finished, len(score.point.runs), *cells, score.error]
        writer.writerow(["" if v is None else v for v in row])
    best = best_score(sweep, scores)
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
        "format": "dualcl-sweep",
        "version": 1,
        "preset": sweep.preset,
        "method": sweep.method,
        "select": sweep.select,
        "measured_on": sweep.measured_on,
        "best": {"settings": dict(best.point.settings), "use": set_line(best)} if best else None,
        "points": points,
    }
    with atomic_write(out / "sweep.csv") as file:
        file.write(text.getvalue().encode())
    write_json(out / "sweep.json", tree)
    return [out / "sweep.csv", out / "sweep.json"]
