"""CIFAR-100 (Krizhevsky, 2009)."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import dualcl.benchmark.core.compat  # noqa: F401 - before torchvision

# isort: split

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets.base import ArrayImages, ClassData, ImageSet, register_dataset
from dualcl.datasets.reading.download import Checksum, download
from dualcl.datasets.reading.split import SelectConfig, select
from dualcl.datasets.reading.unpack import extract_tar

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE = Checksum("md5", "eb9058c3a382ffc7106e4002c42a8d85")
FOLDER = "cifar-100-python"
#: of the files in it
MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


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

        They are Python pickles: they are read only if their md5 is the official one, and even then nothing but arrays.
        """
        root = Path(config.root).expanduser()
        if not (root / FOLDER).is_dir():
            raise UserError(f"CIFAR-100 is not at {root / FOLDER}; run: dualcl prepare cifar100-10 --root {root}")
        train, test = (_images(root, part) for part in ("train", "test"))
        names = list(_read(root, "meta")["fine_label_names"])
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


class _Arrays(pickle.Unpickler):
    """Reads plain containers and numpy arrays, and refuses everything else that a pickle may ask for."""

    ALLOWED: ClassVar = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        # before and after numpy 2; in protocol 5
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        """What builds an array; UnpicklingError for any other name."""
        if (module_name, global_name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _read(root: Path, name: str) -> dict[str, Any]:
    """One of the official files; UserError when it is missing, another, or holds more than containers and arrays."""
    path, mend = root / FOLDER / name, f"remove it and run: dualcl prepare cifar100-10 --root {root}"
    try:
        if not Checksum("md5", MD5[name]).matches(path):
            raise pickle.UnpicklingError("it is not the official one")
        with path.open("rb") as file:
            content: dict[str, Any] = _Arrays(file, encoding="latin1").load()
    except (OSError, pickle.UnpicklingError) as error:
        raise UserError(f"the files in {root / FOLDER} are incomplete or damaged ({name}: {error}); {mend}") from error
    return content


def _images(root: Path, part: str) -> ImageSet:
    content = _read(root, part)
    pixels = np.asarray(content["data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ImageSet(
        ids=tuple(f"{part}/{i:05d}" for i in range(len(pixels))),
        labels=np.asarray(content["fine_labels"], dtype=np.int64),
        load=ArrayImages(pixels),
        fingerprint=MD5[part],
    )
