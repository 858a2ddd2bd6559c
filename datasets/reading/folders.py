"""Folders of images: what counts as a class and as an image, what is unreadable, an ImageSet of files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import check_text
from dualcl.datasets.base import ImageSet
from dualcl.datasets.reading.verify import verify_images, why_unreadable
from dualcl.datasets.reading.views import decode_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
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


def _entries(folder: Path) -> list[Path]:
    try:
        found = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder} ({error.strerror}); check its permissions") from error
    for path in found:
        check_text(path.name, f"the name of a file in {folder}")  # it goes into hashes and records
    return found


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders directly below `folder`, sorted; hidden and system folders do not count."""
    return sorted(p.name for p in _entries(folder) if p.is_dir() and not p.name.startswith((".", "__")))


def image_files(folder: Path) -> list[str]:
    """Names of the images directly in `folder`, sorted."""
    return sorted(
        p.name for p in _entries(folder) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
