"""Many runs of one preset, one after another or side by side; methods x seeds of a comparison."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dualcl.benchmark.config import Resolved, flatten, load_preset, parse_assignment, resolve
from dualcl.benchmark.environment import usable_cpus
from dualcl.benchmark.errors import EXIT_FAILED, EXIT_USER, RunFailed, UserError
from dualcl.benchmark.progress import Reporter, printable

#: a terminated child may still be writing a checkpoint
GRACE_SECONDS = 60.0
#: `python -m` would put the working directory on sys.path: a checkout's folder datasets/ hides Hugging Face's there
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
        share = max(1, usable_cpus() // jobs)
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        self.threads = min(share, int(wanted)) if wanted.isdecimal() and int(wanted) else share
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


def align(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of cells as lines with two blanks between columns; columns in `right` are right-aligned."""
    to_right = set(right)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.rjust(w) if i in to_right else c.ljust(w) for i, (c, w) in cells).rstrip())
    return lines
