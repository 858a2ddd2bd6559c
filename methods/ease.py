"""EASE: an adapter per task; class means under all of them, made up where a class was not there yet.

Source: Zhou et al., arXiv 2403.12030 (CVPR 2024); public code sun-hailong/CVPR24-Ease, read at 6d67508. Each task
learns fresh bottlenecks (`shared/adapters.py`) with rows by cosine of its classes, which are then dropped. phi_i(x):
the feature under adapter i; P[c, i]: its mean over class c. When task t has ended, its classes' P are known under all
i <= t; of a class o of task a under a later adapter j > a it is made up from the classes k of tasks >= j,

    P[o, j] = sum_k s_k P[k, j],   s = softmax_k cos(P[o, a], P[k, a])
    score_c(x) = cos(phi_i, P[c, i]) + alpha / t  sum over j != i of cos(phi_j, P[c, j])        (class c of task i)

after the first task the first term alone. So all other subspaces together never weigh more than alpha; and as the
softmax has no temperature, what is made up is close to the mean of the new classes.

Differs from the public code: tasks may differ in size. No dropout; optimiser, epochs and schedule are the preset's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain, Images, Network
from dualcl.methods.base import check, register_method
from dualcl.methods.shared.adapters import AdapterConfig, AdapterMethod
from dualcl.methods.shared.class_statistics import cosine


@dataclass(frozen=True)
class EASEConfig(AdapterConfig):
    """Options of EASE."""

    alpha: float = field(default=0.1, metadata={"help": "weight of all other tasks' subspaces together"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.alpha >= 0, f"method.alpha must not be negative, got {self.alpha}")


def completed(means: Tensor, sizes: Sequence[int]) -> Tensor:
    """P (C, T, d) of all classes under all adapters, from those that are known; the others are not read."""
    made, starts = means.clone(), [sum(sizes[:j]) for j in range(len(sizes) + 1)]
    for a in range(len(sizes)):
        old = slice(starts[a], starts[a + 1])
        for j in range(a + 1, len(sizes)):
            near = cosine(means[old, a], means[starts[j] :, a])
            made[old, j] = near.softmax(1) @ means[starts[j] :, j]
    return made


def weighed(features: Tensor, means: Tensor, sizes: Sequence[int], alpha: float) -> Tensor:
    """Scores (B, C) of features (B, T, d) and P (C, T, d)."""
    cosines = torch.einsum("btd,ctd->bct", F.normalize(features, dim=-1), F.normalize(means, dim=-1))
    tasks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    own = F.one_hot(tasks, len(sizes)).to(cosines)
    return (cosines * torch.where(own == 1, 1.0, alpha / max(len(sizes) - 1, 1))).sum(2)


@register_method(
    "ease",
    domains=("classification",),
    summary="EASE: an adapter per task, class means under each, old ones made up under new adapters",
    source="arXiv 2403.12030",
)
class EASE(AdapterMethod):
    """Keeps all bottlenecks, and the means that were seen; the others follow from them."""

    Config = EASEConfig
    means: Tensor

    def __init__(self, config: EASEConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.register_buffer("means", torch.zeros(self.classes, n_tasks, self.width))
        #: all, of the outputs known under the adapters finished
        self.completed = torch.zeros(0, 0, self.width)

    @property
    def sizes(self) -> list[int]:
        """Classes of each finished task."""
        return [len(self.classifier.outputs(t)) for t in range(self.finished)]

    def features(self, images: Images, network: Network) -> Tensor:
        """(B, tasks finished, d); before the first has ended, under its adapter."""
        return torch.stack([self.read(images, network, i) for i in range(max(self.finished, 1))], 1)

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Keeps the new classes' means under all adapters, and makes up the old ones' under the new."""
        self.finished = task + 1
        outputs = self.classifier.outputs(task)
        self.means[outputs.start : outputs.stop, : task + 1].copy_(self.branch_means(task, task + 1))
        self.restored(task + 1)

    def restored(self, finished: int) -> None:
        """Makes up again what is not kept."""
        super().restored(finished)
        self.completed = completed(self.means[: self.known, :finished], self.sizes)

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun), those of tasks that did not end lowest."""
        if not self.finished:
            return self.with_lowest(features.new_zeros(len(features), 0))
        return self.with_lowest(weighed(features, self.completed, self.sizes, self.config.alpha))

    def stored_parameters(self) -> int:
        """The bottlenecks, and the means that were seen."""
        return super().stored_parameters() + self.width * sum(n * (t + 1) for t, n in enumerate(self.sizes))

    def caveats(self) -> list[str]:
        """What an answer and the end of a task cost."""
        return ["stores an adapter per task; a pass per image for each of them, and as many after the steps"]
