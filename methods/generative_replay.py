"""Generative replay: the model's own images of earlier concepts are trained on together with the new one's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from dualcl.benchmark.core.domain import ReplayDomain
from dualcl.methods.base import check, register_method
from dualcl.methods.shared.whole_weights import FinetuneConfig, WholeWeights


@dataclass(frozen=True)
class GenerativeReplayConfig(FinetuneConfig):
    """Hyper-parameters of generative replay."""

    per_concept: int = field(default=8, metadata={"help": "images made of every earlier concept before a task"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.per_concept >= 1, f"method.per_concept must be at least 1, got {self.per_concept}")


@register_method(
    "generative_replay",
    domains=("customization",),
    summary="the weights in full, on the task's data and on images of earlier concepts that the model makes itself",
    source="arXiv 1705.08690; a baseline of arXiv 2304.06027",
)
class GenerativeReplay(WholeWeights):
    """Trains the domain's full parameters on the task's data and on replayed images of all earlier tasks.

    The images are made once per task by the model as the last task left it, and dropped afterwards; no real image is
    kept. A picture of an earlier task counts as one of the task's own, so that the task's share of the steps falls:
    with eight of each, to an eighth at the eighth task. Differs from arXiv 1705.08690: the model that is taught is its
    own generator, and the losses on new and replayed data are not weighed.
    """

    Config = GenerativeReplayConfig
    requires = ("replay",)

    def prepare(self, task: int) -> None:
        """Makes images of every earlier task."""
        if task > 0:
            cast(ReplayDomain, self.domain).replay(range(task), self.config.per_concept)

    def caveats(self) -> list[str]:
        """What is done beside the steps."""
        own = "makes images of every earlier concept before each task: its cost grows with them"
        share = "replayed pictures share the task's steps: ever fewer are the new concept's"
        return [own, share, *super().caveats()]
