"""One process per run folder, on one host and across hosts.

`flock` keeps out the processes of one kernel, and those of other hosts where the network file system passes it on; not
all do. So the holder also writes its name into the locked file and touches that file every BEAT seconds. A process of
another host takes a folder over only when it has seen no beat for PATIENCE seconds of its own clock, as clocks of hosts
and file servers differ; a holder that finds another's name in the file ends at once, without another write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dualcl.benchmark.core.errors import EXIT_FAILED, UserError
from dualcl.benchmark.core.text import printable

LOCK = ".lock"
BEAT = 5.0
PATIENCE = 30.0


@dataclass(frozen=True)
class Holder:
    """Who holds, or held, a folder; `beat`: when the lock file was last touched, by the file system's clock."""

    host: str
    kernel: str
    pid: int
    token: str
    beat: float

    @property
    def alive(self) -> bool:
        """Whether it still holds the folder, as far as one look can tell."""
        return time.time() - self.beat < 2 * PATIENCE and (self.kernel != _kernel() or _exists(self.pid))


#: lock files held by this process
_HELD: set[IO[str]] = set()


def _let_go() -> None:
    """In a forked child: a loader process must not hold the lock on after this one was killed."""
    for handle in _HELD:
        handle.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@functools.lru_cache(maxsize=1)
def _kernel() -> str:
    """Equal for processes that share a kernel and its process numbers (containers share the first alone)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def holder(folder: Path) -> Holder | None:
    """Who holds `folder`, or died while it did; None when nobody says so."""
    try:
        # opening asks a network file system for the file's present times
        with open(folder / LOCK, encoding="utf-8") as handle:
            told, beat = json.loads(handle.read(4096)), os.fstat(handle.fileno()).st_mtime
        return Holder(str(told["host"]), str(told["kernel"]), int(told["pid"]), str(told["token"]), beat)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def hold(folder: Path, *, patient: bool = False) -> Iterator[None]:
    """Makes `folder` and holds it; UserError when it cannot be written, or another process has it and we do not wait.

    `patient`: waits as long as another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
    with handle:
        while not _taken(handle, folder):
            if not patient:
                found = holder(folder)
                who = f" ({found.pid} on {printable(found.host)})" if found else ""
                raise UserError(
                    f"{folder} is in use by another dualcl process{who}; wait for it or choose another --out"
                )
            time.sleep(0.5)
        token, over = uuid.uuid4().hex, threading.Event()
        handle.truncate(0)
        told = {"host": socket.gethostname(), "kernel": _kernel(), "pid": os.getpid(), "token": token}
        handle.write(json.dumps(told))
        handle.flush()
        _HELD.add(handle)
        heart = threading.Thread(target=_beat, args=(folder, token, over), daemon=True, name="dualcl-lease")
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()
            _HELD.discard(handle)
            with contextlib.suppress(OSError):
                handle.truncate(0)


def _taken(handle: IO[str], folder: Path) -> bool:
    """Whether the folder is ours now: its lock was free and no process of another host beats."""
    locks = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        locks = False  # a file system without flock
    first = holder(folder)
    if first is None:
        return True
    if first.kernel == _kernel():
        return locks or not first.alive
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT))
        if (now := holder(folder)) is None:
            return True
        if now != first:
            return False
    return True


def _beat(folder: Path, token: str, over: threading.Event) -> None:
    while not over.wait(BEAT):
        found = holder(folder)
        if found is not None and found.token != token:
            print(f"dualcl: error: {folder} was taken over by {found.host}; this run ends", file=sys.stderr, flush=True)
            os._exit(EXIT_FAILED)  # any further write would be into another's folder
        with contextlib.suppress(OSError):
            os.utime(folder / LOCK)
