"""Forks `dualcl` commands from one process that has imported everything, and does to each the harm it is told to.

One JSON request per line on stdin, one JSON answer per line on stdout (see `main`). What a command does to the files
below its `roots` is counted, from 0: opening for writing, writing, syncing, renaming, removing, making a folder; so are
optimiser steps and evaluations. These are the sites. `Harm` strikes at a site by its number, which makes it exactly
repeatable.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import dualcl.benchmark.core.compat

# isort: split
import matplotlib.pyplot
import pandas  # noqa: F401
import safetensors.torch  # noqa: F401

import dualcl.benchmark.runs.folder
import dualcl.results.report
from dualcl.benchmark.cli import main as dualcl_main
from dualcl.benchmark.config.presets import load_preset
from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.domains.customization import Customization
from dualcl.benchmark.runs.runner import Run
from dualcl.datasets import available_datasets, dataset_class
from dualcl.methods import available_methods, method_class

#: audit events -> site, and the argument that holds the file descriptor of the folder a path is relative to
AUDITED = {"os.rename": ("rename", 3), "os.remove": ("remove", 1), "os.rmdir": ("remove", 1), "os.mkdir": ("mkdir", 2)}
#: what no longer works on a full disk, on a failing one, and on one that takes no writing at all
REFUSED = {
    errno.ENOSPC: ("open", "write", "fsync", "mkdir"),
    errno.EIO: ("write", "fsync"),
    errno.EROFS: ("open", "write", "fsync", "mkdir", "rename", "remove"),
}
_real_open, _real_fsync = io.open, os.fsync


class Harm:
    """Counts sites below `roots`, writes them to `trace`, and strikes at site `at`.

    `what`: kill; term, int, hup (a signal); or the name of an error, which is then raised by this site and by all later
    ones that such a disk refuses. Of what is being written at that moment, half is on the disk.
    """

    def __init__(self, roots: list[str], what: str, at: int, trace: str | None) -> None:
        self.roots = tuple(roots)
        self.what, self.at = what, at
        self.code = getattr(errno, what, None)
        self.count = 0
        self.busy = False
        self.trace = None if trace is None else _real_open(trace, "w", encoding="utf-8")

    def covers(self, path: object) -> bool:
        """Whether `path` lies below one of the roots."""
        return isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(self.roots)

    def site(self, name: str, path: str, half: Callable[[], object] = lambda: None) -> None:
        """A site is reached; `half` does half of the work."""
        if self.busy:
            return
        self.busy = True
        try:
            if self.trace is not None:
                self.trace.write(json.dumps([self.count, name, path]) + "\n")
            number, self.count = self.count, self.count + 1
            if self.code is not None and number >= self.at and name in REFUSED[self.code]:
                if number == self.at:
                    half()
                raise OSError(self.code, os.strerror(self.code), *([] if name in ("write", "fsync") else [path]))
            if self.code is None and number == self.at:
                if self.what == "kill":
                    half()
                os.kill(os.getpid(), getattr(signal, f"SIG{self.what.upper()}"))
        finally:
            self.busy = False

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """The audit hook: file system calls that tell of themselves."""
        if event == "open":
            path, _, flags = args
            if flags & (os.O_WRONLY | os.O_RDWR) and self.covers(path):
                self.site("open", os.fsdecode(path))
        elif event in AUDITED:
            name, place = AUDITED[event]
            path, folder = args[1 if name == "rename" else 0], args[place]
            if isinstance(folder, int) and folder >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
            if self.covers(path):
                self.site(name, os.fsdecode(path))

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        """`open` whose writing passes by here."""
        if not (set(mode) & set("wax+") and self.covers(file)):
            return _real_open(file, mode, buffering, *args, **kwargs)
        raw = _Written(self, os.fspath(file), mode.replace("b", "").replace("t", ""))
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

    def fsync(self, handle: int) -> None:
        """`os.fsync` but for the waiting: a killed process, unlike a power cut, leaves what it wrote."""
        path = os.readlink(f"/proc/self/fd/{handle}")
        if self.covers(path):
            self.site("fsync", path)

    def install(self) -> None:
        """Puts all this in place, for the rest of the process."""
        sys.addaudithook(self.audit)
        builtins.open = io.open = self.open  # type: ignore[assignment]
        os.fsync = self.fsync  # type: ignore[assignment]
        for owner, method in ((Run, "step"), (Classification, "evaluate"), (Customization, "evaluate")):
            setattr(owner, method, self._told(method, getattr(owner, method)))

    def _told(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def told(*args: Any, **kwargs: Any) -> Any:
            self.site(name, "begin")
            out = method(*args, **kwargs)
            self.site(name, "end")
            return out

        return told


class _Written(io.FileIO):
    """A file whose `write` is a site."""

    def __init__(self, harm: Harm, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self.harm = harm

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self.harm.site("write", str(self.name), lambda: super(_Written, self).write(view[: len(view) // 2]))
        return super().write(data)


def set_clocks(wall: list[float], steady: list[float]) -> None:
    """Clocks that jump by the next number of seconds at every fifth look, over and over; empty: they go right."""

    def jumping(real: Callable[[], float], jumps: list[float]) -> Callable[[], float]:
        looks, offset = 0, 0.0

        def told() -> float:
            nonlocal looks, offset
            looks += 1
            if looks % 5 == 0:
                offset += jumps[looks // 5 % len(jumps)]
            return real() + offset

        return told

    if wall:
        time.time = jumping(time.time, wall)
        start = time.time()

        class Jumping(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.now(tz) + timedelta(seconds=time.time() - start)

        dualcl.benchmark.runs.folder.datetime = Jumping  # type: ignore[misc]
    if steady:
        time.perf_counter, time.monotonic = jumping(time.perf_counter, steady), jumping(time.monotonic, steady)


def begin(request: dict[str, Any]) -> int:
    """Forks a command in a session of its own; its process id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    told = os.open(request["told"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(told, stream)
    os.environ.update(request["environment"])
    harm = Harm(request["roots"], request["what"], request["at"], request["trace"])
    harm.install()
    set_clocks(request["wall"], request["steady"])
    if request["gate"] is not None:  # all that wait at a gate start together
        while not os.path.exists(request["gate"]):
            time.sleep(0)
    code = dualcl_main(request["argv"])
    if harm.trace is not None:
        harm.trace.close()
    sys.stdout.flush()
    os._exit(code)


def ended(process: int, seconds: float) -> int | None:
    """Exit code of a command, or minus the signal that ended it; None when it is still at work after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.003)


def main() -> None:
    """Answers requests until stdin ends: {"argv": ...} begins a command, {"process": ..., "seconds": ...} waits."""
    for name in available_methods():
        method_class(name)
    for name, info in available_datasets().items():
        dataset_class(name, info.domain)
    for preset in ("glyphs", "glyph-concepts"):
        load_preset(preset)
    matplotlib.pyplot.close("all")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = begin(request) if "argv" in request else ended(request["process"], request["seconds"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
