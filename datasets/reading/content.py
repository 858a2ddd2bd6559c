"""Data sets by content: a hash of each picture, digests for the record, and pictures that are there more than once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from dualcl.benchmark.core.content import digest, file_hashes
from dualcl.datasets.base import ArrayImages, ClassData, ImageSet, _Subset
from dualcl.datasets.concepts import Concept, ConceptData
from dualcl.datasets.reading.folders import FolderImages

#: a picture: its part, its class or concept, its id, its hash
Picture = tuple[str, str, str, str]


def hashes(images: ImageSet) -> list[str] | None:
    """sha256 of each picture, of the bytes of its file or of its pixels; None where neither can be had."""
    load: Any = images.load
    at = list(range(len(images)))
    while isinstance(load, _Subset):
        at, load = load.indices[at].tolist() if at else [], load.load
    if isinstance(load, FolderImages):
        return file_hashes(load.root, [load.names[i] for i in at])
    if isinstance(load, ArrayImages):
        return [hashlib.sha256(load.pixels[i].tobytes()).hexdigest() for i in at]
    return None


def _sets(data: ClassData | ConceptData) -> list[tuple[str, ImageSet, list[str]]]:
    """Each part, its images, and the class or concept of each."""
    if isinstance(data, ConceptData):
        return [("", c.images, [c.name] * len(c.images)) for c in data.concepts]
    parts = (("train", data.train), ("test", data.test))
    return [(part, images, [data.class_names[i] for i in images.labels]) for part, images in parts]


def pictures(data: ClassData | ConceptData) -> tuple[str, list[Picture]]:
    """(digest, every picture): equal where all pictures of a data set are, under the names that it knows them by.

    An own `load` says no bytes: the set's `fingerprint`, which changes when an image may have changed, stands for it.
    """
    found: list[Picture] = []
    entries: list[tuple[str, ...]] = []
    for part, images, names in _sets(data):
        known = hashes(images)
        if known is None:
            entries.append((part, *names[:1], images.fingerprint))
            continue
        found += zip([part] * len(images), names, images.ids, known, strict=True)
        entries += zip([part] * len(images), images.ids, known, strict=True)
    return digest(entries), found


def words(data: ClassData | ConceptData) -> str:
    """Digest of what a data set says in words: names of classes, or what it says of each concept."""
    if isinstance(data, ClassData):
        return digest((str(i), name) for i, name in enumerate(data.class_names))
    # what a later version adds is empty in the data of today
    return digest((f.name, c.name, repr(v)) for c in data.concepts for f, v in _said(c))


def _said(concept: Concept) -> Iterable[tuple[dataclasses.Field[Any], Any]]:
    values = ((f, getattr(concept, f.name)) for f in dataclasses.fields(concept) if f.name != "images")
    return ((f, value) for f, value in values if value)


def repeated(found: Sequence[Picture]) -> list[str]:
    """Pictures that are there more than once, in a few words for each kind: how many, and two examples."""
    by_hash: dict[str, list[Picture]] = defaultdict(list)
    for picture in found:
        by_hash[picture[3]].append(picture)
    several = [group for group in by_hash.values() if len(group) > 1]
    tests = [p for group in several if len({part for part, *_ in group}) > 1 for p in group if p[0] == "test"]
    of = sum(part == "test" for part, *_ in found)
    mixed = [group for group in several if len({name for _, name, *_ in group}) > 1]
    twice = [p for group in several for p in _again(group)]
    kind = "classes" if of else "concepts"
    lines = []
    if tests:
        every = "the whole test part, which tells nothing of new pictures, is" * (len(tests) == of)
        lines.append(f"{every or f'{len(tests)} of {of} test pictures'} identical to training pictures{_shown(tests)}")
    if mixed:
        lines.append(f"{len(mixed)} in two {kind} or more{_shown(p for g in mixed for p in g)}")
    if twice:
        lines.append(f"{len(twice)} twice in one of the {kind}{_shown(twice)}")
    return lines


def _again(group: Sequence[Picture]) -> Iterable[Picture]:
    """The second, third, ... copy within a part and class."""
    seen = set()
    for picture in group:
        if picture[:2] in seen:
            yield picture
        seen.add(picture[:2])


def _shown(some: Iterable[Picture]) -> str:
    names = [name for _, _, name, _ in some]
    return f" ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
