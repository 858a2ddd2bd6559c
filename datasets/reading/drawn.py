"""An image set of drawings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dualcl.datasets.base import ArrayImages, ImageSet


def drawn_set(
    names: Sequence[str], part: str, count: int, prefix: str, draw: Callable[[str], NDArray[np.uint8]]
) -> ImageSet:
    """`count` drawings of each class, `draw(name)` being (count, S, S, 3).

    The ids are PREFIX/NAME/PART/NUMBER, where `prefix` tells all else that the pixels depend on; the fingerprint is the
    sha256 of the pixels.
    """
    images = np.concatenate([draw(name) for name in names])
    images.setflags(write=False)
    return ImageSet(
        ids=tuple(f"{prefix}/{name}/{part}/{i}" for name in names for i in range(count)),
        labels=np.repeat(np.arange(len(names), dtype=np.int64), count),
        load=ArrayImages(images),
        fingerprint=hashlib.sha256(images.tobytes()).hexdigest(),
    )
