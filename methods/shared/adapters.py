"""Bottlenecks beside a ViT's MLPs, as AdaptFormer (arXiv 2205.13535): 0.1 (ReLU(x D' + d) U' + u), one to a block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 0.1


class Bottleneck(nn.Module):
    """One side module; D (rank, width) is Kaiming-uniform and the rest 0, so a fresh one adds nothing."""

    def __init__(self, width: int, rank: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        down = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)  # on the CPU, for any device
        self.down, self.down_bias = nn.Parameter(down.to(device)), nn.Parameter(torch.zeros(rank, device=device))
        self.up = nn.Parameter(torch.zeros(width, rank, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> the same."""
        return SCALE * F.linear(torch.relu(F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)


def bottlenecks(
    blocks: int, width: int, rank: int, generator: torch.Generator, device: torch.device
) -> list[Bottleneck]:
    """One to a block."""
    return [Bottleneck(width, rank, generator, device) for _ in range(blocks)]


class CosineRows(nn.Module):
    """Rows whose scores are s cos(f, w) with a learnt s, 1 at first; what first tasks are learnt with."""

    def __init__(self, classes: int, width: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        drawn = torch.empty(classes, width).uniform_(-bound, bound, generator=generator)
        self.rows, self.scale = nn.Parameter(drawn.to(device)), nn.Parameter(torch.ones((), device=device))

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, classes)."""
        return self.scale * (F.normalize(features, dim=1) @ F.normalize(self.rows, dim=1).T)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(features), labels)
