"""Experience replay: all weights are trained on the task's images and on a small memory of earlier ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain, ExemplarDomain
from dualcl.methods.base import check, register_method
from dualcl.methods.shared.whole_weights import FinetuneConfig, WholeWeights


@dataclass(frozen=True)
class ERConfig(FinetuneConfig):
    """Hyper-parameters of experience replay."""

    memory: int = field(default=200, metadata={"help": "images of earlier tasks that are stored, in total"})
    replay_batch_size: int | None = field(
        default=None, metadata={"help": "stored images that join a batch; default: as many as the batch has"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.memory >= 1, f"method.memory must be at least 1, got {self.memory}")
        size = self.replay_batch_size
        check(size is None or size >= 1, f"method.replay_batch_size must be at least 1, got {size}")


def reservoir(capacity: int, seen: int, new: int, generator: torch.Generator) -> dict[int, int]:
    """Vitter's algorithm R (ACM TOMS 11(1), 1985) for `new` samples after `seen`: {slot: position in the new ones}.

    Sample n (from 0) takes slot n while there is room, then slot j, uniform in 0..n, when j < capacity. A slot taken
    twice is listed with the later sample. After n samples each is kept with probability capacity / n.
    """
    # a double has 53 bits: no count of images is large enough to notice
    drawn = torch.rand(new, generator=generator, dtype=torch.float64)
    slots = {}
    for position, share in enumerate(drawn.tolist()):
        n = seen + position
        slot = n if n < capacity else int(share * (n + 1))
        if slot < capacity:
            slots[slot] = position
    return slots


@register_method(
    "er",
    domains=("classification",),
    summary="experience replay: all weights, on the task's images and on a reservoir of stored ones",
    source="arXiv 1902.10486",
    stores_data=True,
)
class ER(WholeWeights):
    """Full fine-tuning; every batch is joined by stored images, one cross entropy over all classes seen.

    The memory is filled by reservoir sampling when a task ends, each of its images offered once, and holds 8-bit pixels
    of their evaluation view; no earlier data set is read again. Differs from arXiv 1902.10486, where a task is one
    pass: there a task's own samples may be replayed within it, here those of earlier tasks only.
    """

    Config = ERConfig
    output_scope = "seen"
    requires = ("exemplars",)
    pixels: Tensor
    targets: Tensor
    seen: Tensor

    def __init__(self, config: ERConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        # of full size from the start: a task's checkpoint is as large as any other's
        capacity = min(config.memory, sum(task.size for task in domain.tasks))
        shape = cast(ExemplarDomain, domain).exemplar_shape
        self.register_buffer("pixels", torch.zeros((capacity, *shape), dtype=torch.uint8))
        self.register_buffer("targets", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @property
    def held(self) -> int:
        """Images in the memory."""
        return min(len(self.targets), int(self.seen))

    def loss(self, batch: Any) -> Tensor:
        """The mean task loss of the batch and as many stored images, drawn without replacement."""
        if self.held == 0:
            return self.domain.loss(batch)
        domain = cast(ExemplarDomain, self.domain)
        size = self.config.replay_batch_size or len(domain.targets(batch))
        # the global generator is a function of (seed, task, step) here
        chosen = torch.randperm(self.held)[:size].to(self.pixels.device)
        return self.domain.loss(domain.with_exemplars(batch, self.pixels[chosen], self.targets[chosen]))

    def end_task(self, task: int) -> None:
        """Offers each image of the task to the reservoir."""
        size = self.domain.tasks[task].size
        taken = reservoir(len(self.targets), int(self.seen), size, self.generator("reservoir", task))
        if taken:
            slots = torch.tensor(list(taken), device=self.pixels.device)
            pixels, targets = cast(ExemplarDomain, self.domain).exemplars(list(taken.values()))
            self.pixels[slots] = pixels.to(self.pixels.device)
            self.targets[slots] = targets.to(self.targets.device)
        self.seen += size

    def stored_parameters(self) -> int:
        """The weights, and the stored images in numbers of 32 bits: four 8-bit pixel values count as one."""
        return super().stored_parameters() + math.ceil(self.held * self.pixels[0].numel() / 4)

    def diagnostics(self) -> dict[str, Any]:
        """Stored images, and how many of each class."""
        return {"stored_images": self.held, "per_output": torch.bincount(self.targets[: self.held]).tolist()}

    def caveats(self) -> list[str]:
        """That it stores data."""
        return [f"stores up to {len(self.targets)} training images of earlier tasks"]
