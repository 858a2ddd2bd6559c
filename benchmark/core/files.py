"""Files that are whole or absent: atomic writes, JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def cache_dir() -> Path:
    """Where the suite keeps what it can make again: $DUALCL_CACHE, else ~/.cache/dualcl."""
    return Path(os.environ.get("DUALCL_CACHE") or Path.home() / ".cache" / "dualcl")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under its name only when it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Puts a folder's names on the disk: a power cut may take back a rename that was not. Not all file systems can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(handle)


def as_json(value: Any) -> Any:
    """`value` as it comes back from a JSON file (tuples as lists), for comparing with one."""
    return json.loads(json.dumps(value))


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically. NaN is an error: JSON has none."""
    with atomic_write(path) as handle:
        handle.write(json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def _checksum(blob: bytes, state: Mapping[str, Any]) -> str:
    return hashlib.sha256(blob + json.dumps(state, sort_keys=True).encode()).hexdigest()
