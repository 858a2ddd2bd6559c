"""The state of a grid as a table: `dualcl status`, and the live table of a grid that runs."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dualcl.benchmark.core.bar import redraws
from dualcl.benchmark.core.text import align, duration, printable
from dualcl.benchmark.grids.survey import STATES, PlannedRun, RunState, Survey, counts, seconds_left
from dualcl.results.files import csv_cell
from dualcl.results.writers.markdown import markdown_text

if TYPE_CHECKING:
    from dualcl.benchmark.grids.plan import Planned

FORMATS = ("text", "md", "csv", "json")
#: more runs than this are counted by method
MOST_ROWS = 40
COLUMNS = ("run", "state", "task", "step", "written", "host", "error")
_INTERVAL = {True: 1.0, False: 2.0}
_FETCH_INTERVAL = 20.0


def told_apart(states: Sequence[RunState], roots: Sequence[Path]) -> list[RunState]:
    """The states; what shares its label with another run has its folder behind it, below the root where that is one."""
    often = Counter(s.label for s in states)

    def named(state: RunState) -> RunState:
        folder = os.path.relpath(state.folder, roots[0]) if len(roots) == 1 else state.folder
        return replace(state, label=f"{state.label} ({folder})") if often[state.label] > 1 else state

    return [named(s) for s in states]


def _cells(state: RunState, now: float) -> list[str]:
    at = "-"
    if state.tasks:
        at = f"{min(state.tasks_done + (state.state == 'running'), state.tasks)}/{state.tasks}"
    step = f"{state.step}/{state.steps}" if state.step and state.steps else str(state.step or "-")
    written = "-" if state.written is None else f"{duration(now - state.written)} ago"
    return [printable(state.label), state.state, at, step, written, state.host or "-", printable(state.error)]


def _by_method(states: Sequence[RunState]) -> list[list[str]]:
    there = [name for name in STATES if any(s.state == name for s in states)]
    table: dict[str, dict[str, int]] = {}
    for s in states:
        row = table.setdefault(s.method, dict.fromkeys(there, 0))
        row[s.state] += 1
    return [["method", *there], *([method, *map(str, row.values())] for method, row in table.items())]


def totals(states: Sequence[RunState]) -> str:
    """`24 runs: 10 waiting, 3 running, 11 finished; about 2m10s left`."""
    left = seconds_left(states)
    told = f"{len(states)} runs: " + ", ".join(f"{n} {name}" for name, n in counts(states).items())
    return told + (f"; about {duration(left)} left" if left is not None else "")


def text_table(states: Sequence[RunState], rows: int = MOST_ROWS) -> list[str]:
    """A line per run and the totals; for more than `rows` runs counts by method, and who failed or hangs."""
    now = time.time()
    if len(states) <= rows:
        lines = align([list(COLUMNS), *(_cells(s, now) for s in states)])
    else:
        table = _by_method(states)
        lines = align(table, right=range(1, len(table[0])))
        bad = [s for s in states if s.state in ("failed", "stale", "damaged")]
        room = max(0, rows - len(lines) - 2)
        if bad and room:
            lines += ["", *align([_cells(s, now) for s in bad[:room]])]
        if len(bad) > room:
            lines.append(f"... and {len(bad) - room} more that failed, are stale or damaged")
    return [*lines, "", totals(states)]


def _row(state: RunState) -> dict[str, Any]:
    written = None if state.written is None else datetime.fromtimestamp(state.written, timezone.utc)
    return {
        "folder": str(state.folder),
        "run": state.label,
        "method": state.method,
        "seed": state.seed,
        "state": state.state,
        "tasks_done": state.tasks_done,
        "tasks": state.tasks,
        "step": state.step,
        "steps": state.steps,
        "host": state.host,
        "written": None if written is None else written.isoformat(timespec="seconds"),
        "seconds": round(state.seconds, 3),
        "error": state.error,
    }


def render(states: Sequence[RunState], kind: str) -> str:
    """The states as `text`, `md`, `csv` or `json` (with totals and the seconds left)."""
    if kind == "text":
        return "\n".join(text_table(states)) + "\n"
    if kind == "json":
        tree = {"counts": counts(states), "seconds_left": seconds_left(states), "runs": [_row(s) for s in states]}
        return json.dumps(tree, indent=1) + "\n"
    if kind == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(_row(RunState(Path(), "", "", 0, ""))), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: csv_cell(value) for key, value in _row(s).items()} for s in states)
        return out.getvalue()
    now = time.time()
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(_cells(s, now) for s in states)]
    lines = ["| " + " | ".join(row if row[0] == "---" else map(markdown_text, row)) + " |" for row in rows]
    return "\n".join([*lines, "", totals(states)]) + "\n"


def watch(look: Callable[[], list[RunState]], seconds: float, stream: TextIO) -> None:
    """Shows the table again every `seconds`, in place on a terminal, until no run waits, runs or could resume."""
    screen = _Screen(stream)
    while True:
        states = look()
        screen.show(text_table(states, screen.rows))
        if not any(s.state in ("waiting", "running") for s in states):
            return
        time.sleep(seconds)


class _Screen:
    """Lines that replace those shown before, where the stream can do that."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._shown = 0

    @property
    def rows(self) -> int:
        """How many runs get a line of their own."""
        return min(MOST_ROWS, shutil.get_terminal_size().lines - 4) if redraws(self.stream) else MOST_ROWS

    def show(self, lines: Sequence[str]) -> None:
        """Shows these lines."""
        up = ""
        if redraws(self.stream):
            width = shutil.get_terminal_size().columns - 1
            lines = [f"{line[:width]}\x1b[K" for line in lines]
            up = f"\x1b[{self._shown}F\x1b[J" if self._shown else ""
        self._shown = len(lines)
        self.stream.write(up + "\n".join(lines) + "\n")
        self.stream.flush()


