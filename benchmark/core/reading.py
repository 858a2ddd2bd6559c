"""Reading what others wrote - JSON, names - so that the worst a file can do is to be refused in one line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError

#: levels of a JSON or YAML file: what is nested deeper would overflow the stack somewhere
DEEPEST = 100
#: integers are smaller: Python takes no time for them, prints them, and makes floats of them
TOO_LARGE = 2**64
#: seeds of runs: readers of records take no larger number
MOST_SEED, SEEDS = 10**15, "from 0 to 10^15"

#: what may be a number beyond the range of float or TOO_LARGE
_LONG_NUMBER = re.compile(r"\d(?<![\w.]\d)(?:\d{19}|[\d.]*[eE]\+?\d{3})")

#: what no name in a table, a log or a terminal may hold
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
#: of a surrogate pair: no file can hold them
HALVES = re.compile("[\ud800-\udfff]")


def parse_names(text: str, what: str) -> list[str]:
    """`a,b,c` -> ["a", "b", "c"]; UserError when one is empty or given twice."""
    names = [name.strip() for name in text.split(",")]
    for i, name in enumerate(names):
        if not name:
            raise UserError(f"--{what} {text!r} has an empty entry; separate the entries with single commas")
        if name in names[:i]:
            raise UserError(f"--{what} names {name!r} twice; give it once")
    return names


def natural(text: str, most: int = MOST_SEED) -> int:
    """The whole number from 0 to `most` that `text` writes in digits; ValueError for any other text."""
    if text.isascii() and text.isdecimal() and len(digits := text.lstrip("0")) <= 20:
        value = int(digits or "0")
        if value <= most:
            return value
    raise ValueError(f"not a whole number from 0 to {most}")


def check_text(text: str, where: str) -> None:
    """UserError naming `where` for text that came of bytes that are no UTF-8: nothing could write or encode it."""
    if HALVES.search(text):
        raise UserError(f"{where} is {text[:80]!r}, which is no text in UTF-8; write it anew")


def check_name(text: str, where: str) -> None:
    """UserError naming `where` for text with line breaks or other control characters: it stands in tables and logs."""
    if CONTROL.search(text):
        raise UserError(f"{where} is {text[:80]!r}, which has control characters; write it on one line without")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; UserError that names it where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path} (it is not UTF-8); save it as a text file in UTF-8") from error


def read_names(path: Path, key: str) -> list[str]:
    """The names in a text file, one a line; UserError naming `key` for a file that cannot be read or holds none."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UserError(f"{key}: cannot read {path} ({why}); give a text file with one name a line") from None
    if not (names := [name for line in lines if (name := line.strip())]):
        raise UserError(f"{key}: {path} holds no names; write one a line")
    return names


def is_file(text: str) -> bool:
    """Whether `text` is the path of a file here."""
    try:
        return Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def parse_json(text: str) -> Any:
    """The value of a JSON text. ValueError for what is none, infinite, an integer from 2^64 on, or nested too deep."""
    try:
        if _LONG_NUMBER.search(text):
            value = json.loads(text, parse_constant=_no_constant, parse_int=_integer, parse_float=_finite)
        else:
            value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep() from None
    level = [value]
    for _ in range(DEEPEST):
        inner = [x for v in level if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
        level = [x for x in inner if isinstance(x, (dict, list))]
        if not level:
            return value
    raise _too_deep()


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises OSError, and ValueError as `parse_json` does."""
    return parse_json(path.read_text(encoding="utf-8"))


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {DEEPEST} levels")


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def _integer(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) >= TOO_LARGE:
        raise ValueError(f"it holds the integer {text[:20]}, which is too large")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"it holds the number {text[:20]}, which is too large")
    return value
