"""RanPAC without adaptation: ridge regression on random features of the frozen network.

Source: McDonnell et al., arXiv 2307.02251 (NeurIPS 2023); public code RanPAC/RanPAC, read at 012927f. With f the frozen
network's feature, W (d, M) fixed and drawn from N(0, 1), y one-hot, sums over all images so far:

    h = ReLU(f W),  G = sum h h',  Q = sum h y',  W_o = (G + lambda I)^-1 Q,  scores = W_o' h

lambda is chosen anew in each task: of 10^-8, 10^-7, ..., 10^8 the one whose solution from four fifths of the task's
images has the least squared error on the other fifth, which is drawn class by class. It is then used with the G of all
tasks, so that its weight shrinks as G grows; so the paper.

Differs from the paper: nothing is adapted in the first task (its phase 1, worth 6 points on ImageNet-R in its table).
Where G + lambda I cannot be solved the next larger lambda is taken (the public code then takes what comes, NaN
included). One eigendecomposition serves all lambda.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain, FeatureDomain
from dualcl.methods.base import Method, MethodConfig, check, check_quirks, register_method
from dualcl.methods.shared.ridge import Ridge, choose_strength, held_out


@dataclass(frozen=True)
class RanPACConfig(MethodConfig):
    """Options of RanPAC."""

    width: int = field(default=10_000, metadata={"help": "M, random features; 0: the network's own"})
    lambda_: float | None = field(
        default=None,
        metadata={"help": "lambda, the ridge; null: chosen in each task on a fifth of its images"},
    )
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of public codes, for parity only: cosine_scores"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "cosine_scores": "the solution is read out by cosine, which is another classifier (LAMDA-PILOT's RanPAC)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 0, f"method.width must not be negative, got {self.width}")
        check(self.lambda_ is None or self.lambda_ > 0, f"method.lambda_ must be positive, got {self.lambda_}")
        check_quirks(self.reference_quirks, self.QUIRKS)


@register_method(
    "ranpac",
    domains=("classification",),
    summary="RanPAC: ridge regression on random features of the frozen network, no training",
    source="arXiv 2307.02251 (without first-task adaptation)",
)
class RanPAC(Method):
    """Keeps G, packed, and Q; W is drawn from the seed and W_o follows from them."""

    Config = RanPACConfig
    requires = ("features",)
    frozen = True
    reads_rows = False
    layer: Tensor | None
    solved: Tensor

    def __init__(self, config: RanPACConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.classifier = cast(FeatureDomain, domain)
        d, classes = self.classifier.network.width, self.classifier.outputs(n_tasks - 1).stop
        drawn = torch.randn(d, config.width, generator=self.generator("layer")) if config.width else None
        self.register_buffer("layer", drawn, persistent=False)
        self.ridge = Ridge(config.width or d, classes, domain.device)
        self.register_buffer("solved", torch.zeros(config.width or d, classes))
        self.seen, self.known = 0, 0
        self.chosen = 0.0

    def takes_steps(self, task: int) -> bool:
        """No task does."""
        return False

    def begin_task(self, task: int) -> None:
        """More outputs."""
        self.seen = self.classifier.outputs(task).stop

    def random(self, features: Tensor) -> Tensor:
        """h (B, M) of features (B, d)."""
        return features if self.layer is None else torch.relu(features @ self.layer)

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Adds the task's features to the sums, chooses lambda and solves."""
        parts = list(self.classifier.training_features(task))
        for features, labels in parts:
            self.ridge.add(self.random(features), labels)
        if self.config.lambda_ is not None:
            self.chosen = float(self.config.lambda_)
            self.solved.copy_(self.ridge.solve(self.chosen))
        else:
            features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
            held = held_out(labels, self.generator("ridge", task))
            strength = choose_strength(self.random(features), labels, self.classifier.outputs(task), held)
            solved, self.chosen = self.ridge.solve_from(strength)
            self.solved.copy_(solved)
        self.known = self.seen

    def restored(self, finished: int) -> None:
        """Counts the outputs that are known."""
        self.known = self.classifier.outputs(finished - 1).stop if finished else 0

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun)."""
        h, solved = self.random(features), self.solved[:, : self.seen]
        if "cosine_scores" in self.config.reference_quirks:
            return F.normalize(h, dim=1) @ F.normalize(solved, dim=0)
        return h @ solved

    def stored_parameters(self) -> int:
        """G as a triangle, and Q of the outputs known."""
        return self.ridge.gram.numel() + self.ridge.width * self.known

    def caveats(self) -> list[str]:
        """What is left out."""
        return ["nothing is adapted in the first task (the paper's phase 1)", *super().caveats()]

    def diagnostics(self) -> dict[str, Any]:
        """The last lambda, and the largest entry of the solution."""
        return {"lambda": self.chosen, "largest_weight": float(self.solved.abs().max())}
