"""Ours: a training step of the customization domain, and images for its evaluation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.domains.customization import Customization
from dualcl.benchmark.speed.concepts_work import concept_run
from dualcl.benchmark.speed.step_work import TaskSteps

#: images of the concept; each is encoded once
IMAGES = 4


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], float]]:
    """step: fetch a batch and train on it; sample: images; brightness: mean level of the first image.

    Raises UserError for what the suite does not know.
    """
    method = setup["method"]
    prior = method == "custom_diffusion"
    batch = setup.get("batch", 1)
    sets = [
        f"base.model={json.dumps(setup['model'])}",
        f"base.weights_dtype={setup['precision']}",
        f"base.gradient_checkpointing={json.dumps(setup.get('gradient_checkpointing', False))}",
        f"precision={setup['precision']}",
        f"device={json.dumps(setup['device'])}",
        f"train.batch_size={batch}",
        "train.epochs=1",
        "train.steps=100000",
        "train.optimizer=adamw",
        "train.grad_clip=1.0",
        "stream.tasks=1",
        "stream.class_order=natural",
        "input.augment=none",
        f"eval.steps={setup.get('steps', 1)}",
        f"eval.batch_size={setup.get('images') or 1}",
        *([f"prior.images={json.dumps(setup['class'])}"] if prior else [f"methods.lora.rank={setup.get('rank', 4)}"]),
    ]
    resolved = resolve("celeba-hq-10", method, sets)
    # open as long as the process lives
    run = contextlib.ExitStack().enter_context(concept_run(resolved, torch.device(setup["device"]), IMAGES))
    assert isinstance(run.domain, Customization)
    domain = run.domain
    task = TaskSteps(run, 0)
    number = setup.get("images", 0)
    if number:
        task.end()

    def step() -> int:
        task.step()
        return batch * (1 + prior)

    def sample() -> int:
        _images(number)
        return number

    def brightness() -> float:
        return float(_images(1)[0].double().mean())

    def _images(count: int) -> torch.Tensor:
        return domain.sample(["a photo of a circle"] * count, [torch.Generator().manual_seed(k) for k in range(count)])

    return {"step": step, "sample": sample, "brightness": brightness}
