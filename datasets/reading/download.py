"""Downloads that resume, are checked, and say in one line what to do when they cannot go on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from dualcl.benchmark.core.bar import Bar
from dualcl.benchmark.core.errors import UserError

CHUNK = 1 << 20
MIB = 1 << 20


@dataclass(frozen=True)
class Checksum:
    """What a file must hash to; `algorithm` is a hashlib name such as md5 or sha256, or "git" (the id of a blob)."""

    algorithm: str
    digest: str

    def of(self, path: Path) -> str:
        """The hex digest of the file."""
        digest = hashlib.new("sha1" if self.algorithm == "git" else self.algorithm, usedforsecurity=False)
        if self.algorithm == "git":
            digest.update(f"blob {path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def matches(self, path: Path) -> bool:
        """Whether the file is the expected one."""
        return self.of(path) == self.digest


class _Interrupted(Exception):
    """The connection broke or the server is busy: worth another try."""


class _TooLarge(Exception):
    """More bytes come than were allowed."""


def download(
    url: str,
    path: Path,
    checksum: Checksum | None,
    *,
    retries: int = 5,
    timeout: float = 30.0,
    pause: float = 1.0,
    max_bytes: int | None = None,
) -> Path:
    """Fetches `url` to `path` unless it is there, and returns `path`.

    An interrupted download goes on where it stopped (`path`.part), also in a later call; after `retries` tries in a row
    that bring nothing new, waiting `pause`, 2 `pause`, ... seconds, it gives up. Raises UserError when the host cannot
    be reached, the file is not there, the checksum is wrong or there are more than `max_bytes` (the download is
    removed), the disk is full, or another process fetches the file. Without a `checksum` (the source publishes none, or
    makes its archives anew) any complete file will do.
    """
    part = path.with_name(path.name + ".part")
    try:
        if _there(path, checksum):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _held(part, path):
            if _there(path, checksum):  # another process has just finished it
                return path
            _fetch(url, path, part, retries, timeout, pause, max_bytes)
            if checksum is not None and (found := checksum.of(part)) != checksum.digest:
                page = "is a web page, not the file: its" if _is_page(part) else "has the"
                part.unlink()
                raise UserError(
                    f"{url} {page} wrong {checksum.algorithm} ({found}, expected {checksum.digest}), and was removed; "
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


def _there(path: Path, checksum: Checksum | None) -> bool:
    """Whether the file is there; UserError when it is another one."""
    if not path.exists():
        return False
    if checksum is None or checksum.matches(path):
        return True
    raise UserError(
        f"{path} is not the expected file ({checksum.algorithm} {checksum.of(path)}, expected {checksum.digest}); "
        "remove it and run again"
    )


def _lock(file: IO[Any] | int, what: str) -> None:
    """Holds an open file or folder until it is closed; UserError when another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # some network file systems have no locks: better unguarded than unusable
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(f"another process {what}; wait for it and run again") from None


@contextlib.contextmanager
def _held(part: Path, path: Path) -> Iterator[None]:
    """Keeps other processes from writing to `part`, which is removed when nothing has come."""
    with part.open("ab") as file:
        _lock(file, f"is fetching {path}")
        try:
            yield
        finally:
            if _size(part) == 0:
                part.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it; UserError when it cannot be written or another process prepares data there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); choose another data.root") from error
    try:
        _lock(handle, f"prepares data at {folder}")
        yield
    finally:
        os.close(handle)


def _is_page(path: Path) -> bool:
    """Whether a download is HTML: what a server says in words, or a network that wants a login."""
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html"))


def _fetch(url: str, path: Path, part: Path, retries: int, timeout: float, pause: float, max_bytes: int | None) -> None:
    """Fills `part` until the server says it is complete."""
    host = urlsplit(url).hostname or url
    failures = 0
    while True:
        before = _size(part)
        try:
            _fetch_once(url, part, before, timeout, max_bytes)
            return
        except _TooLarge:
            part.unlink()
            raise UserError(
                f"{url} holds more than the {max_bytes} bytes that are allowed, and was removed; fetch it by hand to "
                f"{path} if that is right"
            ) from None
        except urllib.error.HTTPError as error:
            by_hand = f"fetch {url} by hand, put it at {path} and run again"
            # of a redirection without end urllib tells in two lines
            reason = " ".join(str(error.reason).split())
            raise UserError(f"{host} answered {error.code} {reason}; {by_hand}") from error
        except _Interrupted as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures > retries or isinstance(error.__cause__, socket.gaierror):
                by_hand = f"fetch {url} by hand, put it at {path} and run again"
                raise UserError(f"could not reach {host} ({error}); {by_hand}") from error
            time.sleep(pause * 2 ** (failures - 1))


def _fetch_once(url: str, part: Path, have: int, timeout: float, max_bytes: int | None) -> None:
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
        length = (response.headers.get("Content-Length") or "").strip()
        total = have + int(length) if length.isdecimal() else None
        if total is not None and total - have > (free := shutil.disk_usage(part.parent).free):
            raise OSError(errno.ENOSPC, f"{(total - have) / MIB:.0f} MiB are needed, {free / MIB:.0f} MiB are free")
        with part.open("ab" if resumed else "wb") as file:
            _copy(response, file, have, total, part.name.removesuffix(".part"), max_bytes)
            file.flush()
            os.fsync(file.fileno())


def _copy(
    response: http.client.HTTPResponse,
    file: IO[bytes],
    have: int,
    total: int | None,
    name: str,
    max_bytes: int | None,
) -> None:
    with Bar(name, total, "MiB", MIB, initial=have) as bar:
        while True:
            try:
                # what has come by now: a wait for a full chunk would lose it when the server stalls
                chunk = response.read1(CHUNK)
            except (http.client.HTTPException, OSError) as error:
                raise _Interrupted(str(error) or type(error).__name__) from error
            if not chunk:
                break
            have += len(chunk)
            if max_bytes is not None and have > max_bytes:
                raise _TooLarge
            file.write(chunk)
            bar.update(len(chunk))
    if total is not None and have < total:
        raise _Interrupted(f"the connection was cut after {have} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
