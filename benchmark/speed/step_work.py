"""What `dualcl bench step` measures of one method, in a process of its own: JSON on stdin and stdout."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.devices import peak_mib, pick_device, reset_peak
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.machine import environment
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.core.settings import Resolved
from dualcl.benchmark.domains.classification import Classification, StreamConfig
from dualcl.benchmark.models.vit import BackboneConfig, load_backbone
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run, device_name
from dualcl.benchmark.runs.step import make_optimizer, optimizer_tensors
from dualcl.benchmark.speed.common import Job
from dualcl.datasets.base import ClassData, ImageSet

#: steps before anything is timed: the first ones make the optimiser's state and warm caches
WARM_UP = 2
#: batches of test images in a measured evaluation
TEST_BATCHES = 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Noise:
    """Image i of a part: random pixels, a function of (part, i), made when asked for."""

    part: str
    size: int

    def __call__(self, i: int) -> Image.Image:
        """Image i."""
        rng = numpy_generator(0, "bench", self.part, i)
        return Image.fromarray(rng.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8))


def noise(tasks: int, train: int, test: int, size: int, classes: int = 2) -> ClassData:
    """Random images: `train` and `test` of them per task, `classes` classes per task, `size` x `size` pixels."""

    def part(name: str, count: int) -> ImageSet:
        labels = np.concatenate([classes * t + np.arange(count) % classes for t in range(tasks)])
        ids = tuple(f"{name}/{i}" for i in range(len(labels)))
        return ImageSet(ids, labels, Noise(name, size), "noise")

    names = tuple(f"class {c}" for c in range(classes * tasks))
    return ClassData("noise", names, part("train", train), part("test", test), "noise", "noise")


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Wall time of `work`, the device's queue emptied before and after."""
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peaks(device: torch.device) -> None:
    """Starts new peaks of the process and, on a GPU, of the device."""
    for each in {device, CPU}:
        reset_peak(each)


def peaks(device: torch.device) -> dict[str, float | None]:
    """Peaks since `reset_peaks`, MiB: resident set of the process, tensors allocated on the GPU (None without one)."""
    return {"process": peak_mib(CPU), "cuda": peak_mib(device) if device.type == "cuda" else None}


class Bare:
    """The backbone alone, frozen, on one batch of noise."""

    def __init__(self, resolved: Resolved, device: torch.device) -> None:
        self.model, info = load_backbone(resolved.section("backbone", BackboneConfig))
        self.model.to(device)
        self.device = device
        self.bf16 = resolved.general.precision == "bf16"
        shape = (resolved.train.batch_size, 3, info.input_size, info.input_size)
        self.images = torch.randn(shape, generator=torch_generator(0, "bench", "bare")).to(device)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features: torch.Tensor = self.model(images)
        return features

    @torch.no_grad()
    def evaluate(self) -> None:
        """A forward pass."""
        self._features(self.images)

    def train(self) -> None:
        """A forward pass, and backward to the input through frozen weights."""
        images = self.images.detach().requires_grad_(True)
        self._features(images).float().sum().backward()


