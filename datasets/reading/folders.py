"""Folders of images: what counts as a class and as an image, what is unreadable, an ImageSet of files."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import check_text
from dualcl.benchmark.core.text import composed
from dualcl.datasets.base import ImageSet
from dualcl.datasets.reading.verify import verify_images, why_unreadable
from dualcl.datasets.reading.views import FORMATS, decode_image

#: endings of what is taken for an image; a .pfm holds numbers, no colours
SUFFIXES = {end for end, name in Image.registered_extensions().items() if name in FORMATS} - {".pfm"}
#: endings of images that are read only with what is named here
MENDS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif"),
    ".avif": "Pillow 11.3 or later",
    ".jxl": "pip install pillow-jxl-plugin",
}
#: what systems leave in folders, beside all that begins with a dot
SYSTEM = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini")
#: what the parts of a split are called, in any case
TRAIN_NAMES, TEST_NAMES = ("train", "training"), ("test", "testing", "val", "valid", "validation", "dev", "eval")
OnBadImage = Literal["stop", "skip"]


@dataclass(frozen=True)
class FolderImages:
    """Decodes the i-th of `names` below `root`; UserError naming the file when it cannot."""

    root: Path
    names: tuple[str, ...]

    def __call__(self, i: int) -> Image.Image:
        """Image i, upright RGB."""
        path = self.root / self.names[i]
        try:
            return decode_image(path)
        except Exception as error:
            raise unreadable(path, why_unreadable(path) or str(error)) from error


def unreadable(path: Path, reason: str) -> UserError:
    """The error for one bad image."""
    return UserError(f"cannot read the image {path} ({reason}); replace or remove it, or set data.on_bad_image=skip")


def bad_images(root: Path, names: Sequence[str], on_bad_image: OnBadImage) -> dict[str, str]:
    """Decodes all `names` below `root`; {name: reason} of those that cannot be read, a UserError under "stop"."""
    bad = verify_images(root, names)
    if bad and on_bad_image == "stop":
        first = next(iter(bad))
        error = unreadable(root / first, bad[first])
        raise UserError(f"{error} ({len(bad) - 1} more such file(s))") if len(bad) > 1 else error
    return bad


def check_on_bad_image(value: str) -> None:
    """UserError unless `value` is stop or skip."""
    if value not in get_args(OnBadImage):
        raise UserError(f"unknown data.on_bad_image {value!r}; {nearest(str(value), get_args(OnBadImage))}")


def folder_set(root: Path, names: Sequence[str], labels: Sequence[int] | np.ndarray) -> ImageSet:
    """An ImageSet over files below `root`; its fingerprint covers names, sizes and all times of change."""
    digest = hashlib.sha256()
    for name in names:
        try:
            stat = (root / name).stat()
        except OSError as error:
            raise UserError(f"cannot read {root / name} ({error.strerror}); restore or remove it") from error
        digest.update(f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}\t{stat.st_ctime_ns}\n".encode())
    names = tuple(names)
    return ImageSet(names, np.asarray(labels, dtype=np.int64), FolderImages(root, names), digest.hexdigest()[:16])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is directly in a folder, by name; hidden and system files do not count."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder} ({error.strerror}); check its permissions") from error
    for entry in entries:
        check_text(entry.name, f"the name of a file in {folder}")  # it goes into hashes and records
    return [e for e in entries if not e.name.startswith(".") and e.name.casefold() not in SYSTEM]


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders directly below `folder`, sorted; hidden and system folders do not count."""
    names = []
    for entry in _entries(folder):
        if entry.is_dir():
            names.append(entry.name)
        elif entry.is_symlink() and not entry.is_file() and Path(entry.name).suffix.lower() not in SUFFIXES:
            raise UserError(f"{entry.path} is a link that leads nowhere; restore what it leads to, or remove it")
    seen: dict[str, str] = {}
    for name in names:
        if seen.setdefault(composed(name), name) != name:
            raise UserError(f"{folder} has two folders {name!r} that differ in their Unicode form alone; join them")
    return names


