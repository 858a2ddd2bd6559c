"""Archives, unpacked safely: nothing leaves the folder, and no more comes out than was allowed."""

from __future__ import annotations

import errno
import functools
import gzip
import io
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from dualcl.benchmark.core.errors import UserError
from dualcl.datasets.reading.download import CHUNK, MIB

#: an archive that grows by more is a bomb: images hardly shrink, deflate can reach a thousand
MAX_RATIO = 100
#: what a small archive may grow to whatever its ratio, and what one member's header and padding may take
SLACK, PER_MEMBER = MIB, 8192
#: no header of an archive's member is longer, though tarfile would read any into memory at once
MAX_HEADER = 16 * MIB


@dataclass(frozen=True)
class _Member:
    """An entry of an archive; `open` reads a file of `size` bytes."""

    name: str
    is_folder: bool
    is_file: bool
    size: int
    open: Callable[[], IO[bytes] | None]


#: of an archive, of which no more than so many unpacked bytes are read where sizes are not known before
_Members = Callable[[Path, int], Iterator[_Member]]

#: what the readers of archives raise on damaged or unusual ones
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    LookupError,  # a name without letters
    ArithmeticError,
    TypeError,
    RuntimeError,  # encrypted; NotImplementedError: packed in a way that Python cannot read
)


def extract_tar(archive: Path, folder: Path, *, max_bytes: int, max_files: int) -> None:
    """Unpacks regular files of a tar archive, plain or gzipped, into `folder`, which appears only when all is there.

    Raises UserError when a member is a link or a device, would leave the folder or comes twice, or when sizes, counts
    (of files, and of folders), or the growth by more than MAX_RATIO exceed the limits; nothing is left behind then.
    """
    _unpack(archive, folder, _tar_members, max_bytes, max_files)


def extract_zip(archive: Path, folder: Path, *, max_bytes: int, max_files: int) -> None:
    """Unpacks regular files of a zip archive into `folder`; safe as `extract_tar`, and with the same errors."""
    _unpack(archive, folder, _zip_members, max_bytes, max_files)


class _Bounded(io.RawIOBase):
    """A stream that ends with an error: after `left` bytes, or when asked for a header too long for memory."""

    def __init__(self, stream: IO[bytes], left: int) -> None:
        self.stream, self.left = stream, left

    def read(self, size: int = -1) -> bytes:
        """As a file's; ValueError beyond the limits."""
        if not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header of {size} bytes")
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("it unpacks to more than its limits allow")
        return data

    def tell(self) -> int:
        """As a file's."""
        return self.stream.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        """As a file's; what is jumped over counts."""
        before = self.stream.tell()
        after = self.stream.seek(offset, whence)
        self.left -= max(after - before, 0)
        if self.left < 0:
            raise ValueError("it unpacks to more than its limits allow")
        return after


def _tar_members(archive: Path, max_stream: int) -> Iterator[_Member]:
    # not tarfile's own opening: it would read headers of any length, and xz with dictionaries of any size
    with archive.open("rb") as packed:
        gzipped = packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        stream = cast("IO[bytes]", gzip.GzipFile(fileobj=packed)) if gzipped else packed
        bounded = _Bounded(stream, max_stream)
        with tarfile.open(fileobj=cast("IO[bytes]", bounded), mode="r:") as tar:
            for member in tar:
                opened = functools.partial(tar.extractfile, member)
                yield _Member(member.name, member.isdir(), member.isreg(), member.size, opened)
        # the sum of a compressed archive stands at its end, which nothing has read so far
        while bounded.read(CHUNK):
            pass


def _zip_members(archive: Path, max_stream: int) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as packed:
        for info in packed.infolist():
            if info.compress_type == zipfile.ZIP_LZMA:  # takes as much memory as the archive says
                raise NotImplementedError("that compression method is not supported: LZMA")
            # 0 where the packer knew no Unix modes
            mode = stat.S_IFMT(info.external_attr >> 16)
            is_file = not info.is_dir() and mode in (0, stat.S_IFREG)
            # a reader never gives more than `file_size` bytes, whatever is packed
            opened = functools.partial(packed.open, info)
            yield _Member(info.filename, info.is_dir(), is_file, info.file_size, opened)


def _unpack(archive: Path, folder: Path, members: _Members, max_bytes: int, max_files: int) -> None:
    partial = folder.with_name(folder.name + ".unpacking")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(archive, partial, members, max_bytes, max_files)
        os.replace(partial, folder)
    except _DAMAGED as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{archive} is damaged ({why}); remove it and run again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full at {folder.parent}; free some space and run again") from error
        raise UserError(f"cannot unpack {archive} to {folder} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(archive: Path, folder: Path, members: _Members, max_bytes: int, max_files: int) -> None:
    size = files = folders = 0
    growth = MAX_RATIO * archive.stat().st_size + SLACK
    for member in members(archive, max_bytes + 2 * max_files * PER_MEMBER + SLACK):
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name:
            raise UserError(f"{archive} holds {member.name!r}, which would leave the folder; not unpacked")
        if not member.is_file and not member.is_folder:
            raise UserError(f"{archive} holds {member.name!r}, which is no regular file; not unpacked")
        size, files, folders = size + member.size, files + member.is_file, folders + member.is_folder
        if size > max_bytes or files > max_files or folders > max_files:
            raise UserError(f"{archive} holds more than {max_files} files or {max_bytes} bytes; not unpacked")
        if size > growth:
            raise UserError(f"{archive} unpacks to more than {MAX_RATIO} times its size; not unpacked")
        target = folder.joinpath(*name.parts)
        if member.is_folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        source = member.open()
        assert source is not None
        target.parent.mkdir(parents=True, exist_ok=True)
        with source, target.open("xb") as file:
            shutil.copyfileobj(source, file, CHUNK)
