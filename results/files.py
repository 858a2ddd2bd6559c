"""Writing a file so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import glob
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HOST = re.sub(r"\W", "", platform.node())


def _sweep(path: Path) -> None:
    """Removes what processes of this host left when they were killed while they wrote `path`."""
    for litter in path.parent.glob(glob.escape(f".{path.name}.{_HOST}-") + "*.tmp"):
        try:
            os.kill(int(litter.name.removesuffix(".tmp").rpartition("-")[2]), 0)
        except ProcessLookupError:
            litter.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            pass


def write_bytes(path: Path, data: bytes) -> Path:
    """Writes `data` under a temporary name beside `path`, syncs and renames it; returns `path`. Raises OSError."""
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")
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
    """Writes `text` as UTF-8 with `\\n` line ends, like `write_bytes`; bytes of names that are no UTF-8 as \\udc.."""
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))


#: what a spreadsheet would run, unless it is a number
_FORMULA = re.compile(r"[=+\-@\t\r\n](?!\d*\.?\d+(e[+-]?\d+)?$)", re.IGNORECASE)


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would take for a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def slugs(names: Sequence[str]) -> list[str]:
    """A file name per name; those that would collide (or differ in case only) are numbered."""
    out: list[str] = []
    for name in names:
        slug = (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "stream")[:80]
        taken = {s.lower() for s in out}
        out.append(next(s for i in range(len(names) + 1) if (s := f"{slug}-{i}" if i else slug).lower() not in taken))
    return out
