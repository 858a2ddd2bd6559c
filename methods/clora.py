"""C-LoRA: continually self-regularised low-rank adaptation. One file for both domains.

Source: Smith et al., "Continual Diffusion: Continual Customization of Text-to-Image Diffusion with C-LoRA",
arXiv 2304.06027 (TMLR 2024). The authors published no code; this is an independent implementation from the equations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualcl.methods.base import check, register_method
from dualcl.methods.lora import LoRA, LoRAConfig


class _SelfRegularisation(torch.autograd.Function):
    """|| |S| (.) (A B) ||_F^2 with r-sized gradients computed in the forward: no (d_out, d_in) tensor is kept."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, S: Tensor) -> Tensor:
        charged = S * (A @ B)
        gradient = 2 * S * charged
        ctx.save_for_backward(gradient @ B.T, A.T @ gradient)
        return charged.square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_a, grad_b = ctx.saved_tensors
        return grads[0] * grad_a, grads[0] * grad_b, None


def self_regularisation(A: Tensor, B: Tensor, S: Tensor) -> Tensor:
    """L_forget of one site, a scalar (arXiv 2304.06027, eq. 3).

    A (d_out, r), B (r, d_in): the current task's factors; S (d_out, d_in): the sum of the earlier tasks' updates.
    Charges the new update for touching entries that earlier updates moved.
    """
    value: Tensor = _SelfRegularisation.apply(A, B, S)
    return value


@dataclass(frozen=True)
class CLoRAConfig(LoRAConfig):
    """Hyper-parameters of C-LoRA."""

    lambda_: float = field(
        default=1e5,
        metadata={"help": "lambda, weight of L_forget; orders of magnitude differ between domains: sweep it"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.lambda_ >= 0, f"method.lambda_ must not be negative, got {self.lambda_}")


@register_method(
    "clora",
    domains=("classification", "customization"),
    summary="C-LoRA: low-rank updates that avoid the entries earlier updates moved",
    source="arXiv 2304.06027",
)
class CLoRA(LoRA):
    """LoRA in sequence plus lambda * L_forget (eq. 1), summed over all sites; 0 for the first task."""

    Config = CLoRAConfig

    def penalty(self) -> Tensor | None:
        """lambda * sum over sites of || |S_{t-1}| (.) (A_t B_t) ||_F^2, once per optimiser step."""
        if self.finished == 0 or self.config.lambda_ == 0 or self.config.one_adapter:
            return None
        terms = [self_regularisation(u.A, u.B, u.summed) for u in self.updates.values()]
        return float(self.config.lambda_) * torch.stack(terms).sum()

    def caveats(self) -> list[str]:
        """That there is no penalty where there is nothing to avoid."""
        idle = self.config.one_adapter and self.config.lambda_ > 0
        own = ["one pair of factors: there is no penalty, lambda has no effect"] if idle else []
        return [*own, *super().caveats()]