def loose_images(folder: Path) -> list[str]:
    """Names of the images directly in `folder`, readable or not."""
    return [e.name for e in _entries(folder) if Path(e.name).suffix.lower() in {*SUFFIXES, *MENDS} and not e.is_dir()]


def no_loose_images(folder: Path, what: str) -> None:
    """UserError for images beside the folders of classes or concepts: whose they are cannot be known."""
    if names := loose_images(folder):
        raise UserError(
            f"{folder} has {len(names)} image(s) beside its {what} folders ({names[0]}); put them into a folder of "
            "their own there, or elsewhere"
        )


@dataclass
class Found:
    """The files of a class or concept, sorted, as paths below the root."""

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    #: of the images, how many lie in sub-folders
    deep: int = 0


def _walk(folder: Path, below: str, found: Found, within: tuple[str, ...]) -> None:
    real = os.path.realpath(folder)
    if real in within:
        raise UserError(f"{folder} is a link that leads back to a folder it lies in; remove it")
    for entry in _entries(folder):
        name = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            if entry.name.casefold() in (*TRAIN_NAMES, *TEST_NAMES):
                raise UserError(f"{entry.path} is a part of a split inside of a class; put it above: train/<class>/*")
            _walk(Path(entry.path), name, found, (*within, real))
        elif Path(entry.name).suffix.lower() not in SUFFIXES:
            found.others.append(name)
        elif entry.is_file() or entry.is_symlink():  # a link that leads nowhere is an image that cannot be read
            found.images.append(name)
            found.deep += len(within) > 0


def image_files(folder: Path) -> list[str]:
    """The images in `folder` and its sub-folders, as paths below it, sorted."""
    found = Found()
    _walk(folder, "", found, ())
    return sorted(found.images)


def read_folders(root: Path, folders: Sequence[str], what: str) -> dict[str, Found]:
    """{folder: its files, those of sub-folders too}; UserError for one without images, or that is half understood.

    `folders` are paths below `root`, `what` is the word for what one holds: class or concept.
    """
    out = {}
    for folder in folders:
        found = out[folder] = Found()
        _walk(root / folder, folder, found, ())
        found.images.sort()
        if not found.images:
            kinds = f"; {note}" if (note := _left_out(found.others)) else ""
            raise UserError(f"the {what} folder {root / folder} has no images ({', '.join(sorted(SUFFIXES))}){kinds}")
        if len(folders) == 1 and found.deep == len(found.images):
            raise UserError(
                f"{root / folder} is the only {what} folder, and all its images are in folders below it: where each of "
                f"those is a {what}, it is the folder to give; else move the images up"
            )
    return out


def _left_out(others: Sequence[str]) -> str:
    """One line on files that are no images, by their endings."""
    kinds = Counter(Path(name).suffix.lower() for name in others)
    parts = []
    for kind, count in kinds.most_common(8):
        first = next(name for name in others if Path(name).suffix.lower() == kind)
        mend = f"; to read them: {MENDS[kind]}" if kind in MENDS else ""
        parts.append(f"{count} {kind or 'without an ending'} ({first}{mend})")
    more = [f"{len(kinds) - 8} more kinds"] if len(kinds) > 8 else []
    return f"{len(others)} file(s) left out that cannot be read as images: {', '.join(parts + more)}" if others else ""


def folder_notes(found: Iterable[Found], what: str, bad: Sequence[str] = ()) -> list[str]:
    """What is to be said of the files read: what was left out, and images that count though they lie deeper."""
    found = list(found)
    notes = [_left_out([name for f in found for name in f.others])]
    if deep := [f for f in found if f.deep]:
        first = max(deep[0].images, key=lambda name: name.count("/"))
        notes.append(f"{sum(f.deep for f in deep)} image(s) in sub-folders count as of their {what} ({first})")
    if bad:
        notes.append(f"{len(bad)} image(s) left out that are damaged or missing ({bad[0]})")
    return [note for note in notes if note]
