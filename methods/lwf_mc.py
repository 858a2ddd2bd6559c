"""LwF.MC: all weights are trained; the outputs of the model before the task are the targets of old classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from dualcl.benchmark.core.domain import Domain, LogitsDomain
from dualcl.methods.base import check, register_method
from dualcl.methods.shared.whole_weights import FinetuneConfig, WholeWeights


@dataclass(frozen=True)
class LwFMCConfig(FinetuneConfig):
    """Hyper-parameters of LwF.MC."""

    distill_weight: float = field(
        default=1.0, metadata={"help": "weight of the old classes' terms; 1: as the sources, none and not tuned"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.distill_weight >= 0, f"method.distill_weight must not be negative, got {self.distill_weight}")


def distillation_loss(logits: Tensor, old_logits: Tensor, targets: Tensor, weight: float = 1.0) -> Tensor:
    """Binary cross entropy of sigmoid outputs, summed over classes, mean over samples; a scalar.

    `logits` (B, C), `old_logits` (B, O) of the first O <= C classes, `targets` (B,) in O..C-1. The first O classes are
    taught the old sigmoid outputs, their terms times `weight`, the others the one-hot target.
    """
    n_old = old_logits.shape[1]
    wanted = one_hot(targets, logits.shape[1]).to(logits.dtype)
    wanted[:, :n_old] = old_logits.sigmoid()
    terms = binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(0)
    return (weight * terms[:n_old].sum() + terms[n_old:].sum()) / len(targets)


@register_method(
    "lwf_mc",
    domains=("classification",),
    summary="LwF.MC: all weights, old classes taught what the model before the task said of the new images",
    source="arXiv 1606.09282; for one classifier of all classes: arXiv 1611.07725 (LwF.MC)",
)
class LwFMC(WholeWeights):
    """Full fine-tuning with binary cross entropy: one-hot for new classes, the earlier model's outputs for old ones.

    The loss of arXiv 1611.07725, Algorithm 3, without exemplars: every class is a sigmoid of its own, without a
    temperature. Summed over classes as written there and in the code of its use as a baseline in arXiv 2211.13218
    (mean over samples, where the paper sums): so the pull on a class does not shrink as classes are added.
    The earlier model is a copy made when the task begins, and dropped when it ends: only the weights are kept.
    """

    Config = LwFMCConfig
    output_scope = "seen"
    requires = ("logits",)

    def __init__(self, config: LwFMCConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.n_old = 0
        self.teacher: Callable[[Any], Tensor] | None = None

    def begin_task(self, task: int) -> None:
        """Notes which outputs are old."""
        self.n_old = cast(LogitsDomain, self.domain).outputs(task).start

    def prepare(self, task: int) -> None:
        """Copies the model, unless there is nothing to remember; a resumed run finds it as the last task left it."""
        if self.n_old and self.config.distill_weight:
            self.teacher = cast(LogitsDomain, self.domain).frozen_logits()

    def loss(self, batch: Any) -> Tensor:
        """Binary cross entropy of all classes seen so far."""
        domain = cast(LogitsDomain, self.domain)
        logits, targets = domain.logits(batch), domain.targets(batch)
        if self.teacher is None:
            old = torch.zeros_like(logits[:, : self.n_old])
            return distillation_loss(logits, old, targets, 0.0)
        return distillation_loss(logits, self.teacher(batch)[:, : self.n_old], targets, self.config.distill_weight)

    def end_task(self, task: int) -> None:
        """Drops the copy."""
        self.teacher = None
