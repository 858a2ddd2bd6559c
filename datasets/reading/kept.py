"""The decoded images of a whole data set, kept in the disk cache for the loaders of its parts."""

from __future__ import annotations

from typing import Literal

import numpy as np
import PIL
from PIL import features

from dualcl.datasets.base import ImageSet
from dualcl.datasets.reading.cache import GIB, PixelStore, open_store
from dualcl.datasets.reading.threads import loader_workers
from dualcl.datasets.reading.views import Decoded, View, evaluation_view, reduced


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
        return Decoded(np.asarray(evaluation_view(image, self.view)), image.size)

    def close(self) -> None:
        """Gives the files free; they are opened again when asked for."""
        for store in self._stores.values():
            if store is not None:
                store.close()
        self._stores.clear()
