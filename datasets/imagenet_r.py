"""ImageNet-R (Hendrycks et al., 2021): 30,000 renditions of 200 ImageNet classes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import yaml

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.datasets.base import ClassData, register_dataset
from dualcl.datasets.reading.download import Checksum, download
from dualcl.datasets.reading.folders import class_folders, folder_set, image_files
from dualcl.datasets.reading.split import SelectConfig, hash_split, select
from dualcl.datasets.reading.unpack import extract_tar

URL = "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"
ARCHIVE = Checksum("md5", "a61312130a589d0ca1a8fca1f2bd3337")
#: CODA-Prompt's lists (Smith et al., 2023), at a fixed commit
LISTS_URL = (
    "https://raw.githubusercontent.com/GT-RIPL/CODA-Prompt/6417d4f68754be68b697c7ca2323ee61e791e1a3/dataloaders/splits"
)
LISTS = {
    "imagenet-r_train.yaml": Checksum("sha256", "6bcaa14ca9359915ac3a44c48ae71388146385686eb15da79a37844421a0b845"),
    "imagenet-r_test.yaml": Checksum("sha256", "57275ac242d68983a4f39ccb81ec34f48b1bd920b9cd79e6e8040d7c042db02a"),
}
N_CLASSES = 200
HASH_TEST_FRACTION = 0.2
PREPARE = "run: dualcl prepare imagenet-r-10"
Split = Literal["coda", "hash"]


@register_dataset(
    "imagenet-r",
    domain="classification",
    summary="ImageNet-R: 200 classes, 24,000 + 6,000 images (CODA-Prompt's lists, or a split by hash)",
    needs_prepare=True,
)
class ImageNetR:
    """The official images, which come without a split.

    Natural class order: that of CODA-Prompt's targets for "coda" (not alphabetical), WordNet ids sorted for "hash".
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config(SelectConfig):
        """Keys below `data.`."""

        root: str = field(
            default="data/imagenet-r", metadata={"help": "the folder with the 200 class folders", "volatile": True}
        )
        split: Split = field(default="coda", metadata={"help": "coda: CODA-Prompt's lists; hash: 80/20 of each class"})

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.split not in get_args(Split):
                raise UserError(f"unknown data.split {self.split!r}; {nearest(str(self.split), get_args(Split))}")

    @classmethod
    def load(cls, config: Config) -> ClassData:
        """Finds the images and splits them; UserError when folders, images or lists are missing or altered."""
        root = Path(config.root).expanduser()
        folders = _folders(root)
        if len(folders) != N_CLASSES:
            raise UserError(
                f"data.root={root} has {len(folders)} of {N_CLASSES} class folders; {PREPARE} --root {root}"
            )
        present = [f"{folder}/{file}" for folder in folders for file in image_files(root / folder)]
        if config.split == "coda":
            parts = [_read_list(root, name, checksum, set(present)) for name, checksum in LISTS.items()]
            pairs = [pair for part in parts for pair in zip(*part, strict=True)]
            folder_of = {label: name.split("/")[0] for name, label in pairs}
            classes = [folder_of[label] for label in sorted(folder_of)]
            train, test = (folder_set(root, names, labels) for names, labels in parts)
        else:
            classes = folders
            position = {folder: i for i, folder in enumerate(folders)}
            images = folder_set(root, present, [position[name.split("/")[0]] for name in present])
            apart = hash_split(images.ids, images.labels, classes, HASH_TEST_FRACTION, "imagenet-r")
            train, test = images.subset(np.flatnonzero(~apart)), images.subset(np.flatnonzero(apart))
        return select(cls.name, _readable(root, classes), train, test, f"imagenet-r:{config.split}", config)

    @classmethod
    def prepare(cls, config: Config) -> None:
        """Downloads and unpacks the official archive (2.2 GB) and, for "coda", the two lists; all are checksummed."""
        root = Path(config.root).expanduser().resolve()
        if len(_folders(root)) != N_CLASSES:
            archive = download(URL, root.parent / "imagenet-r.tar", ARCHIVE)
            unpacked = root.with_name(root.name + ".unpacked")
            shutil.rmtree(unpacked, ignore_errors=True)
            extract_tar(archive, unpacked, max_bytes=8 * 2**30, max_files=100_000)
            root.mkdir(parents=True, exist_ok=True)
            for entry in sorted((unpacked / "imagenet-r").iterdir()):
                # a folder of an earlier, unfinished unpacking
                if (root / entry.name).is_dir():
                    shutil.rmtree(root / entry.name)
                entry.replace(root / entry.name)
            shutil.rmtree(unpacked)
        if config.split == "coda":
            for name, checksum in LISTS.items():
                download(f"{LISTS_URL}/{name}", root / name, checksum)
        cls.load(config)


def _folders(root: Path) -> list[str]:
    return [name for name in class_folders(root) if re.fullmatch(r"n\d{8}", name)] if root.is_dir() else []


def _read_list(root: Path, name: str, checksum: Checksum, present: set[str]) -> tuple[list[str], list[int]]:
    """(image below the root, class) of each line of one of CODA-Prompt's lists."""
    path = root / name
    if not path.is_file():
        raise UserError(f"the list {path} is missing; {PREPARE} --root {root}, or set data.split=hash")
    if not checksum.matches(path):
        raise UserError(
            f"{path} is not CODA-Prompt's list (wrong {checksum.algorithm}); remove it and {PREPARE} --root {root}"
        )
    # the C loader takes a second, the Python one ten; both are safe
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with path.open("rb") as file:
        content = yaml.load(file, Loader=loader)
    names = [entry.removeprefix("data/imagenet-r/") for entry in content["data"]]
    missing = [entry for entry in names if entry not in present]
    if missing:
        more = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0]
        raise UserError(f"data.root={root} lacks images that {name} lists ({more}); {PREPARE} --root {root}")
    return names, [int(target) for target in content["targets"]]


def _readable(root: Path, folders: Sequence[str]) -> list[str]:
    """English class names from the archive's README.txt (lines of WordNet id and name); the id where it has none."""
    readme = root / "README.txt"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    names = dict(re.findall(r"^(n\d{8})\s+(\S.*?)\s*$", text, flags=re.MULTILINE))
    return [names.get(folder, folder).replace("_", " ") for folder in folders]
