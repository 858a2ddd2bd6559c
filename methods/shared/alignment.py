"""Classifier alignment: all rows are trained anew on draws from the Gaussians of all classes seen.

Source: SLCA, arXiv 2303.05118 (ICCV 2023); public code GengDavid/SLCA, read at 169d4e6. With mu_c, Sigma_c of class
c as they were when its task ended (unbiased, + 1e-4 I), t_c its task, t the current one, each epoch draws 256 features
of each class seen,

    x ~ N(s_c mu_c, Sigma_c),   s_c = 0.9 + 0.1 (t_c + 1) / (t + 1)

and takes a step for each 256 of them, shuffled, with the cross entropy of z / (tau * mean over tasks j of ||z_j||):
z = W x + b are the logits of all classes, z_j those of task j's, tau = 0.1. SGD with momentum, the rate on a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain, FeatureDomain
from dualcl.methods.base import MethodConfig, check, unless
from dualcl.methods.shared.class_statistics import ClassGaussians, draws
from dualcl.methods.shared.symmetric import cholesky

DRAWS = 256
SHRINKAGE = 1e-4
TAU = 0.1
MOMENTUM, DECAY = 0.9, 5e-4
#: of rows, features (B, d) and right outputs (B,)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AlignConfig(MethodConfig):
    """Settings of the alignment."""

    align_epochs: int = field(default=5, metadata={"help": "epochs of the classifier's alignment; 0: none"})
    align_lr: float = field(default=1e-2, metadata={"help": "its learning rate (SGD)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.align_epochs >= 0, f"method.align_epochs must not be negative, got {self.align_epochs}")
        check(self.align_lr >= 0, f"method.align_lr must not be negative, got {self.align_lr}")

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.align_epochs, "method.align_epochs above 0", "align_lr")


def scales(sizes: Sequence[int]) -> Tensor:
    """s_c of every class after the last of tasks of these sizes."""
    return torch.cat([torch.full((n,), 0.9 + 0.1 * (t + 1) / len(sizes)) for t, n in enumerate(sizes)])


def alignment_loss(logits: Tensor, labels: Tensor, sizes: Sequence[int], tau: float = TAU) -> Tensor:
    """Cross entropy of logits (B, C) over tau times the mean of the norms of the tasks' blocks."""
    norms = torch.stack([z.norm(dim=1) + 1e-7 for z in logits.split(list(sizes), dim=1)])
    return F.cross_entropy(logits / (tau * norms.mean(0).unsqueeze(1)), labels)


