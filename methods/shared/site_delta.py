"""Dense updates of sites' weights that stay where they may: under a mask, and off given input directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: cosine of inputs from which on one of the two is left out
NEAR = 0.95
#: what an input must have beyond the directions so far, in shares of itself
NEW = 1e-3


def directions(inputs: Tensor, most: int) -> Tensor:
    """Q (d, r), orthonormal, float64: the span of the rows of `inputs` (n, d) in their order, `most` of them.

    Near copies of earlier rows, and combinations of them, are left out.
    """
    chosen: list[Tensor] = []
    units: list[Tensor] = []
    for row in inputs.double():
        unit = row / row.norm()
        if len(chosen) == most or any(float(unit @ other) > NEAR for other in units):
            continue
        left = unit
        for _ in range(2):  # once leaves the rounding of what is nearly parallel
            for q in chosen:
                left = left - q * (q @ left)
        if float(left.norm()) > NEW:
            units.append(unit)
            chosen.append(left / left.norm())
    return torch.stack(chosen, 1) if chosen else inputs.new_zeros(inputs.shape[1], 0, dtype=torch.float64)


def most_important(weights: Tensor, gradients: Tensor, share: float, one_more: bool = False) -> Tensor:
    """Which entries (n,) have the largest |weight * gradient|: a `share` of all, at least one."""
    score = (weights * gradients).abs()
    n = min(max(1, round(share * len(score))) + one_more, len(score))
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, score.topk(n).indices, True)


class SiteDelta(nn.Module):
    """A frozen Linear and an update of all its weights: y = (W + (Z (.) M) P) x, P = I - Q Q'.

    Whatever the optimiser does to Z, the update maps the directions Q to 0.
    """

    mask: Tensor | None
    held: Tensor | None

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.Z = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32), requires_grad=False)
        # M and Q, made anew in each task
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("held", None, persistent=False)
        #: False: the update is left out
        self.active = False
        #: as public code: gradients alone are projected; nothing is learnt through the start token
        self.gradients_alone = self.holds_start = False

    @torch.no_grad()
    def start(self) -> None:
        """An update of zeros, without mask or directions."""
        self.Z.zero_()
        self.Z.requires_grad_(True)
        self.mask, self.held, self.active = None, None, True

    def update(self) -> Tensor:
        """(Z (.) M) P (d_out, d_in), float32, with gradient."""
        with torch.autocast(self.Z.device.type, enabled=False):
            free = self.Z if self.mask is None else self.Z * self.mask
            if self.held is None:
                return free
            projected = free - (free @ self.held) @ self.held.T
            return projected + (free - projected).detach() if self.gradients_alone else projected

    def forward(self, x: Tensor) -> Tensor:
        """x (..., L, d_in) -> (..., L, d_out)."""
        y: Tensor = self.base(x)
        if not self.active:
            return y
        update = self.update()
        moved = F.linear(x, update)
        if self.holds_start:
            moved = torch.cat([F.linear(x[..., :1, :], update.detach()), moved[..., 1:, :]], -2)
        return y + moved

    @torch.no_grad()
    def fold(self) -> Tensor:
        """Adds the update to the weight and clears it; returns it."""
        update = self.update().clone()
        self.base.weight.add_(update)
        self.Z.zero_()
        self.Z.requires_grad_(False)
        self.mask, self.held, self.active = None, None, False
        return update
