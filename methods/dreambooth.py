"""DreamBooth in sequence: the whole network is trained, beside images of the concept's class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from dualcl.benchmark.core.domain import Domain, NetworkDomain, PriorDomain
from dualcl.benchmark.core.errors import UserError
from dualcl.methods.base import Method, MethodConfig, ParamGroup, check, register_method


@dataclass(frozen=True)
class DreamBoothConfig(MethodConfig):
    """Hyper-parameters of DreamBooth."""

    lr: float = field(default=5e-6, metadata={"help": "learning rate of the network"})
    head_lr: float = field(default=5e-4, metadata={"help": "learning rate of the token rows"})
    prior_weight: float = field(
        default=1.0, metadata={"help": "weight of the loss on prior images, made by the pretrained model; 0: none"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.prior_weight >= 0, f"method.prior_weight must not be negative, got {self.prior_weight}")


@register_method(
    "dreambooth",
    domains=("customization",),
    summary="the whole network, one task after another, with prior preservation",
    source="arXiv 2208.12242",
)
class DreamBooth(Method):
    """Trains all weights of the network with the prior-preservation loss.

    Differs from the paper: the text encoder stays frozen; the concept's word is not a rare one but the domain's new
    token rows, which are learnt. Prompts leave the class noun out unless `concept.class_noun`, as C-LoRA's do for all
    methods; in the paper prior images hold what the concept's own prompt says of its class by that noun.
    """

    Config = DreamBoothConfig
    requires = ("network", "prior")

    def __init__(self, config: DreamBoothConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        weights = cast(NetworkDomain, domain).network_parameters()
        coarse = [n for n, w in weights.items() if torch.finfo(w.dtype).bits < 32]
        if coarse:
            raise UserError(
                f"{self.name} trains the whole network, whose {coarse[0]} is {weights[coarse[0]].dtype}: small steps "
                "would be rounded away; load the weights as fp32 and set precision=bf16 instead"
            )
        if config.prior_weight > 0:
            cast(PriorDomain, domain).use_prior(config.prior_weight)
        # the same Parameter objects as the model's: saving and restoring the method restores the model
        self.weights = nn.ParameterList(weights.values())
        self.weights.requires_grad_(True)

    def trained(self) -> list[ParamGroup]:
        """All weights of the network."""
        return [ParamGroup("weights", list(self.weights), self.config.lr, self.config.weight_decay)]