class LiveTable:
    """Inside `with`: how the planned runs stand, redrawn on a terminal, else a line for every change.

    `refresh` is called before a look, for runs whose files have to be fetched first; not more often than every
    _FETCH_INTERVAL seconds.
    """

    def __init__(self, plan: Sequence[Planned], stream: TextIO, refresh: Callable[[], object] | None = None) -> None:
        self._runs = [PlannedRun(p.out, p.label, p.resolved.method, p.seed) for p in plan]
        self._survey = Survey(())
        self._refresh = refresh
        self._fetch_at = 0.0
        self._screen = _Screen(stream)
        self._told: dict[Path, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="dualcl-table")

    def __enter__(self) -> LiveTable:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._fetch_at = 0.0
        self.update()

    def update(self) -> None:
        """Looks, and shows what it sees."""
        if self._refresh is not None and time.monotonic() >= self._fetch_at:
            self._refresh()
            self._fetch_at = time.monotonic() + _FETCH_INTERVAL
        states = [self._survey.state(run.folder, run) for run in self._runs]
        if redraws(self._screen.stream):
            self._screen.show(text_table(states, self._screen.rows))
            return
        for s in states:
            line = _change(s)
            if line != self._told.get(s.folder, "waiting"):
                self._screen.stream.write(f"{printable(f'{s.label}: {line}')}\n")
            self._told[s.folder] = line
        self._screen.stream.flush()

    def _loop(self) -> None:
        while not self._over.wait(_INTERVAL[redraws(self._screen.stream)]):
            try:
                self.update()
            except Exception as error:  # the grid goes on without its table
                print(f"dualcl: no table of the grid now: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                return


def _change(state: RunState) -> str:
    if state.state != "running":
        return f"{state.state}: {state.error}" if state.error else state.state
    where = f" on {state.host}" if state.host else ""
    return (
        f"running{where}, task {min(state.tasks_done + 1, state.tasks)}/{state.tasks}"
        if state.tasks
        else f"starting{where}"
    )
