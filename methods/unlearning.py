"""Continual unlearning: concept ablation and ESD, one request after another, with five ways to hold what is to stay.

Source: arXiv 2511.07970, code justinhylee135/CUIG dd22048 (its code was read, its formulas second hand); base losses:
concept ablation, arXiv 2303.13516, and ESD, arXiv 2303.07345. With c the target's prompt, c* the anchor's:

    concept_ablation   || eps(x_t, c) - sg eps(x_t, c*) ||^2, x_t noised pictures of the anchor
    esd                || eps(x_t, c) - [f(x_t, "") - eta (f(x_t, c) - f(x_t, ""))] ||^2, f the network before the
                       request, x_t noised pictures of the target

eps is what the network predicts, a velocity too: the goals are affine in it. K and V are trained in full. The options
of `shared/held_updates.py` are options of both: l1, l2, select, project, merge.

Differs from the paper: the update is projected, not gradients (`project_gradients`), so that it stays in its subspace
whatever the optimiser, and that is exactly the null space of what is held, where the paper's projection has a ridge
that lets a ten-thousandth through; the start token is held too (`keep_start`), which every prompt attends to; at most
half of the input's directions are held, the nearest things first. The gradient behind `select` is of batches of the
task, not of one trajectory. ESD's pictures are made once before a request, not partly sampled anew in each step.
`weight_decay` is of the update: the weights do not shrink. There is no simultaneous upper bound. A network that
predicts velocity pays for distances of velocities, as in its own training, which weigh high noise more than the
papers' do; `distance: noise` has theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dualcl.methods.base import check, register_method
from dualcl.methods.shared.held_updates import HeldConfig, HeldUpdates
from dualcl.methods.shared.low_rank import without_updates


@dataclass(frozen=True)
class UnlearningConfig(HeldConfig):
    """What both have."""

    distance: Literal["prediction", "noise"] = field(
        default="prediction",
        metadata={
            "help": "of what the network predicts, or of the noise it amounts to; the same unless it is velocity"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.distance in ("prediction", "noise")
        check(known, f"method.distance must be prediction or noise, got {self.distance!r}")


@dataclass(frozen=True)
class AblationConfig(UnlearningConfig):
    """Hyper-parameters of concept ablation; published: 1,000 to 2,000 steps of 4 pictures."""

    lr: float = field(default=8e-6, metadata={"help": "learning rate of K and V"})
    teacher: Literal["current", "previous"] = field(
        default="current", metadata={"help": "who says what the anchor gives: the network as it is, or was before"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.teacher in ("current", "previous")
        check(known, f"method.teacher must be current or previous, got {self.teacher!r}")


@dataclass(frozen=True)
class ESDConfig(UnlearningConfig):
    """Hyper-parameters of ESD; published for SDXL: 200 steps of 1 picture."""

    lr: float = field(default=2e-4, metadata={"help": "learning rate of K and V"})
    eta: float = field(default=1.0, metadata={"help": "negative guidance; public code's guidance of 2 is 1 here"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.eta > 0, f"method.eta must be positive, got {self.eta}")


class Unlearning(HeldUpdates):
    """Makes what is predicted under a target's prompts something else."""

    requires = ("errors", "requests")

    def goal(self, batch: Any, targets: tuple[str, ...]) -> Tensor:
        """What is to be predicted (B, C, h, w) under the targets' prompts, without gradient."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        """Mean squared distance to the goal of what is predicted under the target's prompts."""
        targets = self.offered.targets_of(batch.prompts)
        goal = self.goal(batch, targets)
        predicted = self.offered.paired_predictions(batch, targets)
        if self.config.distance == "prediction":
            return F.mse_loss(predicted, goal)
        return ((predicted - goal).square().mean((1, 2, 3)) * self.offered.noise_weights(batch)).mean()

    def caveats(self) -> list[str]:
        """What a reader must look at."""
        return ["how far targets are gone differs between rows: read RA beside UA", *super().caveats()]


@register_method(
    "concept_ablation",
    domains=("customization",),
    summary="requests to unlearn: a target's prompts are to give what its anchor's give; K and V in full",
    source="arXiv 2303.13516, 2511.07970",
)
class ConceptAblation(Unlearning):
    """The target's prompts are taught what the network itself predicts under the anchor's."""

    Config = AblationConfig

    @torch.no_grad()
    def goal(self, batch: Any, targets: tuple[str, ...]) -> Tensor:
        """What is predicted under the anchor's prompts."""
        if self.config.teacher == "current":
            return self.offered.paired_predictions(batch, batch.prompts)
        with without_updates(self.each()):
            return self.offered.paired_predictions(batch, batch.prompts)


@register_method(
    "esd",
    domains=("customization",),
    summary="requests to unlearn: a target's prompts are led away from what they gave; K and V in full",
    source="arXiv 2303.07345, 2511.07970",
)
class ESD(Unlearning):
    """The target's prompts are taught the empty prompt's prediction, minus what the target added to it."""

    Config = ESDConfig

    def prepare(self, task: int) -> None:
        """Has pictures of the target made by the network as it stands."""
        self.offered.picture_targets()
        super().prepare(task)

    def goal(self, batch: Any, targets: tuple[str, ...]) -> Tensor:
        """f("") - eta (f(c) - f(""))."""
        with without_updates(self.each()):
            empty = self.offered.paired_predictions(batch, [""] * len(targets))
            away = self.offered.paired_predictions(batch, targets) - empty
        return empty - float(self.config.eta) * away
