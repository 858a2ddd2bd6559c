"""Doing what a plan says: each run once, by one of the engines."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.text import say
from dualcl.benchmark.grids.plan import Engine, Outcome, Planned, finished
from dualcl.benchmark.grids.survey import write_plan
from dualcl.benchmark.runs.mirror import PLAN, pull_records, push_files
from dualcl.benchmark.runs.progress import Reporter


def execute(
    plan: Sequence[Planned],
    *,
    engine: str = "local",
    jobs: int = 1,
    address: str | None = None,
    quiet: bool = False,
    root: Path | None = None,
    url: str | None = None,
    before: Callable[[Sequence[Planned]], bool] | None = None,
) -> list[Outcome]:
    """Does all planned runs that have no finished record; one that fails does not stop the others.

    `jobs` > 1 (engine local) runs that many processes side by side, each with its share of the cores; `address` is a
    Ray cluster's. `root`, where given, gets the plan (grid.json); with `url` it is the local copy of what lies there.
    KeyboardInterrupt stops them all, resumable. `before` gets the runs that are to be done, and says whether they are.
    """
    refresh = None if url is None else partial(pull_records, url)
    doer = make_engine(engine, jobs=jobs, address=address, quiet=quiet, refresh=refresh)
    if refresh is not None:
        refresh()
    overview = Reporter(quiet=quiet)
    checked = {planned.out: finished(planned) for planned in plan}
    done = {out: why for out, why in checked.items() if why is not None}
    waiting = [planned for planned in plan if planned.out not in done]
    if before is not None and not before(waiting):
        return []
    if root is not None:
        write_plan(root, plan)
        if url is not None:
            push_files(root / PLAN, url)
    outcomes = {planned.out: Outcome(planned, 0) for planned in plan if planned.out in done}
    for out, outcome in outcomes.items():
        unsure = f"; its files could not be checked ({done[out]})" if done[out] else ""
        overview.note(f"{outcome.planned.label}: finished already, in {outcome.planned.remote or out}{unsure}")
    if waiting:
        outcomes.update({outcome.planned.out: outcome for outcome in doer.do(waiting)})
        if refresh is not None:
            refresh()
    failed = {out: outcome.error for out, outcome in outcomes.items() if outcome.code}
    if root is not None and failed:
        write_plan(root, plan, failed)
    return [outcomes[planned.out] for planned in plan]


def conclude(outcomes: Sequence[Outcome], quiet: bool) -> int:
    """Tells how many runs finished, and of each that did not, why; the largest of their exit codes.

    Where all finished, `quiet` says nothing.
    """
    bad = [o for o in outcomes if o.code]
    if bad or not quiet:
        say(f"{len(outcomes) - len(bad)} of {len(outcomes)} runs finished")
    for o in bad:
        say(f"failed: {o.planned.label}: {o.error}")
    return max((o.code for o in bad), default=0)


#: imported when asked for, so that a wrong plan is refused before torch is there
ENGINES = {"local": "dualcl.benchmark.grids.local", "ray": "dualcl.benchmark.grids.ray"}


def make_engine(
    name: str,
    *,
    jobs: int = 1,
    address: str | None = None,
    quiet: bool = False,
    refresh: Callable[[], object] | None = None,
) -> Engine:
    """The engine called `name`; UserError when there is none, or it has no use for what was given.

    `refresh` fetches the runs' records, where they do not lie in a folder that this machine sees.
    """
    if name not in ENGINES:
        raise UserError(f"unknown --engine {name!r}; {nearest(name, ENGINES, 'engines')}")
    made: Engine = importlib.import_module(ENGINES[name]).make(jobs, address, quiet, refresh)
    return made


def slurm_script(plan: Sequence[Planned], out: str, options: Iterable[str]) -> str:
    """See `slurm.array_script`, which asks torch for GPUs."""
    return str(importlib.import_module("dualcl.benchmark.grids.slurm").array_script(plan, out, options))
