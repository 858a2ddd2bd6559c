"""TUNA: an adapter per task, chosen per image by entropy, and one merged of all; rows aligned with Gaussians.

Source: Wang et al., arXiv 2508.08165 (ICCV 2025); public code LAMDA-CL/ICCV2025-TUNA, read at 77d4f10. Task t trains
bottlenecks theta_t (`shared/adapters.py`), which start as theta_{t-1} ended, and rows by cosine, z = 20 cos(phi, w).
Loss: cross entropy over the task's classes, plus, with U the bottlenecks' W_up and its rows normalised,

    lambda e^-(t+1)  sum over i < t, mean over blocks of |mean of U_t U_i'|

When it has ended: Gaussians of its classes under theta_t; all rows are trained on draws from those of all classes
(`shared/alignment.py`, with the cross entropy of z); entry by entry the universal adapter theta_u = g max |theta_i|, g
the sign of the mean over tasks, the maximum over entries of that sign. Of an image,

    i* = argmin_i entropy(softmax z(phi_i)),   score = softmax z(phi_i*) + softmax z(phi_u)

Differs from the public code: theta_u takes part in answers (`no_universal`: there it does not); means are scaled as
SLCA's (`rising_decay`); alignment draws 256 features of each class, and its rate falls once, not every five epochs. No
dropout; optimiser and schedule are the preset's. The paper's own equations were not seen, but what its code computes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain, Images, Network
from dualcl.methods.base import check, check_quirks, register_method, unless
from dualcl.methods.shared.adapters import AdapterConfig, AdapterMethod, Bottleneck, CosineRows
from dualcl.methods.shared.alignment import AlignConfig, aligned, caveat, scales, shrunk_factors
from dualcl.methods.shared.class_statistics import ClassGaussians, cosine

SCALE = 20.0


@dataclass(frozen=True)
class TUNAConfig(AdapterConfig, AlignConfig):
    """Options of TUNA, as on ImageNet-R in its public code."""

    bottleneck: int = field(default=16, metadata={"help": "width of the bottlenecks"})
    orthogonality: float = field(default=1e-3, metadata={"help": "lambda, weight of the bottlenecks' orthogonality"})
    align_epochs: int = field(default=30, metadata={"help": "epochs of the rows' alignment; 0: none"})
    align_lr: float = field(default=5e-3, metadata={"help": "its learning rate (SGD)"})
    mean_decay: bool = field(
        default=True,
        metadata={"help": "means of earlier classes are scaled in the alignment (off on CIFAR-100 in its public code)"},
    )
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of the public code, for parity only: no_universal, rising_decay"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "no_universal": "the merged adapter is never asked: the last task's takes its place",
        "rising_decay": "the means of later classes are scaled down most in the alignment, not those of earlier ones",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.orthogonality >= 0, f"method.orthogonality must not be negative, got {self.orthogonality}")
        check_quirks(self.reference_quirks, self.QUIRKS)

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.align_epochs, "method.align_epochs above 0", "mean_decay")


def merged(values: Tensor) -> Tensor:
    """(...) of (T, ...): the largest magnitude among entries of the sign of their mean; a mean of 0 counts as minus."""
    sign = torch.where(values.mean(0) > 0, 1.0, -1.0)
    return sign * (values * sign).clamp_min(0).amax(0)


def rising_scales(sizes: Sequence[int]) -> Tensor:
    """The public code's scale of every class: 0.9 + 0.1 (1 - ceil(c / n)) / T, n the last task's size."""
    number = torch.arange(sum(sizes))
    return 0.9 + 0.1 * (1 - torch.ceil(number / sizes[-1])) / len(sizes)


def overlap(one: Sequence[Bottleneck], two: Sequence[Bottleneck]) -> Tensor:
    """Mean over blocks of |mean of U U'|, U the rows of W_up normalised: of their mean rows' products."""
    means = [torch.stack([F.normalize(side.up, dim=1).mean(0) for side in sides]) for sides in (one, two)]
    return (means[0] * means[1]).sum(1).abs().mean()


def cosine_loss(rows: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of z."""
    return F.cross_entropy(SCALE * cosine(features, rows), labels)


def answers(logits: Tensor, adapters: int) -> Tensor:
    """(B, C) of z (B, n, C): the surest of the first `adapters` branches, and the last branch."""
    log = logits.log_softmax(2)
    shares = log.exp()
    entropies = -(shares * log).sum(2)[:, :adapters]
    return shares[torch.arange(len(shares), device=shares.device), entropies.argmin(1)] + shares[:, -1]


