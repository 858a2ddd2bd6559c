"""Downloads that resume, are checked, and say in one line what to do when they cannot go on; safe unpacking."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import socket
import sys
import tarfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from dualcl.benchmark.errors import UserError

CHUNK = 1 << 20
MIB = 1 << 20
#: seconds between progress lines where stderr is no terminal
LINE_SECONDS = 5.0


@dataclass(frozen=True)
class Checksum:
    """What a file must hash to; `algorithm` is a hashlib name such as md5 or sha256."""

    algorithm: str
    digest: str

    def of(self, path: Path) -> str:
        """The hex digest of the file."""
        digest = hashlib.new(self.algorithm, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def matches(self, path: Path) -> bool:
        """Whether the file is the expected one."""
        return self.of(path) == self.digest


class _Interrupted(Exception):
    """The connection broke or the server is busy: worth another try."""


def download(
    url: str, path: Path, checksum: Checksum | None, *, retries: int = 5, timeout: float = 30.0, pause: float = 1.0
) -> Path:
    """Fetches `url` to `path` unless it is there, and returns `path`.

    An interrupted download goes on where it stopped (`path`.part), also in a later call; after `retries` tries in a row
    that bring nothing new, waiting `pause`, 2 `pause`, ... seconds, it gives up. Raises UserError when the host cannot
    be reached, the file is not there, the checksum is wrong (the download is removed), or the disk is full. Without a
    `checksum` (the source publishes none, or makes its archives anew) any complete file will do.
    """
    if path.exists():
        if checksum is None or checksum.matches(path):
            return path
        raise UserError(
            f"{path} is not the expected file ({checksum.algorithm} {checksum.of(path)}, expected {checksum.digest}); "
            "remove it and run again"
        )
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, path, part, retries, timeout, pause)
        if checksum is not None and (found := checksum.of(part)) != checksum.digest:
            part.unlink()
            raise UserError(
                f"{url} has the wrong {checksum.algorithm} ({found}, expected {checksum.digest}), and was removed; "
                f"run again, or put the right file at {path}"
            )
        os.replace(part, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full at {path.parent}; free some space and run again (it goes on where it stopped)"
            ) from error
        raise UserError(f"cannot write {path} ({error.strerror or error}); choose another data.root") from error
    return path


def _fetch(url: str, path: Path, part: Path, retries: int, timeout: float, pause: float) -> None:
    """Fills `part` until the server says it is complete."""
    host = urlsplit(url).hostname or url
    failures = 0
    while True:
        before = _size(part)
        try:
            _fetch_once(url, part, before, timeout)
            return
        except urllib.error.HTTPError as error:
            by_hand = f"fetch {url} by hand, put it at {path} and run again"
            raise UserError(f"{host} answered {error.code} {error.reason}; {by_hand}") from error
        except _Interrupted as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures > retries or isinstance(error.__cause__, socket.gaierror):
                by_hand = f"fetch {url} by hand, put it at {path} and run again"
                raise UserError(f"could not reach {host} ({error}); {by_hand}") from error
            time.sleep(pause * 2 ** (failures - 1))


def _fetch_once(url: str, part: Path, have: int, timeout: float) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "dualcl", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            # nothing after what we have: it was complete, and the checksum decides
            return
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Interrupted(f"{error.code} {error.reason}") from error
        raise
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        cause = reason if isinstance(reason, BaseException) else error
        raise _Interrupted(str(reason) or type(reason).__name__) from cause
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        if total is not None and total - have > (free := shutil.disk_usage(part.parent).free):
            raise OSError(errno.ENOSPC, f"{(total - have) / MIB:.0f} MiB are needed, {free / MIB:.0f} MiB are free")
        with part.open("ab" if resumed else "wb") as file:
            _copy(response, file, have, total, part.name.removesuffix(".part"))
            file.flush()
            os.fsync(file.fileno())


def _copy(response: http.client.HTTPResponse, file: IO[bytes], have: int, total: int | None, name: str) -> None:
    progress = Progress(name, total, have)
    try:
        while True:
            try:
                chunk = response.read(CHUNK)
            except (http.client.HTTPException, OSError) as error:
                raise _Interrupted(str(error) or type(error).__name__) from error
            if not chunk:
                break
            file.write(chunk)
            have += len(chunk)
            progress.update(have)
    finally:
        progress.close()
    if total is not None and have < total:
        raise _Interrupted(f"the connection was cut after {have} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class Progress:
    """How far something is, on stderr: one line that moves on a terminal, a line every few seconds elsewhere.

    Counts are in bytes unless `unit` is (how many make one, its name). What is done in a moment says nothing.
    """

    def __init__(self, name: str, total: int | None, start: int = 0, unit: tuple[int, str] = (MIB, "MiB")) -> None:
        self.name, self.total, self.start, self.unit = name, total, start, unit
        self.moving = sys.stderr.isatty()
        self.began = self.shown = time.monotonic()
        self.wrote = False

    def update(self, done: int) -> None:
        """Shows the count so far, not more often than is of use."""
        now = time.monotonic()
        if now - self.shown < (0.5 if self.moving else LINE_SECONDS):
            return
        self.shown, self.wrote = now, True
        size, name = self.unit
        speed = (done - self.start) / max(now - self.began, 1e-9)
        text = f"{self.name}: {done / size:.0f}"
        if self.total:
            left = (self.total - done) / speed if speed else float("inf")
            text += f" of {self.total / size:.0f} {name} ({100 * done / self.total:.0f}%), {left:.0f} s left"
        else:
            text += f" {name}"
        text += f", {speed / size:.1f} {name}/s"
        print(f"\r{text:<78}" if self.moving else text, end="" if self.moving else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the moving line."""
        if self.moving and self.wrote:
            print(file=sys.stderr)


def extract_tar(archive: Path, folder: Path, *, max_bytes: int, max_files: int) -> None:
    """Unpacks regular files of a tar archive into `folder`, which appears only when all is there.

    Raises UserError when a member is a link or a device, would leave the folder, or the sizes in the headers exceed the
    limits; nothing is left behind then.
    """
    partial = folder.with_name(folder.name + ".unpacking")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _extract(archive, partial, max_bytes, max_files)
        os.replace(partial, folder)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it and run again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full at {folder.parent}; free some space and run again") from error
        raise UserError(f"cannot unpack {archive} to {folder} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _extract(archive: Path, folder: Path, max_bytes: int, max_files: int) -> None:
    size = files = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name:
                raise UserError(f"{archive} holds {member.name!r}, which would leave the folder; not unpacked")
            target = folder.joinpath(*name.parts)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            if not member.isreg():
                raise UserError(f"{archive} holds {member.name!r}, which is no regular file; not unpacked")
            size, files = size + member.size, files + 1
            if size > max_bytes or files > max_files:
                raise UserError(f"{archive} holds more than {max_files} files or {max_bytes} bytes; not unpacked")
            source = tar.extractfile(member)
            assert source is not None
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("xb") as file:
                shutil.copyfileobj(source, file, CHUNK)
