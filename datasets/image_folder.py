"""A user's own images: one folder per class."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import check_name, read_json
from dualcl.benchmark.core.text import composed
from dualcl.datasets.base import ClassData, register_dataset
from dualcl.datasets.reading.folders import (
    TEST_NAMES,
    TRAIN_NAMES,
    OnBadImage,
    bad_images,
    check_on_bad_image,
    class_folders,
    folder_notes,
    folder_set,
    image_files,
    loose_images,
    no_loose_images,
    read_folders,
)
from dualcl.datasets.reading.split import SelectConfig, hash_split, percent, select


@register_dataset("image-folder", domain="classification", summary="your images, one folder per class (data.root=DIR)")
class ImageFolder:
    """A tree `train/<class>/*` with `val/<class>/*` or `test/<class>/*`, or one tree `<class>/*` that is split here.

    Parts are found by their usual names in any case; of several test parts, the first of TEST_NAMES is used. Images in
    sub-folders are of their class. `class_names.json` at the root ({folder: name}, or {"0": name} by position) gives
    readable names.
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

        def names_alone(self) -> ImageFolder.Config:
            """No image is decoded; see `SelectConfig.names_alone`."""
            return replace(super().names_alone(), verify=False)

    @classmethod
    def load(cls, config: Config) -> ClassData:
        """Finds, verifies and splits the images; UserError names the folder or file that is wrong."""
        if not config.root:
            raise UserError("data.root is not set; give the folder with your images: --set data.root=DIR")
        root = Path(config.root).expanduser()
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise UserError(f"data.root={root} {what}; give the folder with your images")
        train_part, test_part, notes = _parts(root)
        folders = class_folders(root / train_part)
        if not folders:
            raise UserError(f"{root / train_part} has no class folders; put the images of each class in a folder there")
        places = [[(Path(train_part) / folder).as_posix() for folder in folders]]
        if test_part is not None:
            places.append([f"{test_part}/{folder}" for folder in _same_classes(root, train_part, test_part, folders)])
        found = [read_folders(root, part, "class") for part in places]
        for part in (train_part, *([test_part] if test_part is not None else [])):
            no_loose_images(root / part, "class")
        parts = [_labelled([f.images for f in part.values()]) for part in found]
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
        names = _readable(root, folders, notes)
        notes += folder_notes([f for part in found for f in part.values()], "class", sorted(bad))
        return select(cls.name, names, train, test, split_name, config, sorted(bad), notes=notes)


def _parts(root: Path) -> tuple[str, str | None, list[str]]:
    """(training folder, test folder) below `root`, and what is left out; no test folder: to be split."""
    there = class_folders(root)
    trains, tests = (_called(root, there, names) for names in (TRAIN_NAMES, TEST_NAMES))
    # a train/ that holds images only, beside other folders, is the class "train" (bus, car, train)
    if not trains or not (tests or class_folders(root / trains[0])):
        for part in (*tests, *trains):
            if class_folders(root / part):
                raise UserError(f"{root / part} has folders of its own, and no train/ is beside it; add or rename one")
        return ".", None, []
    train = trains[0]
    # a test/ without class folders is a competition's unlabelled one
    test = next((part for part in tests if class_folders(root / part)), None)
    if tests and test is None:
        raise UserError(f"{root / tests[0]} has no class folders; put the images of each class in a folder there")
    left = {f"{part}/": len(image_files(root / part)) for part in there if part not in (train, test)}
    left["the folder above"] = len(loose_images(root))
    used = f"{train}/ and {test}/ are" if test else f"{train}/ is"
    return train, test, [f"{used} read; {n} image(s) in {part} left out" for part, n in left.items() if n]


def _called(root: Path, there: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of the folders that are called so in some case, in the order of `names`; as written here goes first."""
    found = sorted(
        (names.index(part.casefold()), part not in names, part) for part in there if part.casefold() in names
    )
    for one, other in pairwise(found):
        if one[1] and one[0] == other[0]:
            raise UserError(
                f"{root} has {one[2]}/ and {other[2]}/; which is meant cannot be known: rename or remove one"
            )
    return [part for *_, part in found]


def _labelled(files: Sequence[Sequence[str]]) -> tuple[list[str], list[int]]:
    return [name for part in files for name in part], [label for label, part in enumerate(files) for _ in part]


def _same_classes(root: Path, train_part: str, test_part: str, folders: Sequence[str]) -> list[str]:
    """The test folder of each training folder; UserError where one lacks the other."""
    tested = {composed(folder): folder for folder in class_folders(root / test_part)}
    trained = {composed(folder): folder for folder in folders}
    for here, there, part, other in (
        (tested, trained, test_part, train_part),
        (trained, tested, train_part, test_part),
    ):
        for name in sorted(set(here) - set(there)):
            raise UserError(
                f"{root / part / here[name]} has no counterpart {root / other / here[name]}; every class needs both"
            )
    return [tested[name] for name in trained]


def _without(
    root: Path, names: Sequence[str], labels: Sequence[int], bad: dict[str, str], folders: Sequence[str]
) -> tuple[list[str], list[int]]:
    kept = [(name, label) for name, label in zip(names, labels, strict=True) if name not in bad]
    left = {label for _, label in kept}
    for name, label in zip(names, labels, strict=True):
        if label not in left:
            raise UserError(f"no image in the class folder {(root / name).parent} can be read; replace them")
    return [name for name, _ in kept], [label for _, label in kept]


def _readable(root: Path, folders: Sequence[str], notes: list[str]) -> list[str]:
    """What the classes are called; adds to `notes` what the file of names leaves open."""
    path = root / "class_names.json"
    if not path.exists():
        return list(folders)
    try:
        given = read_json(path)
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); it must be a JSON object such as {{folder: name}}") from error
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
        raise UserError(
            f'{path} must be a JSON object of folder names and class names, such as {{"n01443537": "goldfish"}}'
        )
    names = {composed(folder): name for folder, name in given.items()}
    if len(names) < len(pairs):
        twice = next(k for k, n in Counter(composed(folder) for folder, _ in pairs).items() if n > 1)
        raise UserError(f"{path} names the folder {twice!r} twice; name it once")
    for folder, name in names.items():
        check_name(name, f"{path}: the name of {folder!r}")
        if not name.strip():
            raise UserError(f"{path} gives {folder!r} an empty name; write one, or leave the folder out")
    known = [composed(folder) for folder in folders]
    unknown = sorted(set(names) - set(known))
    if unknown and len(unknown) == len(names):
        if set(names) != {str(i) for i in range(len(folders))}:
            raise UserError(f"{path} names no folder that is there, but {unknown[0]!r}; {nearest(unknown[0], known)}")
        notes.append(
            f"{path.name} names folders by position, as sorted: {folders[0]} is {names['0']!r} (no folder is 0)"
        )
        names = {folder: names[str(i)] for i, folder in enumerate(known)}
    elif unknown:
        notes.append(f"{path.name} names {len(unknown)} folder(s) that are not there ({unknown[0]}): left out")
    called = [names.get(name, folder) for name, folder in zip(known, folders, strict=True)]
    if shared := [name for name, n in Counter(called).items() if n > 1]:
        notes.append(f"{len(shared)} name(s) of {path.name} stand for several classes ({shared[0]})")
    return called
