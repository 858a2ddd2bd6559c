"""Ridge regression on random features: a method in one file, as a stranger would write it. `ranpac` does more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain, FeatureDomain, Images, Network
from dualcl.methods.base import Method, MethodConfig, check, register_method
from dualcl.methods.shared.ridge import Ridge


@dataclass(frozen=True)
class RandomRidgeConfig(MethodConfig):
    """Options of the ridge."""

    width: int = field(default=2000, metadata={"help": "random features (M in the paper: 10000)"})
    lambda_: float = field(default=1000.0, metadata={"help": "lambda, the ridge; the paper chooses it anew each task"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 1, f"method.width must be at least 1, got {self.width}")
        check(self.lambda_ > 0, f"method.lambda_ must be positive, got {self.lambda_}")


@register_method(
    "random_ridge",
    domains=("classification",),
    summary="ridge regression on random features of the frozen network",
    source="arXiv 2307.02251 (without first-task adaptation, lambda given)",
)
class RandomRidge(Method):
    """h = ReLU(f W) with a fixed random W (d, M); after each task the rows are (G + lambda I)^-1 Q.

    Differs from the paper: lambda is given, not chosen on a fifth of each task; nothing is adapted in the first one.
    """

    Config = RandomRidgeConfig
    requires = ("features",)
    frozen = True
    reads_rows = False
    solved: Tensor

    def __init__(self, config: RandomRidgeConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.classifier = cast(FeatureDomain, domain)
        classes = sum(len(self.classifier.outputs(task)) for task in range(n_tasks))
        layer = torch.randn(self.classifier.network.width, config.width, generator=self.generator("layer"))
        # drawn from the seed: it need not be stored
        self.register_buffer("layer", layer.to(domain.device), persistent=False)
        self.ridge = Ridge(config.width, classes, domain.device)
        self.register_buffer("solved", torch.zeros(config.width, classes, device=domain.device))
        self.seen = 0

    def takes_steps(self, task: int) -> bool:
        """No task does."""
        return False

    def begin_task(self, task: int) -> None:
        """More outputs."""
        self.seen = self.classifier.outputs(task).stop

    def features(self, images: Images, network: Network) -> Tensor:
        """(B, d) of the frozen network."""
        return network(images, key="plain")

    def end_task(self, task: int) -> None:
        """Adds the task's features to the sums and solves."""
        for features, labels in self.classifier.training_features(task):
            self.ridge.add(self._random(features), labels)
        self.solved.copy_(self.ridge.solve(self.config.lambda_))

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun)."""
        return self._random(features) @ self.solved[:, : self.seen]

    def stored_parameters(self) -> int:
        """The sums; the rows follow from them."""
        return self.ridge.gram.numel() + self.ridge.cross.numel()

    def caveats(self) -> list[str]:
        """What differs from the paper."""
        return ["lambda is given and nothing is adapted in the first task", *super().caveats()]

    def diagnostics(self) -> dict[str, Any]:
        """Largest entry of the solution."""
        return {"largest_weight": float(self.solved.abs().max())}

    def _random(self, features: Tensor) -> Tensor:
        return torch.relu(features @ cast(Tensor, self.layer))
