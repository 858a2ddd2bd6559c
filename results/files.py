"""Writing a file so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> Path:
    """Writes `data` under a temporary name beside `path`, syncs and renames it; returns `path`. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Writes `text` as UTF-8 with `\\n` line ends, like `write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def slugs(names: Sequence[str]) -> list[str]:
    """A file name per name; those that would collide (or differ in case only) are numbered."""
    out: list[str] = []
    for name in names:
        slug = (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "stream")[:80]
        taken = {s.lower() for s in out}
        out.append(next(s for i in range(len(names) + 1) if (s := f"{slug}-{i}" if i else slug).lower() not in taken))
    return out