@torch.enable_grad()
def aligned(
    rows: Tensor,
    means: Tensor,
    factors: Tensor,
    sizes: Sequence[int],
    config: AlignConfig,
    generator: torch.Generator,
    loss: Loss | None = None,
) -> Tensor:
    """Rows trained on draws from N(means (C, d), L L'), factors L (C, d, d); float32.

    (C, d + 1), weights and bias, under SLCA's loss; as `loss` wants them where it is given.
    """

    def slca(rows: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        return alignment_loss(F.linear(features, rows[:, :-1], rows[:, -1]), labels, sizes)

    loss = loss or slca
    rows = nn.Parameter(rows.clone())
    labels = torch.arange(len(rows), device=rows.device).repeat_interleave(DRAWS)
    optimizer = torch.optim.SGD([rows], lr=config.align_lr, momentum=MOMENTUM, weight_decay=DECAY)
    for epoch in range(config.align_epochs):
        optimizer.param_groups[0]["lr"] = config.align_lr * (1 + math.cos(math.pi * epoch / config.align_epochs)) / 2
        drawn = torch.cat(list(draws(means, factors, DRAWS, generator)))
        for batch in torch.randperm(len(labels), generator=generator).to(rows.device).split(DRAWS):
            found = loss(rows, drawn[batch], labels[batch])
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
    return rows.detach()


def linear_loss(rows: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of z = W x + b, rows (C, d + 1)."""
    return F.cross_entropy(F.linear(features, rows[:, :-1], rows[:, -1]), labels)


def shrunk_factors(gaussians: ClassGaussians, known: int) -> Tensor:
    """L (known, d, d) float32 of the first classes: L L' = Sigma + 1e-4 I, factorised in float64."""

    def factor(output: int) -> Tensor:
        covariance = gaussians.covariance(output)
        covariance.diagonal().add_(SHRINKAGE)
        return cholesky(covariance, f"the covariance of output {output} has no Cholesky factor").to(gaussians.means)

    return torch.stack([factor(output) for output in range(known)])


class Aligner(nn.Module):
    """Gaussians of all classes and aligned rows, beside the domain's rows, which stay as they were trained.

    Each alignment starts from the rows aligned before and the new task's trained ones.
    """

    rows: Tensor

    def __init__(self, domain: Domain, n_tasks: int) -> None:
        super().__init__()
        check("features" in domain.capabilities, f"alignment needs features of classes, and {domain.name} has none")
        # not a part of this module, nor of its state
        self._domain = [cast(FeatureDomain, domain)]
        (classifier,) = self._domain
        width, classes = classifier.network.width, classifier.outputs(n_tasks - 1).stop
        self.gaussians = ClassGaussians(classes, width)
        self.register_buffer("rows", torch.zeros(classes, width + 1))
        self.finished = 0

    @property
    def known(self) -> int:
        """Outputs whose tasks ended."""
        return self._domain[0].outputs(self.finished - 1).stop if self.finished else 0

    @torch.no_grad()
    def end_task(
        self,
        task: int,
        config: AlignConfig,
        generator: torch.Generator,
        *,
        restart: bool = False,
        equal: bool = False,
        features: Iterable[tuple[Tensor, Tensor]] | None = None,
        plain: bool = False,
    ) -> None:
        """Keeps the task's statistics and aligns all rows.

        `restart`: from the rows as they were trained. `equal`: s_c as if every task had the size of this one.
        `features`: where they are not what the domain gives. `plain`: the cross entropy of z, and s_c is 1.
        """
        (domain,) = self._domain
        self.gaussians.add(domain.training_features(task) if features is None else features, domain.outputs(task))
        for t in range(0 if restart else task, task + 1):
            weight, bias = domain.output_rows(t)
            self.rows[domain.outputs(t).start : domain.outputs(t).stop] = torch.cat([weight, bias.unsqueeze(1)], 1)
        self.finished = task + 1
        if task == 0 or config.align_epochs == 0:
            return
        n, sizes = self.known, [len(domain.outputs(t)) for t in range(task + 1)]
        of_task = torch.arange(n) // sizes[-1]
        s = 0.9 + 0.1 * (of_task + 1) / (task + 1) if equal else scales(sizes)
        means = self.gaussians.means[:n] if plain else self.gaussians.means[:n] * s.unsqueeze(1).to(self.rows)
        factors = shrunk_factors(self.gaussians, n)
        loss = linear_loss if plain else None
        self.rows[:n] = aligned(self.rows[:n], means, factors, sizes, config, generator, loss)

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun): by aligned rows where tasks ended, by the domain's elsewhere."""
        plain, rows = self._domain[0].rows(features), self.rows[: self.known]
        return torch.cat([F.linear(features, rows[:, :-1], rows[:, -1]), plain[:, self.known :]], 1)

    def numbers(self, restart: bool = False) -> int:
        """What is kept: the Gaussians; the rows count as the domain's, but where both sets are needed."""
        return self.gaussians.numbers(self.known) + (self.rows[: self.known].numel() if restart else 0)


def caveat(config: AlignConfig) -> str:
    """What a reader must know of a run with alignment."""
    return (
        f"stores a mean and a covariance of every class; rows are trained on draws from them after the steps (SGD "
        f"{config.align_lr:g}, {config.align_epochs} epochs), which takes longer with every class"
    )
