"""The same runs on one process and on several: what differs.

`python tests/benchmark/core/process_runs.py compare PRESET A,B,C [--processes 2] [KEY=VALUE ...]` prints a table. It
is its own worker: `torchrun ... process_runs.py work JOBS.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Job:
    """Runs of methods on one preset, each in `out/METHOD`; `stop`: a step to be interrupted at, "task 2, step 1"."""

    preset: str
    methods: Sequence[str]
    out: str
    sets: Sequence[str] = ()
    stop: str = ""


def do(processes: int, jobs: Sequence[Job]) -> None:
    """Does all jobs: those of one process in this one, which has its imports; RuntimeError with what others said."""
    if processes == 1:
        for job in jobs:
            work(job)
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "jobs.json"
        file.write_text(json.dumps([asdict(job) for job in jobs]))
        done = subprocess.run(
            [*launcher, __file__, "work", str(file)],
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DUALCL_CACHE": str(Path(tmp) / "cache")},
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])


def work(job: Job) -> None:
    """One process's part; keeps all predictions of every evaluation in `OUT/METHOD/predictions.npy`."""
    from dualcl.benchmark.config.resolve import resolve
    from dualcl.benchmark.core.domain import Domain
    from dualcl.benchmark.core.processes import join
    from dualcl.benchmark.domains.classification import Classification
    from dualcl.benchmark.domains.customization import Customization
    from dualcl.benchmark.runs.folder import RunFolder, Spectator
    from dualcl.benchmark.runs.progress import Reporter
    from dualcl.benchmark.runs.runner import Run

    # isort: split
    import torch

    said: list[torch.Tensor] = []

    class Heard(Classification):
        def _predictions(self, task: int) -> list[torch.Tensor]:
            found = super()._predictions(task)
            said.extend(found)
            return found

    class Stopped(Run):
        def step(self, batch: Any, optimizer: Any, factor: float, where: str, ended: bool = False) -> Any:
            if where == job.stop:
                raise KeyboardInterrupt
            return super().step(batch, optimizer, factor, where, ended)

    for method in job.methods:
        said.clear()
        resolved = resolve(job.preset, method, ["device=cpu", "train.log_every=1", *job.sets])
        processes = join("cpu")
        folder = (RunFolder if processes.main else Spectator)(Path(job.out) / method)
        folder.path.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        domain: Domain = (Heard if resolved.domain == "classification" else Customization)(
            resolved, torch.device("cpu")
        )
        record: dict[str, Any] = {"tasks": [], "matrix": {"rows": []}, "measured": {"tasks": []}}
        try:
            Stopped(resolved, folder, Reporter(quiet=True), domain, processes).execute(record)
        except KeyboardInterrupt:
            assert job.stop
            continue
        finally:
            folder.close()
        if processes.main:
            (folder.path / "rows.json").write_text(json.dumps(record["matrix"]["rows"]))
            np.save(folder.path / "predictions.npy", torch.cat(said).numpy() if said else np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Difference:
    """Between two runs: of losses (absolute), of predictions (how many differ, of how many), of matrices, of pixels."""

    loss: float
    steps: int
    differing: int
    predictions: int
    matrix: float
    pixels: int


def difference(one: Path, other: Path) -> Difference:
    """What differs between two runs of one method; ValueError when they did not do the same steps."""
    logs = [_log(path) for path in (one, other)]
    if [(e["task"], e["step"]) for e in logs[0]] != [(e["task"], e["step"]) for e in logs[1]]:
        raise ValueError(f"{one} and {other} logged other steps")
    loss = max((abs(a["loss"] - b["loss"]) for a, b in zip(*logs, strict=True)), default=0.0)
    said = [np.load(p / "predictions.npy") for p in (one, other)]
    rows = [json.loads((p / "rows.json").read_text()) for p in (one, other)]
    cells = [[x for row in r for k in sorted(row) if k != "after_task" for x in row[k]] for r in rows]
    matrix = max(abs((a or 0) - (b or 0)) for a, b in zip(*cells, strict=True))
    pictures = [sorted((p / "samples").rglob("*.png")) for p in (one, other)]
    pixels = [np.stack([np.asarray(Image.open(f), dtype=np.int64) for f in found]) for found in pictures if found]
    return Difference(
        loss,
        len(logs[0]),
        int((said[0] != said[1]).sum()) if len(said[0]) == len(said[1]) else -1,
        len(said[0]),
        float(matrix),
        int(np.abs(pixels[0] - pixels[1]).max()) if pixels else 0,
    )


def _log(run: Path) -> list[dict[str, Any]]:
    file = run / "log.jsonl"  # a method without steps has none
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    """Prints one row per method: one process against several."""
    what, first, *rest = sys.argv[1:]
    if what == "work":
        for job in json.loads(Path(first).read_text()):
            work(Job(**job))
        return
    methods = rest.pop(0).split(",")
    processes = int(rest.pop(rest.index("--processes") + 1)) if "--processes" in rest else 2
    sets = [word for word in rest if "=" in word]
    print(
        "| method | steps | largest difference in loss | differing predictions | in the matrix | in pixels (of 255) |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as tmp:
        for n in (1, processes):
            do(n, [Job(first, methods, f"{tmp}/{n}", sets)])
        for method in methods:
            d = difference(Path(tmp) / "1" / method, Path(tmp) / str(processes) / method)
            found = f"{d.differing} of {d.predictions}" if d.predictions else "-"
            print(f"| {method} | {d.steps} | {d.loss:.1e} | {found} | {d.matrix:.1e} | {d.pixels} |", flush=True)


if __name__ == "__main__":
    main()
