"""Bottlenecks beside a ViT's MLPs, as AdaptFormer (arXiv 2205.13535): 0.1 (ReLU(x D' + d) U' + u), one to a block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain, FeatureDomain, Images, Network
from dualcl.methods.base import Method, MethodConfig, ParamGroup, check
from dualcl.methods.shared.class_statistics import class_means, cosine

SCALE = 0.1


class Bottleneck(nn.Module):
    """One side module; D (rank, width) is Kaiming-uniform and the rest 0, so a fresh one adds nothing."""

    def __init__(self, width: int, rank: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        down = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)  # on the CPU, for any device
        self.down, self.down_bias = nn.Parameter(down.to(device)), nn.Parameter(torch.zeros(rank, device=device))
        self.up = nn.Parameter(torch.zeros(width, rank, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> the same."""
        return SCALE * F.linear(torch.relu(F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)


def bottlenecks(
    blocks: int, width: int, rank: int, generator: torch.Generator, device: torch.device
) -> list[Bottleneck]:
    """One to a block."""
    return [Bottleneck(width, rank, generator, device) for _ in range(blocks)]


def stream_width(domain: Domain) -> int:
    """Width of what runs from block to block."""
    return next(iter(domain.sites().values())).d_in


def adapter_groups(config: MethodConfig, adapters: nn.Module, rows: nn.Module) -> list[ParamGroup]:
    """What of bottlenecks and rows wants a gradient, at method.lr and method.head_lr."""
    parts = (("adapters", adapters, config.lr), ("rows", rows, config.head_lr))
    found = [(name, [p for p in part.parameters() if p.requires_grad], lr) for name, part, lr in parts]
    return [ParamGroup(name, params, lr, config.weight_decay) for name, params, lr in found if params]


class CosineRows(nn.Module):
    """Rows whose scores are s cos(f, w) with a learnt s, 1 at first, or a given one that stays."""

    def __init__(
        self, classes: int, width: int, generator: torch.Generator, device: torch.device, scale: float | None = None
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        drawn = torch.empty(classes, width).uniform_(-bound, bound, generator=generator)
        self.rows, self.scale = nn.Parameter(drawn.to(device)), nn.Parameter(torch.ones((), device=device))
        if scale is not None:
            self.scale.requires_grad_(False).fill_(scale)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, classes)."""
        return self.scale * cosine(features, self.rows)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(features), labels)


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """Settings of methods that learn bottlenecks."""

    bottleneck: int = field(default=64, metadata={"help": "width of the bottlenecks"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.bottleneck >= 1, f"method.bottleneck must be at least 1, got {self.bottleneck}")


class AdapterMethod(Method):
    """Tasks that take steps learn bottlenecks of their own, and rows by cosine for them; then the bottlenecks stay.

    The network is frozen and the domain's rows are not read: what is read of images, and how, is left to methods.
    """

    Config: ClassVar[type[MethodConfig]] = AdapterConfig
    requires = ("features", "sides")
    frozen = True
    reads_rows = False
    trains_rows = False
    #: of the rows' scores; None: learnt
    scale: ClassVar[float | None] = None

    def __init__(self, config: AdapterConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.classifier = cast(FeatureDomain, domain)
        self.width, self.classes = self.classifier.network.width, self.classifier.outputs(n_tasks - 1).stop
        #: a list of bottlenecks, one to a block, for each task that learnt some
        self.adapters = nn.ModuleList()
        #: of the last task that learns, dropped by the next
        self.rows = nn.ModuleList()
        self.task, self.begun, self.finished = 0, 0, 0
        #: adapters that `features` is to read images under; None: as it likes
        self.asked: Sequence[int] | None = None

    @property
    def known(self) -> int:
        """Outputs whose tasks ended."""
        return self.classifier.outputs(self.finished - 1).stop if self.finished else 0

    def begin_task(self, task: int) -> None:
        """Earlier bottlenecks stay as they are."""
        self.task, self.begun = task, self.classifier.outputs(task).stop
        self.requires_grad_(False)
        self.zero_grad(set_to_none=True)
        if self.takes_steps(task):
            self.grow(task)

    def grow(self, task: int) -> None:
        """Fresh bottlenecks, and rows of the task's classes."""
        start, device = self.generator("adapters", task), self.domain.device
        blocks, width = self.classifier.network.blocks, stream_width(self.domain)
        self.adapters.append(nn.ModuleList(bottlenecks(blocks, width, self.config.bottleneck, start, device)))
        rows = CosineRows(len(self.classifier.outputs(task)), self.width, start, device, self.scale)
        self.rows = nn.ModuleList([rows])

    def trained(self) -> list[ParamGroup]:
        """The task's bottlenecks and rows."""
        return adapter_groups(self.config, self.adapters, self.rows)

    def read(self, images: Images, network: Network, which: int) -> Tensor:
        """(B, d) under the bottlenecks of one task; kept once these stay."""
        sides = dict(enumerate(cast(Any, self.adapters[which])))
        return network(images, sides=sides, key=("adapter", which) if which < self.finished else None)

    def loss(self, batch: Any) -> Tensor:
        """Cross entropy of the task's rows over its classes."""
        features = self.read(self.classifier.images(batch), self.classifier.network, len(self.adapters) - 1)
        labels = self.classifier.targets(batch) - self.classifier.outputs(self.task).start
        return cast(CosineRows, self.rows[-1]).loss(features, labels)

    def taken(self, task: int, *which: int) -> list[tuple[Tensor, Tensor]]:
        """(features (B, n, d), outputs (B,)) of the task's training images under these adapters."""
        self.asked = which
        try:
            return list(self.classifier.training_features(task))
        finally:
            self.asked = None

    def branch_means(self, task: int, branches: int, features: Iterable[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Means (n, branches, d) float64 of what `features` gives of the task's classes; UserError without images."""
        outputs, features = self.classifier.outputs(task), features or self.classifier.training_features(task)
        flat = ((x.flatten(1), y) for x, y in features)
        means, counts = class_means(flat, outputs, branches * self.width)
        empty = [output for output, n in zip(outputs, counts.tolist(), strict=True) if not n]
        check(not empty, f"no training image for the outputs {empty}; add images or drop the classes")
        return means.unflatten(1, (branches, self.width))

    def restored(self, finished: int) -> None:
        """Counts the finished tasks."""
        self.finished = finished

    def with_lowest(self, scores: Tensor) -> Tensor:
        """Scores of outputs known (B, known), and lowest ones of those begun beside them."""
        lowest = scores.new_full((len(scores), self.begun - scores.shape[1]), torch.finfo(scores.dtype).min)
        return torch.cat([scores, lowest], 1)

    def stored_parameters(self) -> int:
        """The bottlenecks."""
        return sum(p.numel() for p in self.adapters.parameters())
