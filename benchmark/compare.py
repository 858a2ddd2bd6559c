"""Many runs of one preset, one after another or side by side; methods x seeds of a comparison."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dualcl.benchmark.config import Resolved, bundled_presets, flatten, load_preset, parse_assignment, resolve
from dualcl.benchmark.errors import UserError
from dualcl.benchmark.progress import Reporter


@dataclass(frozen=True)
class Planned:
    """One run to be done: its checked configuration, the arguments that gave it, and its directory."""

    resolved: Resolved
    preset: str
    sets: tuple[str, ...]
    out: Path
    label: str
    #: where the run's files go in the end, a URL; `out` is then their copy on this machine
    remote: str = ""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.resolved.general.seed

    def arguments(self, *sets: str) -> list[str]:
        """What follows `dualcl` to do this run, from any folder, with these settings too."""
        preset = self.preset if self.preset in bundled_presets() else os.path.abspath(self.preset)
        command = ["run", preset, self.resolved.method, "--seed", str(self.seed)]
        command += ["--out", self.remote or os.path.abspath(self.out)]
        own = [text for text in (*self.sets, *sets) if parse_assignment(text)[0] != "seed"]
        return command + (["--set", *own] if own else [])


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
    preset: str,
    methods: Sequence[str],
    seeds: Sequence[int] | None,
    sets: Sequence[str],
    out: Path,
    url: str | None = None,
) -> list[Planned]:
    """Checks every method with every seed and says where each run goes: `<out>/<method>-seed<seed>`, or below a URL.

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
            remote = "" if url is None else f"{url.rstrip('/')}/{folder.name}"
            plan.append(Planned(resolved, preset, tuple(sets), folder, label, remote))
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


def execute(
    plan: Sequence[Planned],
    *,
    engine: str = "local",
    jobs: int = 1,
    address: str | None = None,
    quiet: bool = False,
    root: Path | None = None,
    url: str | None = None,
) -> list[Outcome]:
    """Does all planned runs that have no finished record; one that fails does not stop the others.

    `jobs` > 1 (engine local) runs that many processes side by side, each with its share of the cores; `address` is a
    Ray cluster's. `root`, where given, gets the plan (grid.json); with `url` it is the local copy of what lies there.
    KeyboardInterrupt stops them all, resumable.
    """
    from dualcl.benchmark.engines import make_engine
    from dualcl.benchmark.grid import PLAN, write_plan
    from dualcl.benchmark.mirror import pull_records, push_files

    refresh = None if url is None else partial(pull_records, url)
    doer = make_engine(engine, jobs=jobs, address=address, quiet=quiet, refresh=refresh)
    if refresh is not None:
        refresh()
    overview = Reporter(quiet=quiet)
    finished = [planned for planned in plan if is_finished(planned)]
    done = {planned.out for planned in finished}
    waiting = [planned for planned in plan if planned.out not in done]
    if root is not None:
        write_plan(root, plan)
        if url is not None:
            push_files(root / PLAN, url)
    for planned in finished:
        overview.note(f"{planned.label}: finished already, in {planned.remote or planned.out}")
    outcomes = {planned.out: Outcome(planned, 0) for planned in finished}
    if waiting:
        outcomes.update({outcome.planned.out: outcome for outcome in doer.do(waiting)})
        if refresh is not None:
            refresh()
    failed = {out: outcome.error for out, outcome in outcomes.items() if outcome.code}
    if root is not None and failed:
        write_plan(root, plan, failed)
    return [outcomes[planned.out] for planned in plan]


def describe_os_error(error: OSError, place: str | Path) -> str:
    """`FILE: No space left on device`; writing to an open file gives no name, then `place` stands for it."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{place if error.filename is None else error.filename}: {reason}"


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """The largest exit code of the runs."""
    return max((outcome.code for outcome in outcomes), default=0)


def summary_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """How many runs finished, and one line per run that did not."""
    bad = [o for o in outcomes if o.code]
    lines = [f"{len(outcomes) - len(bad)} of {len(outcomes)} runs finished"]
    return lines + [f"failed: {o.planned.label}: {o.error}" for o in bad]


def align(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of cells as lines with two blanks between columns; columns in `right` are right-aligned."""
    to_right = set(right)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.rjust(w) if i in to_right else c.ljust(w) for i, (c, w) in cells).rstrip())
    return lines
