"""Randomness as a function of (seed, task, epoch or step, sample), so that a resumed run repeats bit for bit."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed that depends on `seed` and every part of `key`, stable across platforms and Python versions."""
    text = "/".join([str(int(seed)), *(str(k) for k in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_generator(seed: int, *key: int | str) -> np.random.Generator:
    """A NumPy generator for this key."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, *key)))
