"""The errors a user can cause or meet; the command line turns them into one line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
#: names that a hint lists; more are no help in one line
MOST_SHOWN = 100


class UserError(Exception):
    """Wrong input: names the culprit and the mend in one line. Exit code 2."""


class RunFailed(Exception):
    """A run that cannot go on (a NaN loss, say); everything recorded before stays. Exit code 1."""


def nearest(word: str, known: Iterable[str], label: str = "known", listed: Iterable[str] | None = None) -> str:
    """A hint such as `did you mean 'clora'? (known: clora, lora, ...)` for an unknown word.

    The names it lists are `listed`, or all that are known.
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    names = known if listed is None else sorted(listed)
    shown = ", ".join(names) or "none"
    listing = f"{label}: {shown if len(names) <= MOST_SHOWN else f'{len(names)} names'}"
    return f"did you mean {' or '.join(repr(c) for c in close)}? ({listing})" if close else listing


def describe_os_error(error: OSError, place: str | Path) -> str:
    """`FILE: No space left on device`; writing to an open file gives no name, then `place` stands for it."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{place if error.filename is None else error.filename}: {reason}"
