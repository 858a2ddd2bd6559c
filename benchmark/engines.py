"""Engines do the runs of a plan: `local` on this machine, one after another or side by side; `ray` on a cluster."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

from dualcl.benchmark.child import Child
from dualcl.benchmark.compare import Outcome, Planned, describe_os_error
from dualcl.benchmark.environment import usable_cpus
from dualcl.benchmark.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, RunFailed, UserError, nearest
from dualcl.benchmark.progress import Reporter, printable
from dualcl.benchmark.status import LiveTable, redraws

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Does runs, resumes those that were begun, and says how each ended."""

    def do(self, plan: Sequence[Planned]) -> list[Outcome]:
        """One outcome per run, in the order of the plan; a run that fails does not stop the others.

        KeyboardInterrupt stops all of them, resumable.
        """


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
    if name == "local":
        if address is not None:
            raise UserError("--address is for --engine ray; leave it out")
        return Local(quiet) if jobs == 1 else SideBySide(jobs, quiet, refresh)
    if jobs != 1:
        raise UserError("--jobs is for --engine local; with Ray the nodes' resources decide (--set resources.cpus=N)")
    from dualcl.benchmark.ray_engine import RayEngine

    return RayEngine(address or "auto", quiet, refresh)


@dataclass(frozen=True)
class Needs:
    """What a run asks of a scheduler; memory None: nothing said."""

    cpus: int
    gpus: float
    memory_gib: float | None


def needs(planned: Planned, *, cuda: bool) -> Needs:
    """The declared resources of a run, completed; `cuda`: whether device=auto finds a GPU where it will run."""
    general, asked = planned.resolved.general, planned.resolved.resources
    on_gpu = general.device.startswith("cuda") or (general.device == "auto" and cuda)
    gpus = float(on_gpu) if asked.gpus is None else asked.gpus
    return Needs(asked.cpus or general.threads or 1, gpus, asked.memory_gib)


def outcome_of(planned: Planned, code: int, last: str) -> Outcome:
    """How a child process's end reads: its exit code (negative: a signal) and the last line of its stderr."""
    if code == 0:
        return Outcome(planned, 0)
    if code < 0:
        why = " (out of memory?)" if code == -9 else ""
        return Outcome(planned, EXIT_FAILED, f"killed by signal {-code}{why}; the same command resumes")
    text = last.removeprefix("dualcl: error: ").removeprefix("dualcl: run failed: ").removeprefix("dualcl: ")
    return Outcome(planned, EXIT_USER if code == EXIT_USER else EXIT_FAILED, printable(text))


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Local:
    """One run after another, in this process."""

    quiet: bool = False

    def do(self, plan: Sequence[Planned]) -> list[Outcome]:
        """See Engine."""
        return [self._run(planned) for planned in plan]

    def _run(self, planned: Planned) -> Outcome:
        from dualcl.benchmark.mirror import discard, run_folder
        from dualcl.benchmark.runner import run

        reporter = Reporter(planned.label, quiet=self.quiet)
        try:
            folder = run_folder(planned.remote or planned.out)
            run(planned.resolved, folder, reporter)
            discard(folder)
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


class SideBySide:
    """Several runs at a time, each a child process with its share of the cores."""

    def __init__(self, jobs: int, quiet: bool = False, refresh: Callable[[], object] | None = None) -> None:
        self.jobs = jobs
        self.quiet = quiet
        self.refresh = refresh
        self._running: set[Child] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def do(self, plan: Sequence[Planned]) -> list[Outcome]:
        """See Engine."""
        jobs = min(self.jobs, len(plan))
        share = max(1, usable_cpus() // jobs)
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        threads = min(share, int(wanted)) if wanted.isdecimal() and int(wanted) else share
        pool = ThreadPoolExecutor(max_workers=jobs)
        table = not self.quiet and redraws(sys.stderr)
        try:
            with LiveTable(plan, sys.stderr, self.refresh) if table else nullcontext():
                futures = [pool.submit(self._run, planned, threads, self.quiet or table) for planned in plan]
                return [future.result() for future in futures]
        except BaseException:
            self._stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, planned: Planned, threads: int, quiet: bool) -> Outcome:
        sets = [f"threads={threads}"] if planned.resolved.general.threads is None else []
        command = [*planned.arguments(*sets), *(["--quiet"] if quiet else [])]
        with self._lock:
            if self._stopped:
                return Outcome(planned, EXIT_INTERRUPTED, "not started")
            child = Child(command, threads=threads, relay=lambda line: _tell(f"{planned.label}  {line}"))
            self._running.add(child)
        try:
            return outcome_of(planned, child.wait(), child.last)
        finally:
            with self._lock:
                self._running.discard(child)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            children = list(self._running)
        for child in children:
            child.ask()
        for child in children:
            child.stop()
