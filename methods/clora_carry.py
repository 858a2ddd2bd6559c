"""C-LoRA with a classifier made of statistics that are carried along: ours, after no paper.

C-LoRA's promise is kept: no image is stored, updates are folded after each task, a task's cost does not grow. Its
trained rows are not: they never meet another task's classes, and what they say of them is left to chance. Instead

    mu_c of every class, one covariance S of all (within classes),   S_r = S / v + g I,   v = mean(diag S),
    score_c(x) = mu_c' S_r^-1 x - mu_c' S_r^-1 mu_c / 2                                            (LDA, equal priors)

with x and mu_c centred on the mean of all mu_c; neither that nor the unit v changes an answer.

Training moves the features that old statistics were made of. With X, Y (n, d) the features of the *new* task's images
before and after its training, both centred on the mean of X and of Y, and k the mean of X'X's diagonal times `ridge`,

    M = (X'X + k I)^-1 (X'Y + k I),   mu_c <- (mu_c - mean X) M + mean Y,   S <- M' S M

carries them: no old image is needed, directions that the new images do not show stay as they were. `carry: none` leaves
the statistics as they were. `lambda_` is C-LoRA's; 0 is plain LoRA, so that a table can say what the penalty adds.

Whose ideas: LDA on a pretrained network's features, SLDA (arXiv 1909.01520); drift of old means estimated on new
images, SDC (arXiv 2004.00440); a learnt map of old features, arXiv 2004.00713, ADC and LDC (arXiv 2405.19074,
2407.08536).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain, FeatureDomain
from dualcl.methods.base import check, register_method, unless
from dualcl.methods.clora import CLoRA, CLoRAConfig
from dualcl.methods.shared.class_statistics import Moments, carrying_map, class_moments
from dualcl.methods.shared.low_rank import without_updates
from dualcl.methods.shared.symmetric import cholesky, double, pack, packed_size, unpack


@dataclass(frozen=True)
class CLoRACarryConfig(CLoRAConfig):
    """Hyper-parameters: C-LoRA's, of the map and of the classifier."""

    lambda_: float = field(default=0.0, metadata={"help": "lambda of C-LoRA's penalty; 0: plain LoRA"})
    carry: Literal["map", "none"] = field(
        default="map", metadata={"help": "how old statistics follow the features: by a linear map, or not at all"}
    )
    ridge: float = field(default=1.0, metadata={"help": "ridge of the map, in mean squares of a feature"})
    shrinkage: float = field(default=0.1, metadata={"help": "g, shrinkage of the covariance, in mean variances"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.carry in ("map", "none"), f"method.carry must be map or none, got {self.carry!r}")
        check(self.ridge > 0, f"method.ridge must be positive, got {self.ridge}")
        check(self.shrinkage > 0, f"method.shrinkage must be positive, got {self.shrinkage}")
        check(not self.align, "method.align trains rows, which are not read here; leave it out")
        check(not self.one_adapter, "method.one_adapter is an ablation of C-LoRA alone; leave it out")

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.carry == "map", "method.carry=map", "ridge")


def lda(means: Tensor, covariance: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weight (C, d) and bias (C,) of means (C, d) and a covariance (d, d), all float64."""
    variance = covariance.diagonal().mean()
    why = "the covariance within classes is 0: it takes two different images of a class"
    check(bool(variance > 0), why)
    shrunk = covariance / variance + shrinkage * torch.eye(len(covariance)).to(covariance)
    weight = torch.cholesky_solve(means.T, cholesky(shrunk, why)).T
    return weight, -(weight * means).sum(1) / 2


@register_method(
    "clora_carry",
    domains=("classification",),
    summary="LoRA or C-LoRA, classes by means and one covariance, which a map of the features carries along",
    source="ours",
)
class CLoRACarry(CLoRA):
    """Low-rank updates as in C-LoRA; trained rows serve the training alone."""

    Config = CLoRACarryConfig
    requires = ("features",)
    reads_rows = False
    means: Tensor
    covariance: Tensor
    images: Tensor

    def __init__(self, config: CLoRACarryConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.classifier = cast(FeatureDomain, domain)
        d, classes = self.classifier.network.width, self.classifier.outputs(n_tasks - 1).stop
        self.register_buffer("means", torch.zeros(classes, d))
        self.register_buffer("covariance", torch.zeros(packed_size(d)))
        #: that the covariance was made of
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))
        self.begun = 0
        #: of the classifier, and what features are centred on: products of large numbers would round differences away
        self.weight, self.bias, self.centre = torch.zeros(0, d), torch.zeros(0), torch.zeros(d)

    @property
    def known(self) -> int:
        """Outputs whose tasks ended."""
        return self.classifier.outputs(self.finished - 1).stop if self.finished else 0

    def begin_task(self, task: int) -> None:
        """More outputs."""
        super().begin_task(task)
        self.begun = self.classifier.outputs(task).stop

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Folds the update, carries the old statistics along and adds the new classes'."""
        old, outputs, mapped = self.known, self.classifier.outputs(task), self.config.carry == "map" and task > 0
        with without_updates(self.updates.values()):
            before = torch.cat([x for x, _ in self.classifier.training_features(task)]) if mapped else None
        super().end_task(task)
        parts = list(self.classifier.training_features(task))
        covariance = unpack(double(self.covariance), self.means.shape[1])
        if before is not None:
            x, y = double(before), double(torch.cat([x for x, _ in parts]))
            moments = Moments(x)
            cross = (x - moments.mean).T @ (y - y.mean(0))
            by = carrying_map(moments, cross, self.config.ridge)
            self.means[:old] = ((double(self.means[:old]) - moments.mean) @ by + y.mean(0)).to(self.means)
            covariance = by.T @ covariance @ by
        classes = class_moments(parts, outputs)
        self.means[outputs.start : outputs.stop] = torch.stack([c.mean for c in classes]).to(self.means)
        n, new = int(self.images), sum(c.count for c in classes)
        within = torch.stack([c.scatter for c in classes]).sum(0)
        self.covariance.copy_(pack((covariance * n + within) / (n + new)))
        self.images.fill_(n + new)
        self._solve()

    def restored(self, finished: int) -> None:
        """Brings weights and classifier in line with the restored statistics."""
        super().restored(finished)
        self._solve()

    def _solve(self) -> None:
        if self.known:
            covariance = unpack(double(self.covariance), self.means.shape[1])
            means = double(self.means[: self.known])
            weight, bias = lda(means - means.mean(0), covariance, self.config.shrinkage)
            self.weight, self.bias, self.centre = (t.to(self.means) for t in (weight, bias, means.mean(0)))

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun), those of tasks that did not end lowest."""
        known = (features - self.centre.to(features)) @ self.weight.T.to(features) + self.bias.to(features)
        lowest = features.new_full((len(features), self.begun - self.known), torch.finfo(features.dtype).min)
        return torch.cat([known, lowest], 1)

    def stored_parameters(self) -> int:
        """The updates, a mean of each class and the covariance's triangle."""
        return super().stored_parameters() + self.known * self.means.shape[1] + self.covariance.numel()

    def caveats(self) -> list[str]:
        """What is kept."""
        own = "ours, not a published method; stores a mean of every class and one covariance"
        return [own, "two more passes over each task's images", *super().caveats()]
