"""FeCAM: Mahalanobis distances to class means, with a covariance of each class, of the frozen network's features.

Source: Goswami et al., arXiv 2309.14062 (NeurIPS 2023); public code dipamgoswami/FeCAM, read at d2479b7. Features x are
normalised to length 1; of each class mu and the unbiased covariance Sigma of normalised features:

    Sigma_s = Sigma + g1 V1 I + g2 V2 (1 - I),   V1, V2: mean diagonal entry, mean non-zero entry beside the diagonal
    R = D^-1/2 Sigma_s D^-1/2,  D = diag Sigma_s;   score = -(x - mu)' R^-1 (x - mu)

`covariance: common` keeps one covariance for all classes: that of each task's features together, mixed by the numbers
of classes. No Tukey transform (the paper's for ResNets): a ViT's features are negative too.

Differs from the public code: one setting, g1 = 1, g2 = 0, its CIFAR-100's (10, 10 on ImageNet-R, chosen on no split). A
Cholesky factor, not a pseudo-inverse, which hides covariances that are not definite: where g2 >= g1 they may be. The
common covariance is that of normalised features, and R follows from it; there, for ResNets alone, features have their
own lengths, Sigma_s is read as it is, and each task's is shrunk before it is mixed in, but not the first's.
LAMDA-PILOT's version is another method: it correlates the rows of the covariance, under a first-task adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain, FeatureDomain, Images, Network
from dualcl.methods.base import Method, MethodConfig, check, register_method
from dualcl.methods.shared.class_statistics import ClassGaussians
from dualcl.methods.shared.symmetric import cholesky, double, pack, packed_size, unpack

#: classes whose distances are computed at once
BLOCK = 16


@dataclass(frozen=True)
class FeCAMConfig(MethodConfig):
    """Options of FeCAM."""

    gamma1: float = field(default=1.0, metadata={"help": "shrinkage of the diagonal, in mean diagonal entries"})
    gamma2: float = field(default=0.0, metadata={"help": "shrinkage beside it, in mean entries there"})
    covariance: Literal["class", "common"] = field(
        default="class", metadata={"help": "one of each class, or one of all (d^2 + C d numbers)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma1", "gamma2"):
            check(getattr(self, name) >= 0, f"method.{name} must not be negative, got {getattr(self, name)}")
        known = self.covariance in ("class", "common")
        check(known, f"method.covariance must be class or common, got {self.covariance!r}")


def correlations(covariance: Tensor, gamma1: float, gamma2: float) -> Tensor:
    """R (d, d) of a covariance (d, d)."""
    diagonal = covariance.diagonal()
    beside = covariance - torch.diag(diagonal)
    mean = beside.sum() / (beside != 0).sum().clamp_min(1)
    shrunk = covariance + gamma2 * mean * (1 - torch.eye(len(covariance)).to(covariance))
    shrunk.diagonal().copy_(diagonal + gamma1 * diagonal.mean())
    scale = shrunk.diagonal().rsqrt()
    return shrunk * torch.outer(scale, scale)


def distances(features: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """(B, C): (x - mu)' (L L')^-1 (x - mu) of features (B, d), means (C, d), lower factors (C, d, d) or (1, d, d)."""
    found = []
    for start in range(0, len(means), BLOCK):
        away = (features - means[start : start + BLOCK].unsqueeze(1)).mT
        own = factors if len(factors) == 1 else factors[start : start + BLOCK]
        found.append(torch.linalg.solve_triangular(own, away, upper=False).square().sum(1))
    return torch.cat(found).T


@register_method(
    "fecam",
    domains=("classification",),
    summary="FeCAM: Mahalanobis distances to class means of frozen features, no training",
    source="arXiv 2309.14062",
)
class FeCAM(Method):
    """Keeps means and covariances, as triangles; factors follow from them."""

    Config = FeCAMConfig
    requires = ("features",)
    frozen = True
    reads_rows = False
    common: Tensor

    def __init__(self, config: FeCAMConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.classifier = cast(FeatureDomain, domain)
        d, classes = self.classifier.network.width, self.classifier.outputs(n_tasks - 1).stop
        self.gaussians = ClassGaussians(classes, d, covariances=config.covariance == "class")
        kept = packed_size(d) if config.covariance == "common" else 0
        self.register_buffer("common", torch.zeros(kept))
        self.begun, self.known = 0, 0
        #: Cholesky factors (n, d, d) of R, float32; none before the first task's end
        self.factors = torch.zeros(0, d, d).to(self.gaussians.means)

    def takes_steps(self, task: int) -> bool:
        """No task does."""
        return False

    def begin_task(self, task: int) -> None:
        """More outputs."""
        self.begun = self.classifier.outputs(task).stop

    def features(self, images: Images, network: Network) -> Tensor:
        """(B, d) of length 1."""
        return F.normalize(network(images, key="plain"), dim=1)

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Adds the statistics of the task's classes."""
        outputs = self.classifier.outputs(task)
        moments = self.gaussians.add(self.classifier.training_features(task), outputs)
        if self.config.covariance == "common":
            whole = moments[0]
            for part in moments[1:]:
                whole.merge(part)
            self.common.mul_(outputs.start / outputs.stop)
            self.common.add_(pack(whole.covariance()).to(self.common), alpha=len(outputs) / outputs.stop)
            self.factors = self.factors[:0]
        self.known = outputs.stop
        self._factorise()

    def restored(self, finished: int) -> None:
        """Computes the factors again."""
        self.known = self.classifier.outputs(finished - 1).stop if finished else 0
        self.factors = self.factors[:0]
        self._factorise()

    def _factorise(self) -> None:
        new = []
        for output in range(len(self.factors), self.known if self.config.covariance == "class" else min(self.known, 1)):
            common = self.config.covariance == "common"
            covariance = (
                unpack(double(self.common), self.gaussians.width) if common else self.gaussians.covariance(output)
            )
            whose = "the common covariance" if common else f"the covariance of output {output}"
            why = f"{whose} is not positive definite; raise method.gamma1 above method.gamma2"
            check(bool(covariance.diagonal().sum() > 0), f"{whose} is 0: it takes different images")
            r = correlations(covariance, self.config.gamma1, self.config.gamma2)
            new.append(cholesky(r, why).to(self.gaussians.means))
        if new:
            self.factors = torch.cat([self.factors.to(new[0]), torch.stack(new)])

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun), those of tasks that did not end lowest."""
        lowest = features.new_full((len(features), self.begun - self.known), torch.finfo(features.dtype).min)
        if not self.known:
            return lowest
        found = distances(features, self.gaussians.means[: self.known], self.factors)
        return torch.cat([-found, lowest], 1)

    def stored_parameters(self) -> int:
        """Means, and the covariances' triangles."""
        if self.config.covariance == "common":
            return self.known * self.gaussians.width + self.common.numel()
        return self.gaussians.numbers(self.known)

    def caveats(self) -> list[str]:
        """What is stored."""
        stored = "one covariance" if self.config.covariance == "common" else "a mean and a covariance of every class"
        return [f"stores {stored}", *super().caveats()]
