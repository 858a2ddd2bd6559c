"""Custom Diffusion in sequence: K and V of the cross-attention in full, beside images of the concept's class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from dualcl.benchmark.domain import PriorDomain
from dualcl.methods.base import check, register_method
from dualcl.methods.finetune import Finetune, FinetuneConfig

if TYPE_CHECKING:
    from dualcl.benchmark.domain import Domain


@dataclass(frozen=True)
class CustomDiffusionConfig(FinetuneConfig):
    """Hyper-parameters of Custom Diffusion; the public script multiplies its rate of 1e-5 by the batch size."""

    lr: float = field(default=1e-5, metadata={"help": "learning rate of the weights"})
    head_lr: float = field(
        default=1e-5, metadata={"help": "learning rate of the token rows; the public script has one rate for both"}
    )
    prior_weight: float = field(
        default=1.0, metadata={"help": "weight of the loss on prior images, made by the pretrained model; 0: none"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.prior_weight >= 0, f"method.prior_weight must not be negative, got {self.prior_weight}")


@register_method(
    "custom_diffusion",
    domains=("customization",),
    summary="Custom Diffusion in sequence: K and V of the cross-attention in full, with prior preservation",
    source="arXiv 2212.04488",
)
class CustomDiffusion(Finetune):
    """Trains the domain's full parameters, one task after another, with the prior-preservation loss.

    Differs from the public script: the token rows are a parameter of their own. There the whole token table is in
    AdamW with its gradients zeroed, and weight decay shrinks every row. Prior images are made by the pretrained model
    or the user's own, not retrieved.
    """

    Config = CustomDiffusionConfig
    requires = ("prior",)
    output_scope: ClassVar[Literal["task", "seen"]] = "task"

    def __init__(self, config: CustomDiffusionConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        if config.prior_weight > 0:
            cast(PriorDomain, domain).use_prior(config.prior_weight)
        super().__init__(config, domain, n_tasks, seed)
