"""Less memory for the backward through a frozen U-Net: what is cheap to compute again, or unused, is not kept.

A frozen convolution needs no input for its backward, yet autograd keeps it; the results of a norm, SiLU or gate cost
little beside the matrix products around them. Values and gradients stay what they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D

#: bytes of an input from which on leaving things out pays: below it the calls cost more than the memory is worth
LARGE = 2**19


def _pays(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled() and x.nbytes >= LARGE


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`; its intermediate results are computed again in the backward. It must draw no random numbers."""
    if not _pays(x):
        return function(x)
    result: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    return result


class LeanConv2d(nn.Conv2d):
    """A convolution that keeps its input for the backward only while its weight is trained."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C', H', W')."""
        if self.weight.requires_grad or not _pays(x):
            return super().forward(x)
        inputs = [x.shape]

        def keep(saved: Tensor) -> Any:
            # the input comes before the weight, which may have its shape
            if inputs and saved.shape == inputs[0]:
                return inputs.pop(), saved.dtype, saved.device
            return saved

        with saved_tensors_hooks(keep, _given_back):
            return super().forward(x)


def _given_back(kept: Any) -> Tensor:
    """What a `LeanConv2d` kept; in place of its input something of that shape, which takes no memory."""
    if isinstance(kept, Tensor):
        return kept
    shape, dtype, device = kept
    return torch.zeros(1, dtype=dtype, device=device).expand(shape)


class NormSilu(nn.GroupNorm):
    """SiLU of a group norm, of which only the input is kept."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same shape."""
        norm = super().forward
        return recomputed(lambda x: nn.functional.silu(norm(x)), x)


class TimeSilu(nn.SiLU):
    """SiLU of a time embedding (B, C); images (B, C, H, W) come from a `NormSilu` and pass."""

    def forward(self, x: Tensor) -> Tensor:
        """x of 2 or 4 dimensions -> the same shape."""
        return super().forward(x) if x.dim() == 2 else x


class LeanGEGLU(GEGLU):
    """A gated linear unit of which only the projection is kept."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states (..., d) -> (..., d')."""
        return recomputed(self._gated, self.proj(hidden_states))

    def _gated(self, projected: Tensor) -> Tensor:
        values, gate = projected.chunk(2, dim=-1)
        return values * self.gelu(gate)


def make_lean(unet: nn.Module) -> None:
    """Turns the convolutions, residual blocks and gates of a U-Net into lean ones; parameters keep their names."""
    for module in unet.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = LeanConv2d
        elif type(module) is GEGLU:
            module.__class__ = LeanGEGLU
        elif isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default":
            norms = (module.norm1, module.norm2)
            if type(module.nonlinearity) is nn.SiLU and all(type(n) is nn.GroupNorm for n in norms):
                module.nonlinearity = TimeSilu().train(module.training)
                for norm in norms:
                    norm.__class__ = NormSilu
