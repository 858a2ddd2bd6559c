"""Runs as tasks of a Ray cluster: its scheduling, retries and resources, none of our own.

Each run is one task that starts `dualcl run` as a child process: no run takes a worker with it, and no worker's end
leaves a run behind. Run folders lie in a directory that all nodes share, or at a URL. When a node or worker is lost or
a run is pre-empted, Ray starts the task again, elsewhere; the run waits until its folder is free and goes on from its
checkpoint. A run that fails by itself (exit code 1 or 2) is not tried again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dualcl.benchmark.core.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, UserError
from dualcl.benchmark.core.machine import package_version, source_state, usable_cpus
from dualcl.benchmark.core.registry import texts
from dualcl.benchmark.core.text import printable
from dualcl.benchmark.grids.child import GRACE_SECONDS, Child
from dualcl.benchmark.grids.plan import Needs, Outcome, Planned, needs, outcome_of
from dualcl.benchmark.grids.status import LiveTable

#: how often Ray starts a task again that was interrupted or whose worker or node was lost
RETRIES = 10
#: what of the driver's environment a run gets too
_PASSED_ON = ("DUALCL_", "HF_", "HUGGINGFACE_", "TORCH_")


class Interrupted(Exception):
    """The run was told to stop or killed, and can go on: Ray starts the task again."""


@dataclass(frozen=True)
class Job:
    """A task for Ray: what it needs, and the arguments of the function that does it."""

    name: str
    needs: Needs
    arguments: tuple[Any, ...]


@contextlib.contextmanager
def cluster(address: str, **local: Any) -> Iterator[Any]:
    """The module `ray`, connected to a cluster: "auto", HOST:PORT, or "local": one on this machine, for this process.

    `local`: keywords of `ray.init` for a local one. UserError without Ray, or where no cluster answers. A process that
    is connected stays so.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        import ray
    except ImportError:
        raise UserError('--engine ray needs Ray: pip install "dualcl[ray]"') from None
    if ray.is_initialized():
        yield ray
        return
    own = {"include_dashboard": False, "object_store_memory": 2**27, **local} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, configure_logging=True, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no Ray cluster at {address} ({printable(str(error))}); start one with `ray start --head`, "
            "or use --address local"
        ) from None
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, handler)  # Ray's ends the process at once
    try:
        yield ray
    finally:
        ray.shutdown()


def gather(ray: Any, work: Callable[..., Any], jobs: Sequence[Job]) -> Generator[tuple[int, Any], None, None]:
    """`work(*job.arguments)` for all jobs: (index, result, or the exception that ended it) as they are done.

    Leaving early, or an interrupt, cancels the rest and waits for that.
    """
    task = ray.remote(max_retries=RETRIES, retry_exceptions=[Interrupted])(work)
    left = {}
    for i, job in enumerate(jobs):
        options: dict[str, Any] = {"num_cpus": job.needs.cpus, "num_gpus": job.needs.gpus, "name": job.name}
        if job.needs.memory_gib is not None:
            options["memory"] = int(job.needs.memory_gib * 2**30)
        left[task.options(**options).remote(*job.arguments)] = i
    try:
        while left:
            # with a limit, as an interrupt is heard between two calls alone
            for ref in ray.wait(list(left), timeout=0.5)[0]:
                i = left.pop(ref)
                try:
                    yield i, ray.get(ref)
                except ray.exceptions.RayError as error:
                    yield i, error
    finally:
        until = time.monotonic() + GRACE_SECONDS
        while left and time.monotonic() < until:
            for ref in left:  # again and again: Ray does not reach a task that is about to begin
                ray.cancel(ref)
            for ref in ray.wait(list(left), num_returns=len(left), timeout=3)[0]:
                del left[ref]
        for ref in left:  # a worker that hears nothing is killed, and its run with it; that resumes as any other
            ray.cancel(ref, force=True)
        if left:
            ray.wait(list(left), num_returns=len(left), timeout=10)


