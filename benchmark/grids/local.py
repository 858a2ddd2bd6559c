"""The engines of one machine: one run after another, or several side by side."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

from dualcl.benchmark.core.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER,
    RunFailed,
    UserError,
    describe_os_error,
)
from dualcl.benchmark.core.machine import usable_cpus
from dualcl.benchmark.core.text import printable, say
from dualcl.benchmark.grids.child import Child
from dualcl.benchmark.grids.plan import Outcome, Planned, outcome_of
from dualcl.benchmark.grids.status import LiveTable, redraws
from dualcl.benchmark.runs.folder import discard, run_folder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import run


@dataclass(frozen=True)
class Local:
    """One run after another, in this process."""

    quiet: bool = False

    def do(self, plan: Sequence[Planned]) -> list[Outcome]:
        """See Engine."""
        return [self._run(planned) for planned in plan]

    def _run(self, planned: Planned) -> Outcome:
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
        say(f"{planned.label}: {printable(text)}")
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
            child = Child(command, threads=threads, relay=lambda line: say(f"{planned.label}  {line}"))
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


def make(jobs: int, address: str | None, quiet: bool, refresh: Callable[[], object] | None) -> Local | SideBySide:
    """The engine `local`."""
    if address is not None:
        raise UserError("--address is for --engine ray; leave it out")
    return Local(quiet) if jobs == 1 else SideBySide(jobs, quiet, refresh)