def paired(
    device: torch.device, repeats: int, ours: Callable[[], object], bare: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of both per repeat, one right after the other in alternating order, after one unmeasured round."""
    ours()
    bare()
    times: dict[str, list[float]] = {"seconds": [], "bare_seconds": []}
    pair = [("seconds", ours), ("bare_seconds", bare)]
    for i in range(repeats):
        for name, work in pair if i % 2 == 0 else reversed(pair):
            times[name].append(seconds(device, work))
    return times


def live_mib() -> float:
    """All tensors that Python holds in this process, MiB, shared storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / 2**20


class TaskSteps:
    """One task of a run, begun: its steps, one at a time."""

    def __init__(self, run: Run, index: int) -> None:
        self.run = run
        self.index = index
        self.optimizer = make_optimizer(run.train, run.groups(run.begin(index)), run.device)
        self.batches = enumerate(run.domain.batches(index, 0))

    def step(self) -> None:
        """Fetches a batch and trains on it."""
        number, batch = next(self.batches)
        self.run.step(batch, self.optimizer, 1.0, f"task {self.index + 1}, step {number}")

    def end(self) -> None:
        """Ends the task."""
        self.run.method.end_task(self.index)

    def held(self) -> dict[str, int]:
        """Tensors of the method (parameters and buffers) and of the optimiser: how many, and how many numbers."""
        method: nn.Module = self.run.method
        own = {id(t): t for t in [*method.parameters(), *method.buffers()]}
        tensors = [*own.values(), *optimizer_tensors(self.optimizer).values()]
        return {"tensors": len(tensors), "numbers": sum(t.numel() for t in tensors)}


def measure_bare(resolved: Resolved, job: Job) -> dict[str, Any]:
    """The bare backbone: the peak of training, and seconds of training and evaluation per batch."""
    device = pick_device(resolved.general.device)
    bare = Bare(resolved, device)
    reset_peaks(device)
    for _ in range(WARM_UP):
        bare.train()
    point: dict[str, Any] = {"task": None, "peak_mib": peaks(device)}
    batch = resolved.train.batch_size
    for name, work in (("train", bare.train), ("first", bare.evaluate)):
        work()
        point[name] = {"images": batch, "seconds": [seconds(device, work) for _ in range(job.repeats)]}
    return {"points": [point], "settings": {}, "device": device_name(device)}


def measure_method(resolved: Resolved, job: Job) -> dict[str, Any]:
    """A method through the suite's own domain, run and optimiser: one point per entry of `job.tasks`."""
    device = pick_device(resolved.general.device)
    batch = resolved.train.batch_size
    data = noise(
        resolved.section("stream", StreamConfig).tasks,
        train=batch,
        test=batch * TEST_BATCHES,
        size=resolved.section("backbone", BackboneConfig).kwargs["img_size"],
    )
    domain = Classification(resolved, device, data)
    run = Run(resolved, RunFolder(Path("bench")), Reporter(quiet=True), domain)
    bare = None
    if job.grow:  # from the start, so that all points hold the same; otherwise the peak is measured without it
        bare = Bare(resolved, device)
        bare.train()
    points = []
    for index in range(job.tasks[-1]):
        task = TaskSteps(run, index)
        if index + 1 not in job.tasks:
            task.step()
            task.end()
            continue
        reset_peaks(device)
        for _ in range(WARM_UP):
            task.step()
        point: dict[str, Any] = {"task": index + 1, "peak_mib": peaks(device), **task.held(), "live_mib": live_mib()}
        bare = bare or Bare(resolved, device)
        point["train"] = {"images": batch, **paired(device, job.repeats, task.step, bare.train)}
        task.end()
        if not job.grow:
            point.update(_evaluations(run, domain, index, job.repeats, bare))
        points.append(point)
    return {"points": points, "settings": asdict(resolved.sections["method"]), "device": device_name(device)}


def _evaluations(run: Run, domain: Classification, index: int, repeats: int, bare: Bare) -> dict[str, Any]:
    """Evaluation of the task's test images: the first one, and for prompts also one with the query features kept."""

    def later() -> None:
        domain.evaluate([index])

    def first() -> None:
        domain.network.forget()
        later()

    def reference() -> None:
        for _ in range(TEST_BATCHES):
            bare.evaluate()

    # weights that change between tasks make every evaluation of a run a first one
    passes = {"first": first, "later": later} if "prefixes" in run.method.requires else {"first": first}
    images = len(domain.stream.tasks[index].test)
    return {name: {"images": images, **paired(run.device, repeats, work, reference)} for name, work in passes.items()}


def main() -> int:
    """Does the job on stdin."""
    job = Job(**json.load(sys.stdin))

    def work() -> dict[str, Any]:
        resolved = resolve(job.preset, job.method or "linear_probe", job.sets)
        if resolved.general.threads is not None:
            torch.set_num_threads(resolved.general.threads)
        return (measure_bare if job.method is None else measure_method)(resolved, job)

    return answer(work)


def answer(work: Callable[[], dict[str, Any]]) -> int:
    """Does `work`; the last line of stdout is `{"result": ...}`, or `{"error": ...}` for a UserError. Returns 0."""
    try:
        result = work()
    except UserError as error:
        print(json.dumps({"error": str(error)}))
        return 0
    result.update(threads=torch.get_num_threads(), environment=environment())
    print(json.dumps({"result": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
