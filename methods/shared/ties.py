"""TIES: several updates of one weight made one (arXiv 2306.01708)."""

from __future__ import annotations

import torch
from torch import Tensor


def ties(updates: Tensor, density: float, zero_follows: bool = False) -> Tensor:
    """The merge of updates (N, ...): trimmed to the top `density` share each, signs elected, those that agree averaged.

    An entry whose sum is 0 elects no sign and stays 0. `zero_follows`: it takes the sign of the sum of all elected
    signs, 0 counting as minus, as public code has it.
    """
    flat = updates.flatten(1)
    kept = max(1, round(density * flat.shape[1]))
    largest = flat.abs().topk(kept, dim=1).indices
    trimmed = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest))
    sign = trimmed.sum(0).sign()
    if zero_follows:
        sign = torch.where(sign == 0, 1.0 if bool(sign.sum() > 0) else -1.0, sign)
    agree = (trimmed * sign > 0).to(flat)
    return ((trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)).view(updates.shape[1:])
