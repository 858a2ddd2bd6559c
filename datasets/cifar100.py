"""CIFAR-100 (Krizhevsky, 2009), through torchvision."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dualcl.benchmark.errors import UserError
from dualcl.datasets.base import ArrayImages, ClassData, ImageSet
from dualcl.datasets.download import Checksum, download, extract_tar
from dualcl.datasets.registry import register_dataset
from dualcl.datasets.split import SelectConfig, select

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE = Checksum("md5", "eb9058c3a382ffc7106e4002c42a8d85")
FOLDER = "cifar-100-python"


@register_dataset(
    "cifar100",
    domain="classification",
    summary="CIFAR-100: 100 classes, 50,000 + 10,000 images of 32 px",
    needs_prepare=True,
)
class Cifar100:
    """The official training and test images; classes in the order of the official label list (alphabetical)."""

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config(SelectConfig):
        """Keys below `data.`."""

        root: str = field(default="data", metadata={"help": f"the folder that holds {FOLDER}/", "volatile": True})

    @classmethod
    def load(cls, config: Config) -> ClassData:
        """Reads the official files; UserError when they are missing or damaged.

        They are Python pickles: torchvision unpickles them, after it has compared their md5 with the official ones.
        """
        root = Path(config.root).expanduser()
        if not (root / FOLDER).is_dir():
            raise UserError(f"CIFAR-100 is not at {root / FOLDER}; run: dualcl prepare cifar100-10 --root {root}")
        train, names = _official(root, train=True)
        test, _ = _official(root, train=False)
        return select(cls.name, names, train, test, "cifar100:official", config)

    @classmethod
    def prepare(cls, config: Config) -> None:
        """Downloads the official archive to `data.root`, checks its md5, unpacks it, and reads it once."""
        root = Path(config.root).expanduser()
        if not (root / FOLDER).is_dir():
            archive = download(URL, root / "cifar-100-python.tar.gz", ARCHIVE)
            unpacked = root / f"{FOLDER}.unpacked"
            shutil.rmtree(unpacked, ignore_errors=True)
            extract_tar(archive, unpacked, max_bytes=2**30, max_files=100)
            (unpacked / FOLDER).replace(root / FOLDER)
            unpacked.rmdir()
        cls.load(config)


def _official(root: Path, train: bool) -> tuple[ImageSet, list[str]]:
    import dualcl.benchmark.compat  # noqa: F401

    # isort: split
    from torchvision.datasets import CIFAR100

    try:
        official: Any = CIFAR100(str(root), train=train, download=False)
    except RuntimeError as error:  # missing, or not the official md5
        mend = f"remove it and run: dualcl prepare cifar100-10 --root {root}"
        raise UserError(f"the files in {root / FOLDER} are incomplete or damaged; {mend}") from error
    part = "train" if train else "test"
    files = official.train_list if train else official.test_list
    images = ImageSet(
        ids=tuple(f"{part}/{i:05d}" for i in range(len(official.data))),
        labels=np.asarray(official.targets, dtype=np.int64),
        load=ArrayImages(official.data),
        fingerprint=files[0][1],
    )
    return images, list(official.classes)
