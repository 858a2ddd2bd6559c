"""Decoded images on disk: one memory-mapped file per set and size, bounded, shared by all processes of a user."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from dualcl.benchmark.core.bar import Bar
from dualcl.benchmark.core.files import cache_dir
from dualcl.datasets.reading.threads import prepared
from dualcl.datasets.reading.views import Decoded

GIB = 2**30
#: a part of the disk that is never filled: someone else writes there too
RESERVE = GIB
#: seconds without progress after which another process that makes the same file is no longer waited for
PATIENCE = 60.0
_SUFFIX, _PART = ".pixels", ".pixels.part"
_MAGIC = b"dualcl01"
#: magic, number of images, bytes of pixels, crc32 of the table
_FOOTER = struct.Struct("<8sQQI")
#: an image as kept (height, width), as decoded (full_width, full_height), and the crc32 of its pixels
_ENTRY = np.dtype([(name, "<u4") for name in ("height", "width", "full_width", "full_height", "crc")])


class PixelStore:
    """The images of one set, read from an open file of the cache; its shared lock says that it is in use.

    `decode` makes an image anew: the store falls back on it where the file proves damaged.
    """

    def __init__(self, path: Path, file: IO[bytes], decode: Callable[[int], Decoded]) -> None:
        """Raises ValueError when the file is no complete store."""
        self._path, self._file, self._decode = path, file, decode
        size = file.seek(0, os.SEEK_END)
        if size < _FOOTER.size:
            raise ValueError("too short")
        file.seek(size - _FOOTER.size)
        magic, count, length, crc = _FOOTER.unpack(file.read(_FOOTER.size))
        if magic != _MAGIC or size != length + count * _ENTRY.itemsize + _FOOTER.size:
            raise ValueError("not complete")
        file.seek(length)
        table = file.read(count * _ENTRY.itemsize)
        self._table = np.frombuffer(table, _ENTRY)
        sizes = self._table["height"].astype(np.int64) * self._table["width"] * 3
        if zlib.crc32(table) != crc or int(sizes.sum()) != length:
            raise ValueError("damaged table")
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._checked = np.zeros(count, dtype=bool)
        self._pixels = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Decoded:
        """Image `index`; its checksum is compared when it is read for the first time."""
        entry = self._table[index]
        pixels = self._pixels[self._starts[index] : self._starts[index + 1]]
        if not self._checked[index]:
            if zlib.crc32(pixels.data) != entry["crc"]:
                with contextlib.suppress(OSError):
                    self._path.unlink()  # to be made again by the next who asks for it
                return self._decode(index)
            self._checked[index] = True
        shape = int(entry["height"]), int(entry["width"]), 3
        return Decoded(pixels.reshape(shape), (int(entry["full_width"]), int(entry["full_height"])))

    def close(self) -> None:
        """Gives up the lock as soon as no array that was handed out is alive."""
        self._file.close()
        self._pixels = np.empty(0, np.uint8)


def open_store(
    key: Mapping[str, Any], count: int, decode: Callable[[int], Decoded], *, limit: int, workers: int
) -> PixelStore | None:
    """The store of the `count` images that `decode` makes, filled at the first call for this `key`.

    `key` must name all that the pixels depend on. `limit` is in bytes, for all files of the cache together: the least
    recently used that no process has open make room. None, and a line on stderr, when they cannot be kept (larger than
    the limit, disk full, folder not writable): a run does without. An error of `decode` goes to the caller.
    """
    if count == 0:
        return None
    name = hashlib.sha256(json.dumps({**key, "count": count}, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_dir() / "decoded" / (name + _SUFFIX)
    try:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        store = _open(path, count, decode)
        if store is None:
            _fill(path, count, decode, limit, workers)
            store = _open(path, count, decode)
    except OSError as error:
        # decode reports the files of the data set as UserError: this one is of the cache
        print(f"decoded images are not kept: {error.strerror or error} ({path.parent})", file=sys.stderr, flush=True)
        return None
    return store


def _open(path: Path, count: int, decode: Callable[[int], Decoded]) -> PixelStore | None:
    """The store at `path`; None when there is none, or another or a damaged one, which is then removed."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    try:
        _lock(file, fcntl.LOCK_SH)
        store = PixelStore(path, file, decode)
        # a few images against their files: a folder may have the names, sizes and times of another
        if len(store) == count and all(_same(store[i], decode(i)) for i in _some(count, 4)):
            with contextlib.suppress(OSError):
                os.utime(path)  # when it was last used
            return store
    except (OSError, ValueError):
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    path.unlink(missing_ok=True)
    return None


