"""RanPAC: ridge regression on random features of a network that is frozen, or adapted in the first task alone.

Source: McDonnell et al., arXiv 2307.02251 (NeurIPS 2023); public code RanPAC/RanPAC, read at 012927f. With f the
network's feature, W (d, M) fixed and drawn from N(0, 1), y one-hot, sums over all images so far:

    h = ReLU(f W),  G = sum h h',  Q = sum h y',  W_o = (G + lambda I)^-1 Q,  scores = W_o' h

lambda is chosen anew in each task: of 10^-8, 10^-7, ..., 10^8 the one whose solution from four fifths of the task's
images has the least squared error on the other fifth, which is drawn class by class. It is then used with the G of all
tasks, so that its weight shrinks as G grows; so the paper.

`adapt: adapter` is its phase 1, worth 6 points on ImageNet-R in its table: bottlenecks (`shared/adapters.py`) and rows
by cosine with a learnt scale are trained on the first task; then the bottlenecks stay and the rows are dropped.

Differs from the paper: by default nothing is adapted. Bottlenecks on all data, which it has on CIFAR-100 (on ImageNet-R
scales and shifts after every operation), without dropout; optimiser, epochs and schedule are the preset's. Where
G + lambda I cannot be solved the next larger lambda is taken (the public code then takes what comes, NaN included). The
public code holds out the last fifth of the shuffled images, whatever their classes. One eigendecomposition serves all
lambda.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain, FeatureDomain, Images, Network
from dualcl.methods.base import Method, MethodConfig, ParamGroup, check, check_quirks, register_method, unless
from dualcl.methods.shared.adapters import CosineRows, adapter_groups, bottlenecks, stream_width
from dualcl.methods.shared.ridge import Ridge, choose_strength, held_out
from dualcl.methods.shared.symmetric import packed_size


@dataclass(frozen=True)
class RanPACConfig(MethodConfig):
    """Options of RanPAC."""

    width: int = field(default=10_000, metadata={"help": "M, random features; 0: the network's own"})
    lambda_: float | None = field(
        default=None,
        metadata={"help": "lambda, the ridge; null: chosen in each task on a fifth of its images"},
    )
    adapt: Literal["none", "adapter"] = field(
        default="none", metadata={"help": "adapter: bottlenecks are trained in the first task, then all is frozen"}
    )
    bottleneck: int = field(default=64, metadata={"help": "width of the bottlenecks"})
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of public codes, for parity only: cosine_scores"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "cosine_scores": "the solution is read out by cosine, which is another classifier (LAMDA-PILOT's RanPAC)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 0, f"method.width must not be negative, got {self.width}")
        check(self.adapt in ("none", "adapter"), f"method.adapt must be none or adapter, got {self.adapt!r}")
        check(self.bottleneck >= 1, f"method.bottleneck must be at least 1, got {self.bottleneck}")
        check(self.lambda_ is None or self.lambda_ > 0, f"method.lambda_ must be positive, got {self.lambda_}")
        check_quirks(self.reference_quirks, self.QUIRKS)

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.adapt == "adapter", "method.adapt=adapter", "bottleneck")


@register_method(
    "ranpac",
    domains=("classification",),
    summary="RanPAC: ridge regression on random features; the network is frozen, or adapted in the first task alone",
    source="arXiv 2307.02251",
)
class RanPAC(Method):
    """Keeps G, packed, Q and the bottlenecks; W is drawn from the seed and W_o follows from them."""

    Config = RanPACConfig
    requires: tuple[str, ...] = ("features",)
    frozen = True
    reads_rows = False
    trains_rows = False
    layer: Tensor | None
    solved: Tensor

    def __init__(self, config: RanPACConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        if config.adapt != "none":
            self.requires = ("features", "sides")
        super().__init__(config, domain, n_tasks, seed)
        self.classifier = cast(FeatureDomain, domain)
        network, classes, device = self.classifier.network, self.classifier.outputs(n_tasks - 1).stop, domain.device
        d = network.width
        drawn = torch.randn(d, config.width, generator=self.generator("layer")) if config.width else None
        self.register_buffer("layer", drawn, persistent=False)
        self.ridge = Ridge(config.width or d, classes, device)
        self.register_buffer("solved", torch.zeros(config.width or d, classes))
        self.adapters, self.first_rows = nn.ModuleList(), nn.ModuleList()
        if config.adapt != "none":
            start = self.generator("adapters")
            self.adapters.extend(bottlenecks(network.blocks, stream_width(domain), config.bottleneck, start, device))
            self.first_rows.append(CosineRows(len(self.classifier.outputs(0)), d, start, device))
        self.seen, self.known = 0, 0
        self.chosen = 0.0

    def takes_steps(self, task: int) -> bool:
        """The first one, where it adapts."""
        return task == 0 and self.config.adapt != "none"

    def begin_task(self, task: int) -> None:
        """More outputs; after the first task nothing is trained."""
        self.seen = self.classifier.outputs(task).stop
        for part in (self.adapters, self.first_rows):
            part.requires_grad_(task == 0)

    def trained(self) -> list[ParamGroup]:
        """Bottlenecks and the first task's rows."""
        return adapter_groups(self.config, self.adapters, self.first_rows)

    def features(self, images: Images, network: Network) -> Tensor:
        """(B, d), through the bottlenecks."""
        key = "plain" if self.config.adapt == "none" else "adapted" if self.known else None
        return network(images, sides=dict(enumerate(self.adapters)), key=key)

    def loss(self, batch: Any) -> Tensor:
        """Cross entropy of the first task's rows."""
        features = self.features(self.classifier.images(batch), self.classifier.network)
        (rows,) = self.first_rows
        return cast(CosineRows, rows).loss(features, self.classifier.targets(batch))

    def random(self, features: Tensor) -> Tensor:
        """h (B, M) of features (B, d)."""
        return features if self.layer is None else torch.relu(features @ self.layer)

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Adds the task's features to the sums, chooses lambda and solves."""
        self.known = self.seen  # the bottlenecks stay from now on
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
        """G as a triangle, Q of the outputs known, and the bottlenecks."""
        kept = sum(p.numel() for p in self.adapters.parameters())
        return self.ridge.gram.numel() + self.ridge.width * self.known + kept

    @classmethod
    def least_kept(cls, config: RanPACConfig) -> int:
        """G."""
        return packed_size(config.width)

    def caveats(self) -> list[str]:
        """What is left out, or learnt in the first task alone."""
        adapted = "takes steps in the first task alone: bottlenecks beside the MLPs are trained there and then stay"
        without = "nothing is adapted in the first task (the paper's phase 1)"
        return [without if self.config.adapt == "none" else adapted, *super().caveats()]

    def diagnostics(self) -> dict[str, Any]:
        """The last lambda, and the largest entry of the solution."""
        return {"lambda": self.chosen, "largest_weight": float(self.solved.abs().max())}
