"""Letters in pictures: of DejaVu Sans, else of an installed font that has them, else their codes."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

PLAIN = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
FAMILY = "DejaVu Sans"


@functools.cache
def _letters(file: str) -> frozenset[int]:
    try:
        font = FT2Font(file)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):  # a font of an unknown kind
        return frozenset()


@functools.cache
def _others() -> list[tuple[str, str]]:
    """(family, file) of the installed upright fonts, in an order that does not change."""
    fonts = {(f.name, f.fname) for f in font_manager.fontManager.ttflist if f.style == "normal"}
    # matplotlib's Last Resort draws a box for everything
    return sorted(f for f in fonts if f[0] != FAMILY and not f[0].startswith("Last Resort"))


@functools.cache
def _of(letter: str) -> tuple[str, str] | None:
    """The font that draws a letter; None where none does."""
    if ord(letter) in _letters(str(PLAIN)):
        return FAMILY, str(PLAIN)
    return next((font for font in _others() if ord(letter) in _letters(font[1])), None)


def _invisible(letter: str) -> bool:
    return letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf", "Mn", "Cs")


def drawable(text: str) -> str:
    """`text` with the codes of letters that no font has in their stead."""
    return "".join(c if _invisible(c) or _of(c) else f"[U+{ord(c):04X}]" for c in text)


def families(text: str) -> list[str]:
    """Families of fonts that have all letters of a text that is `drawable`, in the order in which they are asked."""
    found = (_of(c) for c in text if not _invisible(c))
    return list(dict.fromkeys([FAMILY, *(font[0] for font in found if font)]))


def file_for(text: str) -> str:
    """The file of one font that has all letters of a text, or most of them."""
    letters = {c for c in text if not _invisible(c)}
    files = dict.fromkeys([str(PLAIN), *(font[1] for c in sorted(letters) if (font := _of(c)))])
    return max(files, key=lambda file: sum(ord(c) in _letters(file) for c in letters))


def lacking(names: Iterable[str]) -> list[str]:
    """A line for a report on letters of names that no font has; none where there are none."""
    letters = sorted({c for name in names for c in name if not (_invisible(c) or _of(c))})
    if not letters:
        return []
    shown = ", ".join(f"{c} (U+{ord(c):04X})" for c in letters[:8]) + ", ..." * (len(letters) > 8)
    return [f"no font here has the letters {shown}: pictures show their codes; install one that has"]
