"""Torch generators as a function of keys."""

from __future__ import annotations

import torch

from dualcl.benchmark.core.seeding import derive_seed


def torch_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU torch generator for this key."""
    return torch.Generator().manual_seed(derive_seed(seed, *key))