def _same(left: Decoded, right: Decoded) -> bool:
    return left.full == right.full and np.array_equal(left.pixels, right.pixels)


def _some(count: int, most: int) -> list[int]:
    """At most `most` positions, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, most)})


def _fill(path: Path, count: int, decode: Callable[[int], Decoded], limit: int, workers: int) -> None:
    """Decodes all images to `path`, under its name only when it is complete; OSError when it cannot be kept.

    Of several processes one works and the others wait. What a killed one left is written over, or makes room.
    """
    part = path.with_name(path.name.removesuffix(_SUFFIX) + _PART)
    with _alone(part, path) as file:
        if file is None:
            return
        try:
            expected = sum(decode(i).pixels.nbytes for i in _some(count, 16)) * count // min(count, 16)
            make_room(path.parent, expected, limit)
            table = np.zeros(count, _ENTRY)
            with Bar("decoding images", count, "images") as bar:
                for index, image in enumerate(prepared(decode, range(count), workers, 4 * max(1, workers))):
                    pixels = np.ascontiguousarray(image.pixels)
                    table[index] = (*pixels.shape[:2], *image.full, zlib.crc32(pixels.data))
                    file.write(pixels.data)
                    bar.update()
            length = file.tell()
            file.write(table.tobytes())
            file.write(_FOOTER.pack(_MAGIC, count, length, zlib.crc32(table.tobytes())))
            # not fsync: what a crash of the machine damages is found by its checksums
            file.flush()
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(part: Path, path: Path) -> Iterator[IO[bytes] | None]:
    """Holds the empty file `part` for writing; None when `path` has appeared meanwhile."""
    began, seen, told = time.monotonic(), -1, False
    while True:
        with part.open("ab") as file:
            if not _lock(file, fcntl.LOCK_EX):
                if (size := os.fstat(file.fileno()).st_size) != seen:
                    began, seen = time.monotonic(), size
                if time.monotonic() - began > PATIENCE:
                    raise OSError(errno.EBUSY, "another process began them and does not go on")
                if not told:
                    print("waiting for another process that decodes the same images", file=sys.stderr, flush=True)
                    told = True
                time.sleep(0.1)
                continue
            if not _is_at(file, part):
                continue  # renamed or removed by who held it
            if path.exists():
                part.unlink(missing_ok=True)
                yield None
                return
            file.truncate(0)
            yield file
            return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], kind: int) -> bool:
    """Whether the open file is held now; also on file systems without locks, where nothing guards it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def make_room(folder: Path, need: int, limit: int) -> None:
    """Removes stores that no process has open, least recently used first, until `need` more bytes are allowed.

    OSError, before anything is removed, when even that is not enough for `limit` (all stores, bytes) or for the disk.
    """
    files = []
    for path in (*folder.glob("*" + _SUFFIX), *folder.glob("*" + _PART)):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            # what a killed process left goes first
            files.append((path.name.endswith(_SUFFIX), stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for *_, size, _ in files)
    excess = max(total + need - limit, need + RESERVE - shutil.disk_usage(folder).free)
    with contextlib.ExitStack() as held:
        idle = []
        for _, _, size, path in sorted(files):
            if excess <= 0:
                break
            with contextlib.suppress(FileNotFoundError):
                file = held.enter_context(path.open("rb"))
                if _lock(file, fcntl.LOCK_EX):
                    idle.append(path)
                    excess -= size
        if excess > 0:
            raise OSError(
                errno.ENOSPC,
                f"{need / GIB:.1f} GiB are needed and {max(0, need - excess) / GIB:.1f} GiB are free or allowed "
                "(input.cache_gib)",
            )
        for path in idle:
            path.unlink(missing_ok=True)
