"""A grid on disk: its plan (grid.json) and the state of every run, read from the run folders alone, without torch."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import write_json
from dualcl.benchmark.core.lock import holder
from dualcl.benchmark.runs.mirror import PLAN, REMOTE
from dualcl.results.records import record_checksum

if TYPE_CHECKING:
    from dualcl.benchmark.grids.plan import Planned

#: seconds after which a run at a URL that has written nothing is taken for dead: there is no lock to look at
REMOTE_PATIENCE = 1800.0
STATES = ("waiting", "running", "finished", "failed", "interrupted", "stale", "damaged")


@dataclass(frozen=True)
class PlannedRun:
    """A run as grid.json has it; `folder` is where it lies, `error` why it failed before it had a record."""

    folder: Path
    label: str
    method: str
    seed: int
    error: str = ""


@dataclass(frozen=True)
class RunState:
    """How a run stands. `step` is the last logged one of the task it is at; `written` the time of its last write.

    stale: its record says running, and no process holds the folder; the same command resumes it, as `interrupted`.
    """

    folder: Path
    label: str
    method: str
    seed: int | None
    state: str
    tasks_done: int = 0
    tasks: int | None = None
    step: int | None = None
    steps: int | None = None
    host: str = ""
    written: float | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def done(self) -> float:
        """The part of the run that is done, by tasks and the steps of the present one."""
        if self.state == "finished":
            return 1.0
        within = (self.step or 0) / self.steps if self.steps else 0.0
        return (self.tasks_done + min(within, 1.0)) / self.tasks if self.tasks else 0.0


@dataclass
class Survey:
    """States of the runs below some folders; looks again cheaply, as finished runs stay finished."""

    roots: Sequence[Path]
    _finished: dict[Path, tuple[int, RunState]] = field(default_factory=dict)

    def look(self) -> list[RunState]:
        """All planned runs in the order of their plans, then the others found, in the order of their folders."""
        planned: dict[Path, PlannedRun] = {}
        found: dict[Path, PlannedRun | None] = {}
        for root in self.roots:
            for folder in _folders(root, planned):
                found.setdefault(folder, None)
        runs: dict[Path, PlannedRun | None] = {**planned}
        for folder in found:
            runs.setdefault(folder, None)
        return [self.state(folder, run) for folder, run in runs.items()]

    def state(self, folder: Path, planned: PlannedRun | None) -> RunState:
        """The state of one run."""
        path = folder / "record.json"
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            changed = 0
        known = self._finished.get(folder)
        if known is not None and known[0] == changed:
            return known[1]
        state = read_state(folder, planned)
        if state.state == "finished":
            self._finished[folder] = (changed, state)
        return state


def _folders(root: Path, planned: dict[Path, PlannedRun]) -> Iterator[Path]:
    """Run folders below `root`, by their records; plans on the way go into `planned`."""
    if not root.is_dir():
        raise UserError(f"{root} does not exist; give the folder of a run, of a comparison or of a sweep")
    for here, below, names in os.walk(root):
        below.sort()
        if PLAN in names:
            planned.update({run.folder: run for run in read_plan(Path(here))})
        if "record.json" in names:
            below.clear()
            yield Path(here)


# --- the plan ---------------------------------------------------------------------------------------------------------


def write_plan(root: Path, plan: Sequence[Planned], errors: Mapping[Path, str] | None = None) -> None:
    """Writes grid.json into `root`: what the folder is to hold in the end, earlier plans for it included.

    `errors` of failed runs by folder: one that failed at once leaves no other trace.
    """
    runs = {_relative(run.folder, root): run for run in read_plan(root)}
    for p in plan:
        error = (errors or {}).get(p.out, "")
        runs[_relative(p.out, root)] = PlannedRun(p.out, p.label, p.resolved.method, p.seed, error)
    told = [
        {"folder": k, "label": r.label, "method": r.method, "seed": r.seed, **({"error": r.error} if r.error else {})}
        for k, r in runs.items()
    ]
    try:
        write_json(root / PLAN, {"format": "dualcl-grid", "version": 1, "runs": told})
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error.strerror}; choose another --out") from None


def _relative(folder: Path, root: Path) -> str:
    return Path(os.path.relpath(folder, root)).as_posix()


def read_plan(root: Path) -> list[PlannedRun]:
    """The runs of `root`'s grid.json, none when there is no such file; UserError when it is damaged."""
    path = root / PLAN
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != "dualcl-grid" or tree["version"] != 1:
            raise ValueError(f"format {tree['format']!r}, version {tree['version']!r}")
        return [
            PlannedRun(
                Path(os.path.normpath(root / str(run["folder"]))),
                str(run["label"]),
                str(run["method"]),
                int(run["seed"]),
                str(run.get("error", "")),
            )
            for run in tree["runs"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{path} is not a plan of runs ({error}); remove it, the next `dualcl compare` makes it again"
        raise UserError(why) from None


# --- one run ----------------------------------------------------------------------------------------------------------


def read_state(folder: Path, planned: PlannedRun | None = None) -> RunState:
    """The state of the run in `folder`; `planned` names one that has not begun."""
    record = _json(folder / "record.json")
    held = holder(folder)
    told = _json(folder / REMOTE)
    label, method, seed = (planned.label, planned.method, planned.seed) if planned else (folder.name, "?", None)
    if record is None:
        alive = held is not None and held.alive
        here = held.host if held is not None and alive else ""
        error = planned.error if planned is not None and not alive else ""
        status = "running" if alive else "failed" if error else "waiting"
        return RunState(folder, label, method, seed, status, host=here, error=error)
    try:
        run, tasks = record["run"], record["tasks"]
        status, wall = str(record["status"]), float(record["measured"]["wall_seconds"])
        label = planned.label if planned else f"{run['label']} seed {run['seed']}"
        method, seed, n_tasks = str(run["method"]), int(run["seed"]), 1 if run["joint"] else int(run["n_tasks"])
        steps = int(tasks[-1]["steps"]) or None if tasks else None
    except (KeyError, TypeError, ValueError):
        why = "record.json cannot be read; remove the folder and run it again"
        return RunState(folder, label, method, seed, "damaged", error=why)
    if record.get("sha256") not in (None, record_checksum(record)):  # older records have none
        why = "record.json was changed by hand, or is damaged; put it back, or remove the folder and run it again"
        return RunState(folder, label, method, seed, "damaged", error=why)
    at = _last_log(folder / "log.jsonl") if status != "finished" else None
    step = int(at["step"]) + 1 if at is not None and int(at.get("task") or 0) == len(tasks) else None
    host, written = "", _written(folder)
    if told is not None:
        host, written = str(told.get("host", "")), float(told.get("written", 0))
        alive = status == "running" and time.time() - written < REMOTE_PATIENCE
    else:
        alive = held is not None and held.alive
        host = held.host if held is not None and alive else ""
    if status != "finished":
        status = "running" if alive else "stale" if status == "running" else status
    return RunState(
        folder,
        label,
        method,
        seed,
        status,
        tasks_done=len(tasks),
        tasks=n_tasks,
        step=step,
        steps=steps,
        host=host if status == "running" else "",
        written=written,
        seconds=wall,
        error=str(record.get("error") or "") if status == "failed" else "",
    )


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file, {} when it is damaged, None without the file."""
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _last_log(path: Path) -> Mapping[str, Any] | None:
    """The last whole line of a log."""
    try:
        with open(path, "rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - 4096))
            lines = handle.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                return entry
        except ValueError:
            continue
    return None


def _written(folder: Path) -> float | None:
    times = []
    for name in ("record.json", "log.jsonl", "checkpoints"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


# --- all runs ---------------------------------------------------------------------------------------------------------


def counts(states: Sequence[RunState]) -> dict[str, int]:
    """How many runs are in each state, in the order of STATES, those without any left out."""
    return {name: n for name in STATES if (n := sum(s.state == name for s in states))}


def seconds_left(states: Sequence[RunState]) -> float | None:
    """Time until the last run is done with as many at once as now; None without a running and a finished one.

    A run is taken to need what finished ones of its method did on average, or of all methods where there is none.
    """
    finished = [s for s in states if s.state == "finished" and s.seconds]
    at_once = sum(s.state == "running" for s in states)
    if not finished or not at_once:
        return None
    by_method: dict[str, list[float]] = {}
    for s in finished:
        by_method.setdefault(s.method, []).append(s.seconds)
    typical = {method: statistics.fmean(times) for method, times in by_method.items()}
    overall = statistics.fmean(s.seconds for s in finished)
    left = [(1 - s.done) * typical.get(s.method, overall) for s in states if s.state not in ("finished", "failed")]
    return max(sum(left) / at_once, max(left, default=0.0))
