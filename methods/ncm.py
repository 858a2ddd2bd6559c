"""Nearest class mean of frozen features, also called SimpleCIL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import FeatureDomain
from dualcl.benchmark.core.errors import UserError
from dualcl.methods.base import Method, MethodConfig, check, register_method
from dualcl.methods.shared.class_statistics import class_means


@dataclass(frozen=True)
class NCMConfig(MethodConfig):
    """Options of the nearest class mean."""

    metric: Literal["euclidean", "cosine"] = field(
        default="cosine", metadata={"help": "distance to the class means; cosine is SimpleCIL"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.metric in ("euclidean", "cosine"),
            f"method.metric must be euclidean or cosine, got {self.metric!r}",
        )


def read_out(means: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The linear map whose argmax is the nearest of `means` (C, D): weight (C, D) and bias (C,).

    Euclidean: |x - m|^2 is least where m . x - |m|^2 / 2 is greatest. Cosine: |x| is the same for all classes, so only
    the means need normalising.
    """
    if metric == "cosine":
        return torch.nn.functional.normalize(means, dim=1), means.new_zeros(len(means))
    return means, -means.square().sum(dim=1) / 2


@register_method(
    "ncm",
    domains=("classification",),
    summary="nearest class mean of frozen features, no training (SimpleCIL)",
    source="arXiv 2303.07338 (SimpleCIL: metric cosine)",
)
class NCM(Method):
    """Sets each class's read-out row from the mean frozen feature of its training images; takes no gradient step."""

    Config = NCMConfig
    requires = ("features",)
    frozen = True

    def takes_steps(self, task: int) -> bool:
        """No task does."""
        return False

    def begin_task(self, task: int) -> None:
        """Forgets the counts of the task before."""
        self.counts: list[int] = []

    def end_task(self, task: int) -> None:
        """Averages the task's features (in float64) and sets its rows; UserError for a class without images."""
        domain = cast(FeatureDomain, self.domain)
        means, counts = class_means(domain.training_features(task), domain.outputs(task), domain.network.width)
        empty = [domain.outputs(task)[i] for i in torch.nonzero(counts == 0).flatten().tolist()]
        if empty:
            raise UserError(
                f"ncm: task {task} has no training image for the outputs {empty}; add images or drop the classes"
            )
        self.counts = counts.tolist()
        weight, bias = read_out(means, self.config.metric)
        domain.set_output_rows(task, weight.float(), bias.float())

    def diagnostics(self) -> dict[str, Any]:
        """Training images behind each mean of the last task."""
        return {"images_per_class": self.counts}
