"""Decoded images that are kept on disk and read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import PIL
from PIL import Image, features

from dualcl.benchmark.core.machine import usable_cpus
from dualcl.datasets.base import ImageSet
from dualcl.datasets.reading.cache import GIB, Decoded, PixelStore, open_store
from dualcl.datasets.reading.views import View, evaluation_view, reduced

T = TypeVar("T")
R = TypeVar("R")
MAX_AUTO_WORKERS = 8


def in_threads(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`work` of each item, in order, from threads: Pillow gives up the GIL while it decodes and resizes.

    An error or an interrupt drops what has not begun, instead of finishing it first.
    """
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _evaluated(image: Image.Image, view: View) -> np.ndarray:
    """Pixels uint8 (S, S, 3) of the evaluation view."""
    return np.asarray(evaluation_view(image, view))


class KeptImages:
    """The decoded images of a whole set in the disk cache, for the loaders of its parts (`ImageLoader(kept=...)`).

    Evaluation views, and with `view.cache_size` what random crops are cut from, are two files; each is filled when it
    is first asked for. `gib` bounds all files of the cache together, 0 keeps nothing.
    """

    def __init__(self, images: ImageSet, view: View, *, gib: float, workers: int | Literal["auto"] = "auto") -> None:
        self.images = images
        self.view = view
        self.gib = gib
        self.workers = loader_workers(workers)
        self.rows = {name: row for row, name in enumerate(images.ids)}
        self._stores: dict[bool, PixelStore | None] = {}

    def store(self, crops: bool) -> PixelStore | None:
        """The evaluation views, or what crops are cut from; None where that is not kept."""
        if crops not in self._stores:
            view = self.view
            of = "crops" if crops else "views"
            self._stores[crops] = None
            if self.gib > 0 and (view.cache_size is not None or not crops) and len(self.rows) == len(self.images):
                key = {
                    "images": [self.images.fingerprint, list(self.images.ids)],
                    "of": [of, view.cache_size] if crops else [of, view.size, view.resize, view.interpolation],
                    "decoder": [PIL.__version__, features.version("jpg")],
                }
                decode = self._reduced if crops else self._viewed
                self._stores[crops] = open_store(
                    key, len(self.images), decode, limit=int(self.gib * GIB), workers=self.workers
                )
        return self._stores[crops]

    def _reduced(self, index: int) -> Decoded:
        return reduced(self.images.load(index), self.view)

    def _viewed(self, index: int) -> Decoded:
        image = self.images.load(index)
        return Decoded(_evaluated(image, self.view), image.size)

    def close(self) -> None:
        """Gives the files free; they are opened again when asked for."""
        for store in self._stores.values():
            if store is not None:
                store.close()
        self._stores.clear()


def loader_workers(asked: int | Literal["auto"]) -> int:
    """Processes or threads that make batches."""
    return min(usable_cpus(), MAX_AUTO_WORKERS) if asked == "auto" else asked
