"""L2: the sites' weights are trained in full and held near the previous or the pretrained ones. Both domains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import MethodConfig, check, register_method, unless
from dualcl.methods.shared.site_weights import SiteWeights


@dataclass(frozen=True)
class L2Config(MethodConfig):
    """Hyper-parameters of the L2 penalty."""

    lr: float = field(default=5e-5, metadata={"help": "learning rate of the sites' weights"})
    lambda_: float = field(
        default=1.0, metadata={"help": "lambda, weight of the squared distance; differs between domains: sweep it"}
    )
    reference: Literal["previous", "pretrained"] = field(
        default="previous", metadata={"help": "the weights to stay near: those before the task, or the pretrained ones"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.lambda_ >= 0, f"method.lambda_ must not be negative, got {self.lambda_}")
        check(
            self.reference in ("previous", "pretrained"),
            f"method.reference must be previous or pretrained, got {self.reference!r}",
        )

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.lambda_, "method.lambda_ above 0", "reference")


@register_method(
    "l2",
    domains=("classification", "customization"),
    summary="the sites' weights in full, held near the previous or pretrained ones by a squared distance",
    source="arXiv 2203.17269 (baseline L2)",
)
class L2(SiteWeights):
    """Loss plus lambda * sum over sites of || W - W_ref ||_F^2; in the first task W_ref is pretrained either way."""

    Config = L2Config
    reference: Tensor

    def __init__(self, config: L2Config, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        # the pretrained weights come with the model, earlier tasks' are state
        self.register_buffer("reference", self.flat().detach(), persistent=config.reference == "previous")
        self.distance = 0.0

    def penalty(self) -> Tensor | None:
        """lambda * || W - W_ref ||^2 over all sites."""
        if self.config.lambda_ == 0:
            return None
        return float(self.config.lambda_) * (self.flat() - self.reference).square().sum()

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """The weights become the reference of the next task, unless that stays the pretrained ones."""
        weights = self.flat()
        self.distance = float((weights - self.reference).double().norm())
        if self.config.reference == "previous":
            self.reference.copy_(weights)

    def stored_parameters(self) -> int:
        """The weights alone: the previous ones, their reference, are the same numbers when a task has ended."""
        return sum(p.numel() for p in self.parameters())

    def diagnostics(self) -> dict[str, Any]:
        """Distance of the weights from their reference: the task's update, or the sum of all."""
        return {("update_norm" if self.config.reference == "previous" else "summed_norm"): self.distance}
