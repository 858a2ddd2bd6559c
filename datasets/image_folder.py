"""A user's own images: one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import read_json
from dualcl.datasets.base import ClassData, register_dataset
from dualcl.datasets.reading.folders import (
    SUFFIXES,
    OnBadImage,
    bad_images,
    check_on_bad_image,
    class_folders,
    folder_set,
    image_files,
)
from dualcl.datasets.reading.split import SelectConfig, hash_split, percent, select


@register_dataset("image-folder", domain="classification", summary="your images, one folder per class (data.root=DIR)")
class ImageFolder:
    """A tree `train/<class>/*` with `val/<class>/*` or `test/<class>/*`, or one tree `<class>/*` that is split here.

    With both, the test set is test/. `class_names.json` at the root ({folder: name}) gives readable names.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config(SelectConfig):
        """Keys below `data.`."""

        root: str = field(default="", metadata={"help": "the folder with train/ and val/, or with the class folders"})
        val_fraction: float = field(default=0.2, metadata={"help": "test part of each class when there is no val/"})
        split_seed: int = field(default=0, metadata={"help": "which split by hash, when there is no val/"})
        on_bad_image: OnBadImage = field(default="stop", metadata={"help": "a file that cannot be read: stop or skip"})
        verify: bool = field(default=True, metadata={"help": "decode every image before training"})

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.val_fraction < 1:
                raise UserError(f"data.val_fraction must be between 0 and 1, got {self.val_fraction}")
            check_on_bad_image(self.on_bad_image)

    @classmethod
    def load(cls, config: Config) -> ClassData:
        """Finds, verifies and splits the images; UserError names the folder or file that is wrong."""
        if not config.root:
            raise UserError("data.root is not set; give the folder with your images: --set data.root=DIR")
        root = Path(config.root).expanduser()
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise UserError(f"data.root={root} {what}; give the folder with your images")
        train_part, test_part = _parts(root)
        folders = class_folders(root / train_part)
        if not folders:
            raise UserError(f"{root / train_part} has no class folders; put the images of each class in a folder there")
        names, labels = _scan(root, train_part, folders)
        parts = [(names, labels)]
        if test_part is not None:
            _same_classes(root, train_part, test_part, folders)
            parts.append(_scan(root, test_part, folders))
        bad: dict[str, str] = {}
        if config.verify:
            bad = bad_images(root, [name for part, _ in parts for name in part], config.on_bad_image)
            parts = [_without(root, part, part_labels, bad, folders) for part, part_labels in parts]
        train = folder_set(root, *parts[0])
        if test_part is not None:
            test = folder_set(root, *parts[1])
            split_name = f"folder:{train_part}/{test_part}"
        else:
            # the hash is of <class>/<file>, so that it is the same with and without train/ above
            inner = [Path(name).relative_to(train_part).as_posix() for name in train.ids]
            apart = hash_split(inner, train.labels, folders, config.val_fraction, "val", config.split_seed)
            train, test = train.subset(np.flatnonzero(~apart)), train.subset(np.flatnonzero(apart))
            split_name = f"folder:hash-{percent(config.val_fraction)}-seed{config.split_seed}"
        return select(cls.name, _readable(root, folders), train, test, split_name, config, sorted(bad))


def _parts(root: Path) -> tuple[str, str | None]:
    """(training folder, test folder) below `root`; no test folder: to be split."""
    tests = [part for part in ("test", "val") if (root / part).is_dir()]
    # a train/ that holds images only, beside other folders, is the class "train" (bus, car, train)
    if (root / "train").is_dir() and (tests or class_folders(root / "train")):
        for part in tests:
            # a test/ without class folders is a competition's unlabelled one
            if class_folders(root / part):
                return "train", part
        if tests:
            raise UserError(f"{root / tests[0]} has no class folders; put the images of each class in a folder there")
        return "train", None
    return ".", None


def _scan(root: Path, part: str, folders: Sequence[str]) -> tuple[list[str], list[int]]:
    names: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = image_files(root / part / folder)
        if not files:
            raise UserError(f"the class folder {root / part / folder} has no images ({', '.join(sorted(SUFFIXES))})")
        names += [(Path(part) / folder / file).as_posix() for file in files]
        labels += [label] * len(files)
    return names, labels


def _same_classes(root: Path, train_part: str, test_part: str, folders: Sequence[str]) -> None:
    tested = class_folders(root / test_part)
    for here, there, other in ((tested, folders, train_part), (folders, tested, test_part)):
        for folder in sorted(set(here) - set(there)):
            given = root / (test_part if other == train_part else train_part) / folder
            raise UserError(f"{given} has no counterpart {root / other / folder}; every class needs both")


def _without(
    root: Path, names: Sequence[str], labels: Sequence[int], bad: dict[str, str], folders: Sequence[str]
) -> tuple[list[str], list[int]]:
    kept = [(name, label) for name, label in zip(names, labels, strict=True) if name not in bad]
    left = {label for _, label in kept}
    for name, label in zip(names, labels, strict=True):
        if label not in left:
            raise UserError(f"no image in the class folder {(root / name).parent} can be read; replace them")
    return [name for name, _ in kept], [label for _, label in kept]


def _readable(root: Path, folders: Sequence[str]) -> list[str]:
    path = root / "class_names.json"
    if not path.exists():
        return list(folders)
    try:
        given = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); it must be a JSON object such as {{folder: name}}") from error
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
        raise UserError(
            f'{path} must be a JSON object of folder names and class names, such as {{"n01443537": "goldfish"}}'
        )
    return [given.get(folder, folder) for folder in folders]
