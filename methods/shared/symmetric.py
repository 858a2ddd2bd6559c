"""Symmetric matrices as they are kept: the upper triangle, row by row, d (d + 1) / 2 numbers; and their factors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dualcl.benchmark.core.errors import UserError

#: rows at a time, so that no index of a whole matrix is made
BLOCK = 2048


def packed_size(d: int) -> int:
    """Numbers that a symmetric (d, d) matrix has of its own."""
    return d * (d + 1) // 2


def blocks(d: int, device: torch.device) -> Iterator[tuple[slice, Tensor, slice]]:
    """(rows, which entries (n, d - rows.start) from that column on are kept, where they are when packed) in turn."""
    for start in range(0, d, BLOCK):
        stop, width = min(start + BLOCK, d), d - start
        before = packed_size(d) - packed_size(width)
        mask = torch.ones(stop - start, width, dtype=torch.bool, device=device).triu()
        yield slice(start, stop), mask, slice(before, before + packed_size(width) - packed_size(d - stop))


def pack(matrix: Tensor) -> Tensor:
    """(..., d, d) -> (..., d (d + 1) / 2)."""
    d = matrix.shape[-1]
    return torch.cat([matrix[..., rows, rows.start :][..., mask] for rows, mask, _ in blocks(d, matrix.device)], -1)


def unpack(packed: Tensor, d: int) -> Tensor:
    """(..., d (d + 1) / 2) -> (..., d, d)."""
    out = packed.new_zeros(*packed.shape[:-1], d, d)
    for rows, mask, at in blocks(d, packed.device):
        part = packed.new_zeros(*packed.shape[:-1], *mask.shape)
        part[..., mask] = packed[..., at]
        n = len(mask)
        out[..., rows, rows.start :] = part
        out[..., rows, rows] += part[..., :n].triu(1).mT
        out[..., rows.stop :, rows] = part[..., n:].mT
    return out


def double(values: Tensor) -> Tensor:
    """float64 on a device that has it."""
    return values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)


def cholesky(matrix: Tensor, otherwise: str) -> Tensor:
    """Lower factor of a symmetric positive definite matrix; UserError with `otherwise` where it is not that."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise UserError(otherwise)
    return factor