class RayEngine:
    """The engine `ray`."""

    def __init__(self, address: str, quiet: bool = False, refresh: Callable[[], object] | None = None) -> None:
        self.address = address
        self.quiet = quiet
        self.refresh = refresh

    def do(self, plan: Sequence[Planned]) -> list[Outcome]:
        """See Engine."""
        with cluster(self.address, num_cpus=usable_cpus()) as ray:
            cuda = ray.cluster_resources().get("GPU", 0) > 0
            jobs = [_job(planned, needs(planned, cuda=cuda)) for planned in plan]
            self._check(ray, jobs)
            outcomes: dict[int, Outcome] = {}
            table = contextlib.nullcontext() if self.quiet else LiveTable(plan, sys.stderr, self.refresh)
            with table, contextlib.closing(gather(ray, _run, jobs)) as results:
                for i, result in results:
                    outcomes[i] = _outcome(plan[i], result)
            return [outcomes[i] for i in range(len(plan))]

    def _check(self, ray: Any, jobs: Sequence[Job]) -> None:
        """A run that no node can take would wait for ever, or for a cluster that grows."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for job in jobs:
            asked = {"CPU": job.needs.cpus, "GPU": job.needs.gpus, "memory": (job.needs.memory_gib or 0) * 2**30}
            if any(all(node.get(k, 0) >= n for k, n in asked.items()) for node in nodes):
                continue
            wants = f"{job.needs.cpus} CPUs, {job.needs.gpus:g} GPUs, {job.needs.memory_gib or 0:g} GiB"
            text = f"no node has what {job.name} asks for ({wants}); see resources.* in `dualcl show PRESET`"
            if self.address == "local":
                raise UserError(text)
            print(f"dualcl: {text}; waiting for one", file=sys.stderr, flush=True)
            return


def _job(planned: Planned, asked: Needs) -> Job:
    sets = [f"threads={asked.cpus}"] if planned.resolved.general.threads is None else []
    command = [*planned.arguments(*sets), "--quiet", "--wait"]
    passed_on = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
    files = {p.reference: texts(p) for p in planned.resolved.plugins.values() if not p.package}
    return Job(planned.label, asked, (command, asked.cpus, os.getcwd(), passed_on, _version(), files))


def _version() -> tuple[str | None, str | None]:
    return package_version("dualcl"), source_state()[0]


def _run(
    command: Sequence[str],
    threads: int,
    cwd: str,
    environment: dict[str, str],
    version: tuple[str | None, str | None],
    files: Mapping[str, Mapping[str, bytes]] = MappingProxyType({}),
) -> tuple[int, str]:
    """On a node: does one run; returns its exit code and the last line of its stderr. Raises Interrupted.

    `files`: `registry.texts` of plug-ins by what names them in the command: a node need not have the driver's files.
    """
    if _version() != version:
        here, there = (f"{v} ({commit or 'no commit'})" for v, commit in (_version(), version))
        return EXIT_USER, f"node {platform.node()} has dualcl {here}, the driver {there}; install the same one"
    if not os.path.isdir(cwd):
        return EXIT_USER, f"node {platform.node()} has no folder {cwd}; start from one that all nodes share"
    with tempfile.TemporaryDirectory(prefix="dualcl-") as place:
        return _waited(Child(_at(place, command, files), threads=threads, cwd=cwd, environment=environment))


def _at(place: str, command: Sequence[str], files: Mapping[str, Mapping[str, bytes]]) -> list[str]:
    """The command with the plug-ins' files written into folders of `place`."""
    words = list(command)
    for i, (reference, written) in enumerate(files.items()):
        own = [Path(place, str(i), name) for name in written]
        for path, text in zip(own, written.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        new = f"{own[0]}:{reference.rpartition(':')[2]}"
        words = [w.replace(json.dumps(reference), json.dumps(new)).replace(reference, new) for w in words]
    return words


def _waited(child: Child) -> tuple[int, str]:
    try:
        code = child.wait()
    except BaseException:
        while child.process.poll() is None:
            with contextlib.suppress(KeyboardInterrupt):  # the driver cancels until we are done
                child.stop()
        raise
    if code < 0 or code == EXIT_INTERRUPTED:
        raise Interrupted(f"signal {-code}" if code < 0 else child.last)
    return code, child.last


def _outcome(planned: Planned, result: Any) -> Outcome:
    if not isinstance(result, BaseException):
        return outcome_of(planned, *result)
    cause = getattr(result, "cause", None) or result
    text = printable(f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}")
    return Outcome(planned, EXIT_FAILED, f"{text}; Ray has given up ({RETRIES} retries), the same command resumes")


def make(jobs: int, address: str | None, quiet: bool, refresh: Callable[[], object] | None) -> RayEngine:
    """The engine `ray`."""
    if jobs != 1:
        raise UserError("--jobs is for --engine local; with Ray the nodes' resources decide (--set resources.cpus=N)")
    return RayEngine(address or "auto", quiet, refresh)
