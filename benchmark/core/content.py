"""What files are, by their bytes: sha256, remembered by size, times and inode; digests over many of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.bar import Bar
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import atomic_write, cache_dir
from dualcl.benchmark.core.machine import usable_cpus
from dualcl.benchmark.core.reading import read_json

#: seconds after a change in which another one might leave the same times
RACY = 2.0
#: of a JSON file: who wrote it, not what it says
_WRITERS = ("_diffusers_version", "_name_or_path", "transformers_version")


def digest(entries: Iterable[Sequence[str]]) -> str:
    """sha256 (16 hex digits) over the sorted entries."""
    return hashlib.sha256(json.dumps(sorted(map(list, entries))).encode()).hexdigest()[:16]


def file_hashes(root: Path, names: Sequence[str]) -> list[str]:
    """sha256 of each file `root`/name; UserError for one that cannot be read.

    A file whose size, times and inode are as when it was read last is not read again. That memory is one file per root
    below `cache_dir`; when it cannot be read or written, everything is read.
    """
    memory = cache_dir() / "content" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    known: dict[str, list[Any]] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = {name: e for name, e in read_json(memory).items() if isinstance(e, list) and len(e) == 5}
    found: dict[str, list[Any]] = {}
    try:
        for name in names:
            stat = (root / name).stat()
            found[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        new = [name for name, stamp in found.items() if known.get(name, [])[:-1] != stamp]
        with Bar("reading files", len(new), "files") as bar, ThreadPoolExecutor(usable_cpus()) as pool:
            for name, hashed in zip(new, pool.map(lambda name: _sha256(root / name), new), strict=True):
                bar.update()
                known[name] = [*found[name], hashed]
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); restore or remove it") from error
    if new:
        before = (time.time() - RACY) * 1e9
        kept = {name: entry for name, entry in known.items() if max(entry[1:3]) < before}
        with contextlib.suppress(OSError), atomic_write(memory) as file:  # an unwritable cache costs time only
            file.write(json.dumps(kept).encode())
    return [str(known[name][-1]) for name in names]


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def files_digest(root: Path, patterns: Iterable[str]) -> str:
    """`digest` of the names and bytes of the files below `root` that match one of the patterns."""
    names = sorted({p.relative_to(root).as_posix() for pattern in patterns for p in root.glob(pattern) if p.is_file()})
    return digest(zip(names, file_hashes(root, names), strict=True))


def settings_digest(root: Path, patterns: Iterable[str]) -> str:
    """As `files_digest`; of a JSON file what it says, however it is written and whoever wrote it."""
    entries = []
    for path in sorted({p for pattern in patterns for p in root.glob(pattern) if p.is_file()}):
        said: Any = path.read_text(encoding="utf-8", errors="replace")
        with contextlib.suppress(ValueError):
            said = read_json(path)
        if isinstance(said, Mapping):
            said = {key: value for key, value in said.items() if key not in _WRITERS}
        entries.append((path.relative_to(root).as_posix(), json.dumps(said, sort_keys=True)))
    return digest(entries)
