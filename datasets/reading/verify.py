"""Decodes every image before any training, and remembers which files were good."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dualcl.benchmark.core.bar import Bar
from dualcl.benchmark.core.files import atomic_write, cache_dir
from dualcl.benchmark.core.machine import usable_cpus
from dualcl.benchmark.core.reading import read_json
from dualcl.datasets.reading.threads import in_threads
from dualcl.datasets.reading.views import check_blocks, decode_image


def why_unreadable(path: Path) -> str | None:
    """One line on why `path` cannot be decoded in full, None when it can."""
    try:
        decode_image(path)
        check_blocks(path)
    except OSError as error:
        if isinstance(error, Image.UnidentifiedImageError):
            return "empty file" if path.stat().st_size == 0 else "not an image, or damaged at its start"
        return " ".join(str(error).split()) or type(error).__name__
    return None


def verify_images(root: Path, ids: Sequence[str]) -> dict[str, str]:
    """Decodes the files `root`/id and returns {id: reason} of those that cannot be read.

    Files that were good before, with the same size and time of change, are not decoded again. That memory is one small
    file per root below `cache_dir`; when it cannot be read or written, everything is decoded.
    """
    memory = cache_dir() / "verified" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    known = _read(memory)
    stamps: dict[str, list[int]] = {}
    bad: dict[str, str] = {}
    for name in ids:
        try:
            stat = (root / name).stat()
            stamps[name] = [stat.st_size, stat.st_mtime_ns]
        except OSError as error:
            link = (root / name).is_symlink()
            bad[name] = "a link that leads nowhere" if link else error.strerror or str(error)
    new = [name for name, stamp in stamps.items() if known.get(name) != stamp]
    with warnings.catch_warnings(), Bar("checking images", len(new), "images") as bar:
        # what Pillow only warns of (corrupt EXIF, one to two times its limit of pixels) can be decoded
        warnings.filterwarnings("ignore", module="PIL")
        reasons = in_threads(lambda name: why_unreadable(root / name), new, usable_cpus())
        for name, reason in zip(new, reasons, strict=True):
            bar.update()
            if reason is not None:
                bad[name] = reason
    good = {name: stamp for name, stamp in stamps.items() if name not in bad}
    if any(known.get(name) != stamp for name, stamp in good.items()):
        with contextlib.suppress(OSError), atomic_write(memory) as file:  # an unwritable cache costs time only
            file.write(json.dumps({**known, **good}).encode())
    return bad


def _read(path: Path) -> dict[str, list[int]]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