@register_method(
    "tuna",
    domains=("classification",),
    summary="TUNA: an adapter per task, chosen by entropy, beside one merged of all; rows aligned on Gaussians",
    source="arXiv 2508.08165",
)
class TUNA(AdapterMethod):
    """Keeps all bottlenecks, rows and Gaussians; the universal adapter follows from the bottlenecks."""

    Config = TUNAConfig
    scale = SCALE

    def __init__(self, config: TUNAConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.gaussians = ClassGaussians(self.classes, self.width)
        self.merges = "no_universal" not in config.reference_quirks
        #: bottlenecks, not a part of the state
        self.universal: list[Bottleneck] = []

    def grow(self, task: int) -> None:
        """Bottlenecks as the last task's ended; all tasks' rows are kept."""
        kept = [*self.rows]
        super().grow(task)
        self.rows = nn.ModuleList([*kept, *self.rows])
        if task:
            self.adapters[-1].load_state_dict(self.adapters[-2].state_dict())

    def penalty(self) -> Tensor | None:
        """Orthogonality to earlier tasks' bottlenecks."""
        own, *earlier = reversed([cast(Any, sides) for sides in self.adapters])
        if not earlier or not self.config.orthogonality:
            return None
        weight = self.config.orthogonality * math.exp(-(self.task + 1))
        return weight * torch.stack([overlap(own, sides) for sides in earlier]).sum()

    def features(self, images: Images, network: Network) -> Tensor:
        """(B, n, d): under each finished adapter, and under the universal one."""
        found = [self.read(images, network, i) for i in self.asked or range(max(self.finished, 1))]
        if self.asked is None and self.universal:
            found.append(network(images, sides=dict(enumerate(self.universal)), key=("universal", self.finished)))
        return torch.stack(found, 1)

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Takes statistics, aligns all rows, merges."""
        self.restored(task + 1)
        if not self.config.align_epochs:
            return
        self.gaussians.add([(x[:, 0], y) for x, y in self.taken(task, task)], self.classifier.outputs(task))
        if task == 0:
            return
        sizes = [len(self.classifier.outputs(t)) for t in range(task + 1)]
        means = self.gaussians.means[: self.known]
        if self.config.mean_decay:
            s = (rising_scales if "rising_decay" in self.config.reference_quirks else scales)(sizes)
            means = means * s.unsqueeze(1).to(means)
        factors = shrunk_factors(self.gaussians, self.known)
        generator = self.generator("align", task)
        found = aligned(self.all_rows(), means, factors, sizes, self.config, generator, cosine_loss)
        for rows, part in zip(self.rows, found.split(sizes), strict=True):
            cast(CosineRows, rows).rows.copy_(part)

    def all_rows(self) -> Tensor:
        """(C, d) of the tasks that ended."""
        return torch.cat([cast(CosineRows, rows).rows for rows in self.rows[: self.finished]])

    @torch.no_grad()
    def restored(self, finished: int) -> None:
        """Merges the finished adapters again."""
        super().restored(finished)
        self.universal = []
        if finished and self.merges:
            stacks = [cast(Any, sides) for sides in self.adapters[:finished]]
            self.universal = [copy.deepcopy(side) for side in stacks[0]]
            for i, side in enumerate(self.universal):
                for name, parameter in side.requires_grad_(False).named_parameters():
                    parameter.copy_(merged(torch.stack([getattr(sides[i], name) for sides in stacks])))

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun), those of tasks that did not end lowest."""
        if not self.finished:
            return self.with_lowest(features.new_zeros(len(features), 0))
        logits = SCALE * cosine(features, self.all_rows())
        return self.with_lowest(answers(logits, self.finished))

    def stored_parameters(self) -> int:
        """The bottlenecks, the rows and the Gaussians."""
        gaussians = self.gaussians.numbers(self.known) if self.config.align_epochs else 0
        return super().stored_parameters() + self.known * self.width + gaussians

    def caveats(self) -> list[str]:
        """What is stored, and what an answer costs."""
        passes = f"stores an adapter per task; a pass per image for each of them{', and one more' * self.merges}"
        return [passes, *([caveat(self.config)] if self.config.align_epochs else []), *super().caveats()]
