"""torchvision's usual input: ImageFolder, its transforms, and a DataLoader with worker processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

with contextlib.suppress(ImportError):  # torchvision's wheel beside a torch without CUDA
    import dualcl.benchmark.core.compat  # noqa: F401

# isort: split
import torchvision
from torchvision import datasets, transforms

VERSIONS = {"torchvision": torchvision.__version__}


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], float]]:
    """Works: an epoch of training batches, one of evaluation batches, and the mean size of evaluation values."""
    size, norm = setup["size"], transforms.Normalize(setup["mean"], setup["std"])
    mode = transforms.InterpolationMode(setup["interpolation"])
    train = [transforms.RandomResizedCrop(size, interpolation=mode), transforms.RandomHorizontalFlip()]
    test = [transforms.Resize(setup["resize"], interpolation=mode), transforms.CenterCrop(size)]

    def loader(views: list[Any], shuffle: bool) -> DataLoader[Any]:
        images = datasets.ImageFolder(setup["root"], transforms.Compose([*views, transforms.ToTensor(), norm]))
        # the workers stay between epochs: the quicker way to use it
        return DataLoader(
            images,
            setup["batch"],
            shuffle=shuffle,
            num_workers=setup["workers"],
            persistent_workers=setup["workers"] > 0,
        )

    loaders = {"train": loader(train, True), "evaluation": loader(test, False)}

    def epoch(name: str) -> Callable[[], float]:
        return lambda: sum(len(images) for images, _ in loaders[name])

    def magnitude() -> float:
        return _mean([images for images, _ in loaders["evaluation"]])

    return {"train": epoch("train"), "evaluation": epoch("evaluation"), "magnitude": magnitude}


def _mean(batches: list[torch.Tensor]) -> float:
    return float(torch.cat(batches).abs().mean(dtype=torch.float64))
