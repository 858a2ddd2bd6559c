"""Ridge regression on features that come task by task: sums of products, solved when a task has ended."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.errors import UserError


class Ridge(nn.Module):
    """G = sum h h' and Q = sum h y' over all tasks so far, in any order (arXiv 2307.02251).

    Buffers of full size from the start, float32: the upper triangle of G, packed, and Q (width, classes).
    """

    gram: Tensor
    cross: Tensor

    def __init__(self, width: int, classes: int, device: torch.device) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("gram", torch.zeros(width * (width + 1) // 2, device=device))
        self.register_buffer("cross", torch.zeros(width, classes, device=device))

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Adds features (B, width) float32 of samples with the right outputs (B,)."""
        rows, columns = torch.triu_indices(self.width, self.width, device=self.gram.device)
        self.gram += (features.T @ features)[rows, columns]
        self.cross += features.T @ F.one_hot(labels, self.cross.shape[1]).to(features.dtype)

    @torch.no_grad()
    def solve(self, strength: float) -> Tensor:
        """(G + strength I)^-1 Q, (width, classes) float32; UserError where that cannot be solved."""
        gram = self.gram.new_zeros(self.width, self.width)
        rows, columns = torch.triu_indices(self.width, self.width, device=self.gram.device)
        gram[rows, columns] = self.gram
        gram[columns, rows] = self.gram
        gram.diagonal().add_(strength)
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info):
            raise UserError(f"the features' Gram matrix cannot be solved with a ridge of {strength:g}; raise it")
        return torch.cholesky_solve(self.cross, factor)
