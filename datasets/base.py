"""What a data set hands to the benchmark: labelled images, and a stream of tasks made from them. No model code."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import is_file, read_names
from dualcl.benchmark.core.safe_yaml import read_yaml
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.core.settings import coerce
from dualcl.benchmark.core.text import composed

T = TypeVar("T", bound=type)


def register_dataset(
    name: str, *, domain: str, summary: str, needs_prepare: bool = False, listed: bool = True
) -> Callable[[T], T]:
    """Registers a data set class; arguments must be literals (the index is read without importing).

    The class has `Config` (a frozen dataclass, the keys below `data.`), `load(config)` (a classmethod: ClassData, or
    ConceptData in customization) and, with `needs_prepare`, `prepare(config)` (a classmethod: downloads, verifies,
    splits). Where names cost images, `Config.names_alone()` is a config under which they cost few. Without `listed`,
    only `dualcl list --all` shows it.
    """

    def apply(cls: T) -> T:
        lacking = [part for part in ("Config", "load", *["prepare"] * needs_prepare) if not hasattr(cls, part)]
        if lacking or not dataclasses.is_dataclass(cls.Config):  # type: ignore[attr-defined]
            raise UserError(f"{name}: {cls.__name__} needs {', '.join(lacking) or 'a dataclass as Config'}")
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return apply


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, decoded one at a time.

    `ids` are stable names (a path below the root, an index in an archive), `labels` int64 class positions, and
    `load(i)` returns image i as an upright RGB PIL image. `fingerprint` changes when any image may have changed.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    load: Callable[[int], Image.Image]
    fingerprint: str

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels):
            raise ValueError(f"{len(self.ids)} ids but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int] | np.ndarray, labels: np.ndarray | None = None) -> ImageSet:
        """The images at `indices`, relabelled with `labels` when given."""
        chosen = np.asarray(indices, dtype=np.int64)
        load = self.load
        return ImageSet(
            ids=tuple(self.ids[i] for i in chosen),
            labels=self.labels[chosen] if labels is None else np.asarray(labels, dtype=np.int64),
            load=_Subset(load, chosen),
            fingerprint=hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()[:16],
        )


@dataclass(frozen=True)
class _Subset:
    """Picklable index shift, so that loader workers can be spawned as well as forked."""

    load: Callable[[int], Image.Image]
    indices: np.ndarray

    def __call__(self, i: int) -> Image.Image:
        return self.load(int(self.indices[i]))


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory, uint8 (N, H, W, 3)."""

    pixels: np.ndarray

    def __call__(self, i: int) -> Image.Image:
        """Image i, RGB."""
        return Image.fromarray(self.pixels[i])


@dataclass(frozen=True)
class ClassData:
    """A classification data set before it is cut into tasks. Labels are 0..C-1 in natural order."""

    name: str
    class_names: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    split_name: str
    split_hash: str
    #: ids of images left out because they could not be read (data.on_bad_image=skip)
    skipped: tuple[str, ...] = ()
    #: what the files leave open, and how it was taken: said at the start of a run
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassTask:
    """One task of a class-incremental stream; labels are positions in the stream (0 for the first class of task 0)."""

    index: int
    classes: tuple[int, ...]
    names: tuple[str, ...]
    outputs: range
    train: ImageSet
    test: ImageSet


@dataclass(frozen=True)
class ClassStream:
    """Ordered tasks, nothing else."""

    data: ClassData
    class_order: tuple[int, ...]
    tasks: tuple[ClassTask, ...]


def split_hash(
    train_ids: Sequence[str], train_labels: Sequence[int], test_ids: Sequence[str], test_labels: Sequence[int]
) -> str:
    """sha256 (16 hex digits) over the sorted (part, class, id) triples: equal exactly when the split is equal."""
    digest = hashlib.sha256()
    for part, ids, labels in (("train", train_ids, train_labels), ("test", test_ids, test_labels)):
        for name, label in sorted(zip(ids, labels, strict=True)):
            digest.update(f"{part}\t{int(label)}\t{name}\n".encode())
    return digest.hexdigest()[:16]


#: orders that have a name
ORDERS = ("natural", "shuffle", "coda")


def given_order(order: str | list[int] | list[str]) -> str | list[int] | list[str]:
    """`stream.class_order` as it is recorded: names out of a file, one a line, or out of `a,b,c`, as a list.

    UserError for text that is none of ORDERS, no file and no such list.
    """
    if not isinstance(order, str) or order in ORDERS:
        return order
    if is_file(order):
        return read_names(Path(order), "stream.class_order")
    if "," in order:
        try:
            listed = read_yaml(f"[{order}]", "stream.class_order")
        except UserError as error:
            reason = str(error).rpartition(";")[0]
            raise UserError(f"{reason}; stream.class_order wants names as in owl,cat, got {order[:60]!r}") from None
        return cast("list[int] | list[str]", coerce(listed, list[int] | list[str], "stream.class_order"))
    raise UserError(
        f"stream.class_order must be {', '.join(ORDERS)}, a list such as [2,0,1] or [owl,cat], or a file with one name "
        f"a line, got {order!r}"
    )


