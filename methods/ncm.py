"""Nearest class mean of frozen features, also called SimpleCIL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import FeatureDomain
from dualcl.benchmark.core.errors import UserError
from dualcl.methods.base import Method, MethodConfig, check, register_method


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
    takes_steps = False

    def begin_task(self, task: int) -> None:
        """Forgets the counts of the task before."""
        self.counts: list[int] = []

    def end_task(self, task: int) -> None:
        """Averages the task's features (in float64) and sets its rows; UserError for a class without images."""
        domain = cast(FeatureDomain, self.domain)
        outputs = domain.outputs(task)
        sums = torch.zeros(len(outputs), domain.feature_dim, dtype=torch.float64)
        counts = torch.zeros(len(outputs), dtype=torch.float64)
        for features, labels in domain.training_features(task):
            rows = labels.cpu() - outputs.start
            sums.index_add_(0, rows, features.detach().to("cpu", torch.float64))
            counts += torch.bincount(rows, minlength=len(outputs))
        empty = [outputs[i] for i in torch.nonzero(counts == 0).flatten().tolist()]
        if empty:
            raise UserError(
                f"ncm: task {task} has no training image for the outputs {empty}; add images or drop the classes"
            )
        self.counts = counts.to(torch.int64).tolist()
        weight, bias = read_out(sums / counts.unsqueeze(1), self.config.metric)
        domain.set_output_rows(task, weight.float(), bias.float())

    def diagnostics(self) -> dict[str, Any]:
        """Training images behind each mean of the last task."""
        return {"images_per_class": self.counts}
