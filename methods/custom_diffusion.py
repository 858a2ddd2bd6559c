"""Custom Diffusion in sequence: K and V of the cross-attention in full, beside images of the concept's class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain, PriorDomain
from dualcl.methods.base import check, check_quirks, register_method
from dualcl.methods.shared.whole_weights import FinetuneConfig, WholeWeights


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

    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of public codes, for parity only: hold_start_token"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "hold_start_token": "no gradient through the keys and values of a prompt's start token (the authors' code and "
        "diffusers' script)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.prior_weight >= 0, f"method.prior_weight must not be negative, got {self.prior_weight}")
        check_quirks(self.reference_quirks, self.QUIRKS)


def set_up(config: CustomDiffusionConfig, domain: Domain) -> None:
    """Asks the domain for prior images and puts the quirks in force; before anything is trained."""
    if config.prior_weight > 0:
        cast(PriorDomain, domain).use_prior(config.prior_weight)
    if "hold_start_token" in config.reference_quirks:
        for site in domain.sites().values():
            site.module.register_forward_hook(_hold_start_token)


def _hold_start_token(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """Keys or values (B, L, d_out) of which the first of the L tokens lets no gradient through."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)


@register_method(
    "custom_diffusion",
    domains=("customization",),
    summary="Custom Diffusion in sequence: K and V of the cross-attention in full, with prior preservation",
    source="arXiv 2212.04488",
)
class CustomDiffusion(WholeWeights):
    """Trains the domain's full parameters, one task after another, with the prior-preservation loss.

    Differs from the public script (tests/reference measures by how much): the token rows are a parameter of their own.
    There the whole token table is in AdamW with its gradients zeroed, and weight decay shrinks every row. Its error of
    the concept's images is summed over the latent channels and leaves out a border of one latent, that of the prior
    images is averaged, so its prior weight of 1 is 1/4 here. It holds the start token (`reference_quirks`), clips
    gradients (`train.grad_clip`) and resizes images at random. Prior images are made by the pretrained model or the
    user's own, not retrieved. Prompts leave the class noun out unless `concept.class_noun`, as C-LoRA's do for all
    methods; by the noun, prior images would hold the concept's own prompt too.
    """

    Config = CustomDiffusionConfig
    requires = ("prior",)

    def __init__(self, config: CustomDiffusionConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        set_up(config, domain)