def make_class_order(
    n_classes: int,
    order: str | Sequence[int] | Sequence[str],
    seed: int,
    names: Sequence[str] = (),
    item: str = "class",
) -> tuple[int, ...]:
    """The order in which classes are learnt.

    `order`: "natural"; "shuffle" (a permutation from `seed`); "coda" (CODA-Prompt: natural for seed 0, else
    `random.seed(seed); random.shuffle`); or an explicit permutation of all classes, as numbers or as their `names`.
    Raises UserError for anything else; `item` is its word for what is ordered.
    """
    if isinstance(order, str):
        classes = list(range(n_classes))
        if order == "natural" or (order == "coda" and seed == 0):
            return tuple(classes)
        if order == "shuffle":
            return tuple(int(c) for c in numpy_generator(seed, "class-order").permutation(n_classes))
        if order == "coda":
            random.Random(seed).shuffle(classes)
            return tuple(classes)
        raise UserError(f"stream.class_order must be natural, shuffle, coda or a list such as [2,0,1], got {order!r}")
    if order and all(isinstance(c, str) for c in order):
        return _named_order([composed(str(c)) for c in order], [composed(name) for name in names], item)
    given = [int(c) for c in order]
    twice = sorted({c for c in given if given.count(c) > 1})
    if twice:
        raise UserError(f"stream.class_order names {twice[0]} twice; it must name every {item} 0..{n_classes - 1} once")
    if sorted(given) != list(range(n_classes)):
        wrong = sorted(set(given) ^ set(range(n_classes)))
        hint = " (names that are numbers want quotes: ['10','11'])" if given and {*map(str, given)} <= {*names} else ""
        raise UserError(f"stream.class_order must name every {item} 0..{n_classes - 1} once; look at {wrong[:5]}{hint}")
    return tuple(given)


def _named_order(given: Sequence[str], names: Sequence[str], item: str) -> tuple[int, ...]:
    place = {name: i for i, name in enumerate(names)}
    if double := next((name for name, times in Counter(names).items() if times > 1), None):
        those = " and ".join(str(i) for i, name in enumerate(names) if name == double)
        raise UserError(
            f"stream.class_order: {item} {those} are called {double!r}; give the order as numbers, as in [2,0,1]"
        )
    for name, times in Counter(given).items():
        if name not in place:
            raise UserError(f"stream.class_order: there is no {item} {name!r}; {nearest(name, names, 'names')}")
        if times > 1:
            raise UserError(f"stream.class_order names {name!r} {times} times; name every {item} once")
    if missing := [name for name in names if name not in set(given)]:
        shown = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"stream.class_order lacks {len(missing)} of {len(names)} names ({shown}); name every {item} once"
        )
    return tuple(place[name] for name in given)


def task_sizes(
    n_classes: int,
    tasks: int,
    sizes: Sequence[int] = (),
    first: int | None = None,
    increment: int | None = None,
    name: str = "the data",
) -> list[int]:
    """Classes of each task: `sizes` as they are, or a `first` task and then `increment` a task, else equal parts.

    Where equal parts are not whole the first tasks get one class more; a last increment may be smaller. UserError where
    the classes do not suffice or are left over.
    """
    if sizes:
        if sum(sizes) != n_classes:
            raise UserError(
                f"stream.sizes add up to {sum(sizes)} but {name} has {n_classes} classes; give sizes that add up to it"
            )
        return list(sizes)
    if first is not None and first > n_classes:
        raise UserError(f"stream.first is {first} but {name} has only {n_classes} classes; give at most {n_classes}")
    start = [] if first is None else [first]
    rest = n_classes - sum(start)
    if increment is not None:
        return [*start, *(min(increment, rest - done) for done in range(0, rest, increment))]
    if tasks > n_classes:
        raise UserError(f"stream.tasks is {tasks} but {name} has only {n_classes} classes; give at most {n_classes}")
    parts = tasks - len(start)
    if not parts <= rest or (rest and not parts):
        raise UserError(
            f"stream.first={first} leaves {rest} of {n_classes} classes for {parts} further tasks of "
            f"stream.tasks={tasks}; set stream.tasks to fit, or stream.increment"
        )
    return [*start, *(rest // parts + (i < rest % parts) for i in range(parts))]


def _parts(images: ImageSet, position: np.ndarray, sizes: Sequence[int]) -> list[ImageSet]:
    """The images of each task, in their own order, labelled by the position of their class in the stream."""
    labels = position[images.labels]
    of_task = np.repeat(np.arange(len(sizes)), sizes)[labels]
    ends = np.cumsum(np.bincount(of_task, minlength=len(sizes)))
    chosen = np.split(np.argsort(of_task, kind="stable"), ends[:-1])
    return [images.subset(indices, labels[indices]) for indices in chosen]


def make_class_stream(
    data: ClassData,
    tasks: int,
    order: str | Sequence[int] | Sequence[str] = "shuffle",
    seed: int = 0,
    sizes: Sequence[int] = (),
    first: int | None = None,
    increment: int | None = None,
) -> ClassStream:
    """Cuts `data` into tasks with disjoint classes; see `make_class_order` and `task_sizes`."""
    n_classes = len(data.class_names)
    if tasks < 1:
        raise UserError(f"stream.tasks must be at least 1, got {tasks}")
    sizes = task_sizes(n_classes, tasks, sizes, first, increment, data.name)
    class_order = make_class_order(n_classes, order, seed, data.class_names)
    position = np.empty(n_classes, dtype=np.int64)
    position[list(class_order)] = np.arange(n_classes)
    chunks = np.split(np.asarray(class_order), np.cumsum(sizes)[:-1])
    parts = [_parts(images, position, sizes) for images in (data.train, data.test)]
    out, begin = [], 0
    for index, (chunk, *sets) in enumerate(zip(chunks, *parts, strict=True)):
        out.append(
            ClassTask(
                index=index,
                classes=tuple(int(c) for c in chunk),
                names=tuple(data.class_names[c] for c in chunk),
                outputs=range(begin, begin + len(chunk)),
                train=sets[0],
                test=sets[1],
            )
        )
        begin += len(chunk)
    return ClassStream(data, class_order, tuple(out))
