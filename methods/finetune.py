"""Full fine-tuning in sequence (FT, FT++), and joint training as the upper bound. Both domains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from dualcl.methods.base import Method, MethodConfig, ParamGroup, register_method

if TYPE_CHECKING:
    from dualcl.benchmark.core.domain import Domain


@dataclass(frozen=True)
class FinetuneConfig(MethodConfig):
    """Hyper-parameters of full fine-tuning; the reference code uses lr 5e-5 for it (protocols.md)."""

    lr: float = field(default=5e-5, metadata={"help": "learning rate of the weights"})


@register_method(
    "finetune",
    domains=("classification", "customization"),
    summary="FT: all weights the domain offers, loss over all outputs seen so far",
    source="arXiv 2211.13218 (baseline FT)",
)
class Finetune(Method):
    """Trains the domain's full parameters, one task after another.

    In classification these are all weights of the backbone; in customization K and V of the cross-attention, which is
    Custom Diffusion (arXiv 2212.04488) in sequence without prior images.
    """

    Config = FinetuneConfig
    output_scope: ClassVar[Literal["task", "seen"]] = "seen"

    def __init__(self, config: FinetuneConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        # the same Parameter objects as the model's: saving and restoring the method restores the model
        self.weights = nn.ParameterList(domain.full_parameters().values())
        self.weights.requires_grad_(True)

    def trained(self) -> list[ParamGroup]:
        """All weights."""
        return [ParamGroup("weights", list(self.weights), self.config.lr, self.config.weight_decay)]


@register_method(
    "finetune_pp",
    domains=("classification", "customization"),
    summary="FT++: as finetune, loss and trained rows of the current task only",
    source="arXiv 2211.13218 (baseline FT++)",
)
class FinetunePP(Finetune):
    """Full fine-tuning with cross entropy on the current task's outputs only."""

    output_scope = "task"


@register_method(
    "joint",
    domains=("classification", "customization"),
    summary="upper bound: all tasks' data at once, all weights",
    source="arXiv 2211.13218 (upper bound)",
)
class Joint(Finetune):
    """Full fine-tuning on all tasks together: not continual learning, the ceiling of a table."""

    output_scope = "task"
    joint = True
