"""Our input: batches of the same folder, decoded into the disk cache (`setup["cache"]`) before any is timed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualcl.datasets.reading.folders import class_folders, folder_set, image_files
from dualcl.datasets.reading.kept import KeptImages
from dualcl.datasets.reading.loader import ImageLoader
from dualcl.datasets.reading.views import View

VERSIONS: dict[str, str] = {}


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], float]]:
    """Works: an epoch of training batches, one of evaluation batches, and the mean size of evaluation values."""
    os.environ["DUALCL_CACHE"] = setup["cache"]
    root = Path(setup["root"])
    labelled = [(f"{c}/{name}", k) for k, c in enumerate(class_folders(root)) for name in image_files(root / c)]
    images = folder_set(root, [name for name, _ in labelled], np.array([label for _, label in labelled]))
    view = View(
        setup["size"],
        resize=setup["resize"],
        interpolation=setup["interpolation"],
        mean=tuple(setup["mean"]),
        std=tuple(setup["std"]),
        augment="crop_flip",
        cache_size=setup["cache_size"],
    )
    kept = KeptImages(images, view, gib=setup["gib"], workers=setup["workers"])
    # no set is kept in memory: the disk cache is what is measured
    loader = ImageLoader(images, view, workers=setup["workers"], cache_mib=0, kept=kept)
    epochs = count()

    def train() -> float:
        epoch, batch = next(epochs), setup["batch"]
        start = epoch * loader.steps_per_epoch(batch)
        batches = loader.train_batches(seed=0, task=0, epochs=epoch + 1, batch_size=batch, start_step=start)
        return sum(len(b.images) for b in batches)

    def evaluation() -> float:
        return sum(len(b.images) for b in loader.eval_batches(setup["batch"]))

    def magnitude() -> float:
        values = torch.cat([b.images for b in loader.eval_batches(setup["batch"])])
        return float(values.abs().mean(dtype=torch.float64))

    return {"train": train, "evaluation": evaluation, "magnitude": magnitude}
