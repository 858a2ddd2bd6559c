"""The suite's own side of `dualcl bench classification` and `bench growth`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.devices import pick_device
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.machine import package_version
from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.models.vit import BackboneConfig
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.benchmark.speed.step_work import TEST_BATCHES, TaskSteps, noise
from dualcl.datasets.reading.loader import Batch

VERSIONS = {"dualcl": package_version("dualcl"), "timm": package_version("timm")}
#: what a method trains at its first task, by the names that the public code's adapters read
STARTS = {
    "l2p": {"prompts": "prompts", "keys": "keys"},
    "dualprompt": {"prompts": "prompt", "keys": "key", "general": "general"},
    "coda_prompt": {"prompts": "prompts", "keys": "keys", "attention": "attention"},
}
#: standard deviation of the factors that stand for a finished task's
MOVED = 1e-3


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], float]]:
    """Works of a method at task `setup["task"]` (from 1) of a run on random images.

    step: an optimiser step on a batch in memory; fetched_step: the same from the suite's loader on; first_evaluation
    and later_evaluation of the task's test images, without and with what was kept of the frozen backbone; penalty:
    forward and backward of the method's penalty; loss: of a step. What is trained is written to the path
    `setup["start"]`, if there is one.
    """
    sets = [*setup["sets"], f"device={setup['device']}"]
    try:
        resolved = resolve(setup["preset"], setup["method"], sets)
        device = pick_device(setup["device"])
        domain = Classification(resolved, device, _noise(setup, resolved.section("backbone", BackboneConfig)))
        run = Run(resolved, RunFolder(Path("bench")), Reporter(quiet=True), domain)
        task = _begun(run, setup["task"] - 1)
    except UserError as error:
        raise ValueError(str(error)) from error
    index = setup["task"] - 1
    batch = _batch(load_file(setup["batch"]), domain.outputs(index).start)
    if setup.get("start") is not None:
        save_file(_start(run, setup["method"]), setup["start"])

    def step() -> int:
        run.step(batch, task.optimizer, 1.0, "bench")
        return len(batch.labels)

    def fetched_step() -> int:
        task.step()
        return len(batch.labels)

    def loss() -> float:
        value, _ = run.step(batch, task.optimizer, 1.0, "bench")
        return value

    def penalty() -> int:
        value = run.method.penalty()
        if value is None:
            raise ValueError(f"{setup['method']} has no penalty at task {setup['task']}")
        value.backward()
        task.optimizer.zero_grad(set_to_none=True)
        return len(batch.labels)

    def later_evaluation() -> int:
        domain.evaluate([index])
        return len(domain.stream.tasks[index].test)

    def first_evaluation() -> int:
        domain.network.forget()
        return later_evaluation()

    return {
        "step": step,
        "fetched_step": fetched_step,
        "loss": loss,
        "penalty": penalty,
        "first_evaluation": first_evaluation,
        "later_evaluation": later_evaluation,
    }


def _noise(setup: Mapping[str, Any], backbone: BackboneConfig) -> Any:
    batch = setup["batch_size"]
    return noise(
        setup["tasks"], batch, batch * TEST_BATCHES, backbone.kwargs["img_size"], setup.get("classes_per_task", 2)
    )


def _begun(run: Run, index: int) -> TaskSteps:
    """Task `index`, begun; the earlier ones moved their weights a little, as training would."""
    for earlier in range(index):
        shared = run.begin(earlier)
        generator = torch_generator(0, "bench", "moved", earlier)
        with torch.no_grad():
            for parameter in (p for group in run.groups(shared) for p in group.params):
                parameter.add_(MOVED * torch.randn(parameter.shape, generator=generator).to(parameter.device))
        run.method.end_task(earlier)
    return TaskSteps(run, index)


def _batch(tensors: Mapping[str, Tensor], first: int) -> Batch:
    """The batch that both sides train on; `first` is the task's first output."""
    labels = tensors["labels"] + first
    return Batch(tensors["images"], labels, torch.arange(len(labels)), torch.zeros(len(labels), dtype=torch.bool))


def _start(run: Run, method: str) -> dict[str, Tensor]:
    """What the task trains, before its first step."""
    head = run.domain.state_dict()
    tensors = {"head.weight": head["heads.0.weight"], "head.bias": head["heads.0.bias"]}
    tensors.update({name: getattr(run.method, own) for name, own in STARTS[method].items()})
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
