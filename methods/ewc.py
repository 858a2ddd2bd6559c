"""EWC: the sites' weights are trained in full; those that mattered for earlier tasks are held. Both domains."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain
from dualcl.benchmark.core.seeding import derive_seed
from dualcl.methods.base import MethodConfig, check, register_method, unless
from dualcl.methods.shared.site_weights import SiteWeights

#: the loss is scaled by it, for small gradients vanish in float16; a power of two changes nothing else
SCALE = 2.0**12


@dataclass(frozen=True)
class EWCConfig(MethodConfig):
    """Hyper-parameters of EWC."""

    lr: float = field(default=5e-5, metadata={"help": "learning rate of the sites' weights"})
    lambda_: float = field(
        default=1e6, metadata={"help": "lambda, weight of the penalty; differs between domains: sweep it"}
    )
    fisher_batches: int = field(
        default=16, metadata={"help": "training batches behind each task's Fisher information, at most all of them"}
    )
    decay: float = field(
        default=1.0, metadata={"help": "factor on the Fisher of earlier tasks after each task; 1: all count the same"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.lambda_ >= 0, f"method.lambda_ must not be negative, got {self.lambda_}")
        check(self.fisher_batches >= 1, f"method.fisher_batches must be at least 1, got {self.fisher_batches}")
        check(0 <= self.decay <= 1, f"method.decay must be between 0 and 1, got {self.decay}")

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.lambda_, "method.lambda_ above 0", "fisher_batches", "decay")


@register_method(
    "ewc",
    domains=("classification", "customization"),
    summary="EWC: the sites' weights in full, held by the Fisher information of earlier tasks",
    source="arXiv 1612.00796; one anchor and a running Fisher: arXiv 1805.06370",
)
class EWC(SiteWeights):
    """Loss plus lambda / 2 * sum of F (W - W*)^2; W*: the weights after the last task, F: the Fisher of all before.

    F is the diagonal empirical Fisher information, the mean of squared gradients of single samples' losses.
    Differs from the paper (arXiv 1612.00796): one anchor instead of one per task, so that memory and time stay flat
    (arXiv 1805.06370); the gradients are those of the training loss, with the true labels.
    """

    Config = EWCConfig
    fisher: Tensor
    anchor: Tensor

    def __init__(self, config: EWCConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        weights = self.flat().detach()
        self.register_buffer("fisher", torch.zeros_like(weights))
        self.register_buffer("anchor", weights)
        self.finished = 0
        self.facts: dict[str, Any] = {}

    def penalty(self) -> Tensor | None:
        """lambda / 2 * sum over all weights of F (W - W*)^2; None in the first task."""
        if self.finished == 0 or self.config.lambda_ == 0:
            return None
        return float(self.config.lambda_) / 2 * (self.fisher * (self.flat() - self.anchor).square()).sum()

    def end_task(self, task: int) -> None:
        """Adds the task's Fisher information and moves the anchor."""
        fisher, count = self.task_fisher(task)
        self.fisher.mul_(self.config.decay).add_(fisher)
        weights = self.flat().detach()
        self.facts = {
            "update_norm": float((weights - self.anchor).double().norm()),
            "fisher_trace": float(fisher.double().sum()),
            "fisher_samples": count,
        }
        self.anchor.copy_(weights)
        self.finished = task + 1

    def task_fisher(self, task: int) -> tuple[Tensor, int]:
        """Mean squared gradient (n,) of the loss of single samples of the task's first batches, and how many."""
        device = self.anchor.device
        total, count = torch.zeros_like(self.anchor), 0
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            most = min(self.config.fisher_batches, self.domain.steps_per_epoch(task))
            for step, batch in enumerate(itertools.islice(self.domain.batches(task, 0), most)):
                torch.manual_seed(derive_seed(self.seed, self.name, "fisher", task, step))
                for sample in self.domain.own_samples(batch):
                    gradients = torch.autograd.grad(self.domain.loss(sample) * SCALE, list(self.weights))
                    total += (torch.cat([g.reshape(-1) for g in gradients]) / SCALE).square()
                    count += 1
        share = self.domain.processes
        count = int(share.total(torch.tensor(count, device=device)))
        return share.total(total) / count, count

    def restored(self, finished: int) -> None:
        """The penalty starts with the second task."""
        self.finished = finished

    def stored_parameters(self) -> int:
        """The weights, which are the anchor, and their Fisher information."""
        return 2 * self.fisher.numel()

    def diagnostics(self) -> dict[str, Any]:
        """Norm of the last update, and the trace and size of the last task's Fisher information."""
        return self.facts
