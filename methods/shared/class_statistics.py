"""Statistics of a class's features, in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def class_means(features: Iterable[tuple[Tensor, Tensor]], outputs: range, width: int) -> tuple[Tensor, Tensor]:
    """Means (n, width) float64 and numbers of images (n,) int64 of the classes `outputs`, on the CPU.

    `features`: batches of (features (B, width), output indices (B,)). The mean of a class without images is NaN.
    """
    sums = torch.zeros(len(outputs), width, dtype=torch.float64)
    counts = torch.zeros(len(outputs), dtype=torch.float64)
    for batch, labels in features:
        rows = labels.cpu() - outputs.start
        sums.index_add_(0, rows, batch.detach().to("cpu", torch.float64))
        counts += torch.bincount(rows, minlength=len(outputs))
    return sums / counts.unsqueeze(1), counts.to(torch.int64)
