"""Text for terminals: durations, printable names, aligned columns."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m10s` or `2h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def printable(text: str) -> str:
    """`text` on one line without control characters: names of classes and folders are the user's."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def composed(name: str) -> str:
    """`name` in the form in which names are compared: a Mac stores é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def say(text: str) -> None:
    """Prints a line to stderr, if somebody reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def align(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of cells as lines with two blanks between columns; columns in `right` are right-aligned."""
    to_right = set(right)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(c.rjust(w) if i in to_right else c.ljust(w) for i, (c, w) in cells).rstrip())
    return lines
