"""Files that are whole or absent: atomic writes, JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
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


class Growing(list[Any]):
    """A list that is appended to and never changed else: `json_text` makes the text of each entry once."""

    def __init__(self, entries: Iterable[Any] = ()) -> None:
        super().__init__(entries)
        self._texts: dict[bool, list[str]] = {False: [], True: []}

    def text(self, sort_keys: bool) -> str:
        """In JSON: as `json.dumps(sort_keys=True)`, or an entry a line and without NaN."""
        texts, between = self._texts[sort_keys], ", " if sort_keys else ",\n"
        new = as_json(self[len(texts) :]) if sort_keys else self[len(texts) :]
        texts += [json.dumps(entry, sort_keys=sort_keys, allow_nan=sort_keys) for entry in new]
        return f"[{between.join(texts)}]"


def json_text(value: Any, *, sort_keys: bool = False) -> str:
    """As `json.dumps(sort_keys=True)`, for a checksum, or indented and without NaN, for a file."""
    mark, growing = uuid.uuid4().hex, list[Growing]()

    def marked(node: Any) -> Any:
        if isinstance(node, Growing):
            growing.append(node)
            return f"{mark}{len(growing) - 1}"
        return {k: marked(v) for k, v in node.items()} if isinstance(node, dict) else node

    tree = marked(value)
    if sort_keys:
        text = json.dumps(as_json(tree) if growing else tree, sort_keys=True)
    else:
        text = json.dumps(tree, indent=1, allow_nan=False)
    return re.sub(rf'"{mark}(\d+)"', lambda found: growing[int(found[1])].text(sort_keys), text) if growing else text


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically. NaN is an error: JSON has none."""
    with atomic_write(path) as handle:
        handle.write(json_text(value).encode() + b"\n")


def _checksum(blob: bytes, state: Mapping[str, Any]) -> str:
    return hashlib.sha256(blob + json_text(state, sort_keys=True).encode()).hexdigest()
