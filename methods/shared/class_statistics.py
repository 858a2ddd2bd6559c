"""Statistics of classes' features: streaming in float64, kept as a mean and a covariance of each class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.errors import UserError
from dualcl.methods.shared.symmetric import cholesky, double, pack, packed_size, unpack


def cosine(features: Tensor, rows: Tensor) -> Tensor:
    """Cosine of each feature (..., B, d) with each row (..., C, d), shape (..., B, C), in the rows' precision."""
    return F.normalize(features.to(rows.dtype), dim=-1) @ F.normalize(rows, dim=-1).mT


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


class Moments:
    """Number, mean (d,) and scatter sum (x - mean)(x - mean)' (d, d) of vectors that come in parts, float64."""

    def __init__(self, vectors: Tensor) -> None:
        x = double(vectors.detach())
        self.count = len(x)
        self.mean = x.mean(0) if self.count else x.new_zeros(x.shape[1])
        self.scatter = (x - self.mean).T @ (x - self.mean)

    def merge(self, other: Moments) -> Moments:
        """Takes in another part's: S = S_a + S_b + (m_b - m_a)(m_b - m_a)' n_a n_b / n."""
        n = self.count + other.count
        if other.count:
            between = other.mean - self.mean
            self.scatter = self.scatter + other.scatter + torch.outer(between, between) * (self.count * other.count / n)
            self.mean = self.mean + between * (other.count / n)
            self.count = n
        return self

    def covariance(self) -> Tensor:
        """Unbiased, (d, d); 0 of a single vector."""
        return self.scatter / max(self.count - 1, 1)


def carrying_map(before: Moments, cross: Tensor, ridge: float) -> Tensor:
    """M (d, d) float64 of centred X'X = `before.scatter` and X'Y = `cross`: the identity where X shows nothing."""
    k = ridge * before.scatter.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(cross)).to(cross)
    factor = cholesky(before.scatter + k * eye, "the new task's features are no numbers; lower the learning rate")
    return torch.cholesky_solve(cross + k * eye, factor)


def carried(means: Tensor, before: Tensor, after: Tensor, ridge: float) -> Tensor:
    """Means (C, d) moved by the map that takes the features `before` (n, d) to those `after`, float64."""
    x, y = double(before), double(after)
    moments = Moments(x)
    by = carrying_map(moments, (x - moments.mean).T @ (y - y.mean(0)), ridge)
    return (double(means) - moments.mean) @ by + y.mean(0)


def class_moments(features: Iterable[tuple[Tensor, Tensor]], outputs: range) -> list[Moments]:
    """Of each class of `outputs`; UserError for a class without images. `features`: as for `class_means`."""
    found: dict[int, Moments] = {}
    for batch, labels in features:
        for label in labels.unique().tolist():
            part = Moments(batch[labels == label])
            found[label] = found[label].merge(part) if label in found else part
    missing = [c for c in outputs if c not in found]
    if missing:
        raise UserError(f"no training image for the outputs {missing}; add images or drop the classes")
    return [found[c] for c in outputs]


class ClassGaussians(nn.Module):
    """Mean and covariance of every class, float32, as they were when their task ended.

    Buffers of full size from the start: means (C, d), and the covariances' upper triangles, packed, unless they are not
    wanted.
    """

    means: Tensor
    covariances: Tensor

    def __init__(self, classes: int, width: int, *, covariances: bool = True) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("means", torch.zeros(classes, width))
        self.register_buffer("covariances", torch.zeros(classes if covariances else 0, packed_size(width)))

    def add(self, features: Iterable[tuple[Tensor, Tensor]], outputs: range) -> list[Moments]:
        """Keeps the statistics of a task's classes; gives what they were made of."""
        moments = class_moments(features, outputs)
        for output, part in zip(outputs, moments, strict=True):
            self.means[output].copy_(part.mean)
            if len(self.covariances):
                self.covariances[output].copy_(pack(part.covariance()))
        return moments

    def covariance(self, output: int) -> Tensor:
        """(d, d) float64."""
        return unpack(double(self.covariances[output]), self.width)

    def numbers(self, classes: int) -> int:
        """What is kept of so many classes."""
        return classes * (self.width + packed_size(self.width))


def draws(means: Tensor, factors: Tensor, n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`n` draws (n, d) of each N(mean, L L'); means (C, d), factors L (C, d, d). Drawn on the CPU, for any device."""
    for mean, factor in zip(means, factors, strict=True):
        noise = torch.randn(n, len(mean), generator=generator).to(mean)
        yield torch.addmm(mean, noise, factor.T)
