"""`dualcl bench grid JOBS.json`: a study on Ray's scheduler with a faster clock, beside what arithmetic predicts.

The jobs go through the engine's own code (`ray_engine.gather`) and sleep their seconds / speedup instead of training.
Some are pre-empted or lose their worker once, and go on from their last checkpoint, as runs do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.bench import positive_count
from dualcl.benchmark.engines import Needs
from dualcl.benchmark.errors import RunFailed, UserError
from dualcl.benchmark.ray_engine import Interrupted, Job, cluster, gather

#: seconds of the simulated clock between two checkpoints: what an interrupted job does again at most
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class SimulatedJob:
    """A run as the cost model sees it; `gpus` may be a part of one."""

    name: str
    seconds: float
    gpus: float
    memory_gib: float


def read_jobs(path: Path) -> list[SimulatedJob]:
    """The jobs of a JSON list of {name, seconds, gpus, memory_gib}; UserError that names what is wrong with it."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        jobs = [SimulatedJob(str(j["name"]), *(float(j[k]) for k in ("seconds", "gpus", "memory_gib"))) for j in tree]
    except (KeyError, TypeError, ValueError) as error:
        wanted = '[{"name": "a", "seconds": 60.0, "gpus": 1, "memory_gib": 4}, ...]'
        raise UserError(f"{path} must be a list such as {wanted}: {type(error).__name__}: {error}") from None
    if not jobs or any(not 0 <= x < float("inf") for j in jobs for x in (j.seconds, j.gpus, j.memory_gib)):
        raise UserError(f"{path} must hold at least one job, and no negative numbers")
    return jobs


def predict(jobs: Sequence[SimulatedJob], nodes: int) -> float:
    """Seconds until all are done by list scheduling: whenever there is room, the first of the list that fits begins.

    `nodes` machines of one GPU each; every job takes one CPU of as many.
    """
    now, gpus, cpus = 0.0, float(nodes), nodes
    waiting, running = list(jobs), list[tuple[float, float]]()
    while waiting or running:
        left = []
        for job in waiting:
            if cpus and job.gpus <= gpus + 1e-9:
                cpus, gpus = cpus - 1, gpus - job.gpus
                running.append((now + job.seconds, job.gpus))
            else:
                left.append(job)
        waiting = left
        now, freed = min(running)
        running.remove((now, freed))
        cpus, gpus = cpus + 1, gpus + freed
    return now


def _sleep(seconds: float, speedup: float, memory: str, fault: tuple[str, float] | None) -> None:
    """Stands for a run: sleeps what is left of it. `fault`: ("preempted" | "killed", where), of its first start.

    `memory` is a file that stands for its checkpoint.
    """
    done, first = 0.0, True
    with contextlib.suppress(OSError):
        done, first = float(Path(memory).read_text(encoding="ascii")), False
    if fault is None or not first:
        time.sleep((seconds - done) / speedup)
        return
    kind, where = fault
    time.sleep(seconds * where / speedup)
    Path(memory).write_text(str(seconds * where // CHECKPOINT_SECONDS * CHECKPOINT_SECONDS), encoding="ascii")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise Interrupted("the simulated node is wanted elsewhere")


def _meet(folder: str, count: int) -> None:
    """Waits until `count` workers are there, this one among them."""
    Path(folder, str(os.getpid())).touch()
    while len(os.listdir(folder)) < count:
        time.sleep(0.05)


def simulate(
    jobs: Sequence[SimulatedJob], nodes: int, speedup: float, *, faults: float = 0.02, address: str = "local"
) -> dict[str, Any]:
    """Does `jobs` on `nodes` simulated machines of one GPU and one CPU each, and says how long that took.

    A share `faults` of them is interrupted once, half by pre-emption and half by the death of the worker. Returned
    seconds are of the simulated clock, but `overhead_per_job_seconds` are real ones: how long a machine was not at
    work, per job. Raises RunFailed when a job does not end.
    """
    draw = random.Random(0)
    chosen = draw.sample(range(len(jobs)), round(faults * len(jobs)))
    struck = {i: ("killed" if n % 2 else "preempted", draw.random()) for n, i in enumerate(chosen)}
    largest = max(job.gpus for job in jobs)
    if largest > nodes:
        raise UserError(f"a job asks for {largest:g} GPUs, there are {nodes}; give more --nodes")
    with tempfile.TemporaryDirectory() as folder, cluster(address, num_cpus=nodes, num_gpus=nodes) as ray:
        if (there := ray.cluster_resources().get("CPU", 0)) < nodes:
            raise UserError(f"the cluster has {there:g} CPUs for {nodes} simulated nodes; give fewer --nodes")
        # workers that are there already: a grid of hours does not notice their start, one of seconds would
        workers = Path(folder, "workers")
        workers.mkdir()
        for _ in gather(ray, _meet, [Job("worker", Needs(1, 0.0, None), (str(workers), nodes))] * nodes):
            pass
        tasks = [
            Job(job.name, Needs(1, job.gpus, None), (job.seconds, speedup, f"{folder}/{i}", struck.get(i)))
            for i, job in enumerate(jobs)
        ]
        began = time.perf_counter()
        for i, result in gather(ray, _sleep, tasks):
            if isinstance(result, BaseException):
                raise RunFailed(f"simulated job {jobs[i].name} failed: {result}")
        took = time.perf_counter() - began
        retried = sum(os.path.exists(f"{folder}/{i}") for i in struck)
    predicted = predict(jobs, nodes)
    return {
        "jobs": len(jobs),
        "nodes": nodes,
        "speedup": speedup,
        "work_seconds": sum(job.seconds for job in jobs),
        "predicted_seconds": predicted,
        "scheduled_seconds": took * speedup,
        "retried": retried,
        "overhead_per_job_seconds": (took - predicted / speedup) * nodes / len(jobs),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dualcl bench grid`."""
    parser.add_argument("jobs", type=Path, metavar="JOBS.json", help="a list of {name, seconds, gpus, memory_gib}")
    parser.add_argument("--nodes", type=positive_count, default=8, metavar="N", help="of one GPU; default %(default)s")
    parser.add_argument("--speedup", type=positive_count, default=100, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--fault-percent", type=int, default=2, metavar="N", help="jobs interrupted once; default %(default)s"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there too")


def main(args: argparse.Namespace) -> int:
    """Prints the result as JSON."""
    if not 0 <= args.fault_percent <= 100:
        raise UserError(f"--fault-percent must be from 0 to 100, got {args.fault_percent}")
    result = simulate(read_jobs(args.jobs), args.nodes, args.speedup, faults=args.fault_percent / 100)
    text = json.dumps(result, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    sys.stdout.flush()
    return 0
