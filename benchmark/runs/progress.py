"""Progress on stderr: a bar per task on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from typing import TextIO

from dualcl.benchmark.core.machine import resident_peak_mib
from dualcl.benchmark.core.text import duration, printable

_BAR_SECONDS = 0.1
_WRITE = threading.Lock()  # lines of parallel runs must not interleave


def peak_mib() -> float | None:
    """Peak memory of this process in MiB: of the CUDA device when one is in use, else resident; None where unknown."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return resident_peak_mib()


class Reporter:
    """Tells how a run goes. `prefix` (method and seed) opens every line; `quiet` says nothing at all.

    A terminal that can overwrite a line gets one bar per task with loss, ETA and memory; anything else gets a plain
    line every `interval` seconds. Colour only on a terminal, and never with NO_COLOR set.
    """

    def __init__(
        self, prefix: str = "", *, quiet: bool = False, stream: TextIO | None = None, interval: float = 5.0
    ) -> None:
        self.prefix = printable(prefix)
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream
        self.interval = interval
        terminal = self.stream.isatty() and os.environ.get("TERM", "") != "dumb"
        self.overwrites = terminal
        self.coloured = terminal and not os.environ.get("NO_COLOR")
        encoding = getattr(self.stream, "encoding", None) or "ascii"
        try:
            "█░".encode(encoding)
            self._cells = ("█", "░")
        except (UnicodeEncodeError, LookupError):
            self._cells = ("#", "-")
        self._open = False
        self._title, self._steps = "", 0
        self._started = self._shown = 0.0
        self._first: tuple[int, float] | None = None

    def begin_task(self, index: int | None, total: int, name: str, steps: int) -> None:
        """Starts task `index` (0-based; None: all tasks at once) of `total`, with `steps` optimiser steps in all."""
        which = f"all {total} tasks" if index is None else f"task {index + 1}/{total}"
        self._title = f"{which} ({printable(name)})" if name else which
        self._steps = steps
        self._first = None
        self._started = self._shown = time.monotonic()
        if steps and not self.overwrites:
            self._line(f"{self._title}: {steps} steps")

    def step(self, step: int, loss: float) -> None:
        """`step` optimiser steps of the task are done; the last one had this loss."""
        if self.quiet:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)  # a resumed task starts in the middle: the ETA counts from here
        wait = _BAR_SECONDS if self.overwrites else self.interval
        if now - self._shown < wait and not (self.overwrites and step >= self._steps):
            return
        self._shown = now
        parts = [f"{step}/{self._steps}", f"loss {loss:.3f}"]
        done = step - self._first[0]
        if done > 0 and step < self._steps:
            parts.append(f"ETA {duration((self._steps - step) * (now - self._first[1]) / done)}")
        if (memory := peak_mib()) is not None:
            parts.append(f"{memory:.0f} MiB")
        if self.overwrites:
            self._bar(step, "  ".join(parts))
        else:
            self._line(f"{self._title}: {', '.join(parts)}")

    def end_task(self, summary: str) -> None:
        """Ends the task with one lasting line."""
        self._line(f"{self._title}: {printable(summary)} [{duration(time.monotonic() - self._started)}]", colour="32")

    def note(self, text: str) -> None:
        """One lasting line."""
        self._line(printable(text))

    def warn(self, text: str) -> None:
        """One lasting line that `quiet` does not keep back."""
        quiet, self.quiet = self.quiet, False
        self._line(printable(text))
        self.quiet = quiet

    def close(self) -> None:
        """Leaves the cursor at the start of an empty line."""
        if self._open:
            self._open = False
            self._write("\r\x1b[K")

    def _bar(self, step: int, facts: str) -> None:
        columns = shutil.get_terminal_size().columns
        head = f"{self.prefix}  {self._title}" if self.prefix else self._title
        room = columns - len(head) - len(facts) - 5
        if room < 8:  # the title gives way first
            head, room = head[: max(0, columns - len(facts) - 13)], 8
        width = min(room, 30)
        full = round(width * min(step, self._steps) / max(1, self._steps))
        bar = self._cells[0] * full + self._cells[1] * (width - full)
        text = f"{head}  {bar}  {facts}"[: columns - 1]
        self._open = True
        self._write(f"\r{text}\x1b[K")

    def _line(self, text: str, colour: str = "") -> None:
        if self.quiet:
            return
        self.close()
        line = f"{self.prefix}  {text}" if self.prefix else text
        if colour and self.coloured:
            line = f"\x1b[{colour}m{line}\x1b[0m"
        self._write(line + "\n")

    def _write(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            with _WRITE:
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
                self.stream.flush()
        except OSError:  # its reader has gone, or a full disk: no reason to stop a run
            self.quiet = True
