"""Ridge regression on features that come task by task: sums of products, solved when a task has ended."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.errors import UserError
from dualcl.methods.shared.symmetric import blocks, cholesky, double, packed_size, unpack

#: ridges to choose among (RanPAC's)
STRENGTHS = tuple(10.0**e for e in range(-8, 9))


class Ridge(nn.Module):
    """G = sum h h' and Q = sum h y' over all tasks so far, in any order (arXiv 2307.02251).

    Buffers of full size from the start, float32: the upper triangle of G, packed, and Q (width, classes).
    """

    gram: Tensor
    cross: Tensor

    def __init__(self, width: int, classes: int, device: torch.device) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("gram", torch.zeros(packed_size(width), device=device))
        self.register_buffer("cross", torch.zeros(width, classes, device=device))

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Adds features (B, width) float32 of samples with the right outputs (B,)."""
        for rows, mask, at in blocks(self.width, features.device):
            self.gram[at] += (features[:, rows].T @ features[:, rows.start :])[mask]
        self.cross += features.T @ F.one_hot(labels, self.cross.shape[1]).to(features.dtype)

    @torch.no_grad()
    def solve(self, strength: float) -> Tensor:
        """(G + strength I)^-1 Q, (width, classes) float32, solved in float64; UserError where that cannot be solved."""
        gram = unpack(double(self.gram), self.width)
        gram.diagonal().add_(strength)
        why = f"the features' Gram matrix cannot be solved with a ridge of {strength:g}; raise it"
        return torch.cholesky_solve(double(self.cross), cholesky(gram, why)).to(self.cross)

    def solve_from(self, strength: float) -> tuple[Tensor, float]:
        """`solve` with the least ridge that can be solved of `strength` and ten, a hundred, ... times that; and it."""
        while True:
            try:
                return self.solve(strength), strength
            except UserError:
                if strength > STRENGTHS[-1]:
                    raise
                strength *= 10


def held_out(labels: Tensor, generator: torch.Generator, share: float = 0.2) -> Tensor:
    """(B,) bool: a `share` of each class's samples, at least one of a class that has two."""
    out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        (own,) = torch.nonzero(labels.cpu() == label, as_tuple=True)
        n = max(int(share * len(own)), int(len(own) > 1))
        out[own[torch.randperm(len(own), generator=generator)[:n]]] = True
    return out.to(labels.device)


@torch.no_grad()
def ridge_errors(fitted: Sequence[Tensor], rest: Sequence[Tensor], strengths: Sequence[float] = STRENGTHS) -> Tensor:
    """Mean squared error on `rest` of the solution from `fitted` for each ridge, float64; each (features, wanted).

    One eigendecomposition for all ridges: of the smaller of h h' summed (width, width) and of products of samples.
    """
    (h, y), (g, z) = ([double(t) for t in pair] for pair in (fitted, rest))
    if len(h) < h.shape[1]:  # w = H' (H H' + lambda I)^-1 Y
        square, left, right = h @ h.T, g @ h.T, y
    else:  # w = (H' H + lambda I)^-1 H' Y
        square, left, right = h.T @ h, g, h.T @ y
    values, vectors = torch.linalg.eigh(square)
    left, right = left @ vectors, vectors.T @ right
    solved = [left @ (right / (values.clamp_min(0) + s).unsqueeze(1)) for s in strengths]
    return torch.stack([(said - z).square().mean() for said in solved])


def choose_strength(features: Tensor, labels: Tensor, outputs: range, held: Tensor) -> float:
    """Of STRENGTHS the one whose solution from the samples that are not `held` errs least on those that are."""
    if not bool(held.any()) or bool(held.all()):
        raise UserError("too few training images to choose a ridge with; give method.lambda_")
    wanted = F.one_hot(labels - outputs.start, len(outputs))
    fitted, rest = ((features[rows], wanted[rows]) for rows in (~held, held))
    return STRENGTHS[int(ridge_errors(fitted, rest).argmin())]
