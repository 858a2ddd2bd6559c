"""SLCA: slow full tuning of the backbone, and a classifier aligned with Gaussians of all classes.

Source: Zhang et al., arXiv 2303.05118 (ICCV 2023); public code GengDavid/SLCA, read at 169d4e6. Stage 1: `finetune_pp`
with a rate of the backbone a hundredth of the classifier's. Stage 2, after each task but the first:
`shared/alignment.py`, which has the formulas. Statistics of a class are never updated, though the backbone moves on.

Differs from the public code: optimiser, schedule and pixels of stage 1 are the preset's (there SGD, 1e-4 and 1e-2,
x 0.1 at 40 of 50 epochs; ImageNet's mean and deviation). Alignment starts from the rows aligned before, not from
unaligned ones (`restart_rows`). A covariance is factorised once in float64, not each epoch in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import check_quirks, register_method
from dualcl.methods.shared.alignment import AlignConfig, Aligner, caveat
from dualcl.methods.shared.whole_weights import WholeWeights


@dataclass(frozen=True)
class SLCAConfig(AlignConfig):
    """Options of SLCA; rates as in its public code."""

    lr: float = field(default=1e-4, metadata={"help": "learning rate of the weights"})
    head_lr: float = field(default=1e-2, metadata={"help": "learning rate of the classifier's rows"})
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of the public code, for parity only: restart_rows, equal_tasks"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "restart_rows": "each alignment starts from the rows as they were trained; two sets of rows are kept",
        "equal_tasks": "a class's task, for the scale of its mean, is its number over the current task's size",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_quirks(self.reference_quirks, self.QUIRKS)


@register_method(
    "slca",
    domains=("classification",),
    summary="SLCA: all weights slowly, then the classifier aligned on draws from Gaussians of all classes",
    source="arXiv 2303.05118",
)
class SLCA(WholeWeights):
    """Full fine-tuning on the current task's outputs, then alignment. With `align_epochs` 0 it is FT++."""

    Config = SLCAConfig
    requires = ("features",)

    def __init__(self, config: SLCAConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.aligner = Aligner(domain, n_tasks) if config.align_epochs else None

    def end_task(self, task: int) -> None:
        """Aligns all rows."""
        if self.aligner is not None:
            quirks = self.config.reference_quirks
            self.aligner.end_task(
                task,
                self.config,
                self.generator("align", task),
                restart="restart_rows" in quirks,
                equal="equal_tasks" in quirks,
            )

    def restored(self, finished: int) -> None:
        """Counts the tasks whose rows are aligned."""
        if self.aligner is not None:
            self.aligner.finished = finished

    def scores(self, features: Tensor) -> Tensor:
        """By the aligned rows."""
        return super().scores(features) if self.aligner is None else self.aligner.scores(features)

    def stored_parameters(self) -> int:
        """The backbone, and the Gaussians of classes seen."""
        kept = sum(w.numel() for w in self.weights)
        restart = "restart_rows" in self.config.reference_quirks
        return kept + (0 if self.aligner is None else self.aligner.numbers(restart))

    def caveats(self) -> list[str]:
        """Stored covariances and the second optimiser."""
        return [*([] if self.aligner is None else [caveat(self.config)]), *super().caveats()]
