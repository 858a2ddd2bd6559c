"""What folder-like data sets share: splits by a stable hash, a hold-out for tuning, and smaller versions of a set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets.base import ClassData, ImageSet, split_hash

C = TypeVar("C", bound="SelectConfig")


@dataclass(frozen=True)
class SelectConfig:
    """Keys below `data.` that choose a part of a labelled data set."""

    holdout: float = field(
        default=0.0,
        metadata={"help": "tune hyper-parameters: test on this fraction of the training images, removed from training"},
    )
    limit: int | None = field(default=None, metadata={"help": "only this many training images per class"})
    test_limit: int | None = field(default=None, metadata={"help": "only this many test images per class"})
    classes: int | None = field(default=None, metadata={"help": "only the first so many classes in natural order"})

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.holdout must be in [0, 1), got {self.holdout}")
        for key, limit in (("limit", self.limit), ("test_limit", self.test_limit)):
            if limit is not None and limit < 1:
                raise UserError(f"data.{key} must be at least 1 image per class, got {limit}")
        if self.classes is not None and self.classes < 1:
            raise UserError(f"data.classes must be at least 1, got {self.classes}")

    def names_alone(self: C) -> C:
        """Under which class names are the same and next to no image is drawn or looked at, for `dualcl show`."""
        return replace(self, holdout=0.0, limit=None, test_limit=None)


def stable_order(ids: Sequence[str], purpose: str, seed: int = 0) -> list[int]:
    """Positions of `ids` sorted by sha256 of (purpose, seed, id): random, yet the same on every machine."""
    keys = [hashlib.sha256(f"{purpose}/{seed}/{name}".encode()).digest() for name in ids]
    return sorted(range(len(ids)), key=keys.__getitem__)


def hash_split(
    ids: Sequence[str], labels: np.ndarray, class_names: Sequence[str], fraction: float, purpose: str, seed: int = 0
) -> np.ndarray:
    """Bool (N,): the `fraction` of each class that a stable hash of its id sets apart, at least one and never all.

    Raises UserError for a class with fewer than two images.
    """
    apart = np.zeros(len(ids), dtype=bool)
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(f"class {name!r} has {len(members)} image(s); splitting off a test part needs at least 2")
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        apart[members[stable_order([ids[i] for i in members.tolist()], purpose, seed)[:count]]] = True
    return apart


def first_classes(images: ImageSet, classes: int) -> ImageSet:
    """The images of classes 0..`classes` - 1."""
    return images.subset(np.flatnonzero(images.labels < classes))


def limited(images: ImageSet, classes: int, limit: int) -> ImageSet:
    """At most `limit` images of each class, chosen by a stable hash of their ids, in their order."""
    kept: list[int] = []
    for label in range(classes):
        members = np.flatnonzero(images.labels == label)
        order = stable_order([images.ids[i] for i in members.tolist()], "limit")
        kept += members[order[:limit]].tolist()
    return images.subset(sorted(kept))


def select(
    name: str,
    class_names: Sequence[str],
    train: ImageSet,
    test: ImageSet,
    split_name: str,
    config: SelectConfig,
    skipped: Sequence[str] = (),
    facts: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> ClassData:
    """ClassData of a full split after `config`: first classes, hold-out, then limits; the split name says so."""
    if config.classes is not None:
        if config.classes > len(class_names):
            raise UserError(f"data.classes is {config.classes} but {name} has only {len(class_names)} classes")
        class_names = class_names[: config.classes]
        train, test = first_classes(train, config.classes), first_classes(test, config.classes)
        split_name += f"+classes-{config.classes}"
    if config.holdout > 0:
        apart = hash_split(train.ids, train.labels, class_names, config.holdout, "holdout")
        train, test = train.subset(np.flatnonzero(~apart)), train.subset(np.flatnonzero(apart))
        split_name += f"+holdout-{percent(config.holdout)}"
    if config.limit is not None:
        train = limited(train, len(class_names), config.limit)
        split_name += f"+limit-{config.limit}"
    if config.test_limit is not None:
        test = limited(test, len(class_names), config.test_limit)
        split_name += f"+test-limit-{config.test_limit}"
    return ClassData(
        name=name,
        class_names=tuple(class_names),
        train=train,
        test=test,
        split_name=split_name,
        split_hash=split_hash(train.ids, train.labels.tolist(), test.ids, test.labels.tolist()),
        skipped=tuple(skipped),
        notes=tuple(notes),
        facts=dict(facts or {}),
    )


def percent(fraction: float) -> str:
    """A fraction as it appears in split names: 0.2 -> 20%, 0.125 -> 12.5%."""
    return f"{fraction * 100:g}%"
