"""Progress on stderr: a bar per task on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from dualcl.benchmark.core.bar import LINE_SECONDS, Bar, redraws
from dualcl.benchmark.core.machine import resident_peak_mib
from dualcl.benchmark.core.text import duration, printable


def peak_mib() -> float | None:
    """Peak memory of this process in MiB: of the CUDA device when one is in use, else resident; None where unknown."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return resident_peak_mib()


class _Steps(Bar):
    """The optimiser steps of a task."""

    wait = 0.0

    def __init__(self, loss: float, *given: Any, **more: Any) -> None:
        self.loss = loss
        super().__init__(*given, **more)

    def facts(self, seconds: float) -> list[str]:
        """Loss, ETA and memory."""
        return [f"{self.n}/{self.total}", f"loss {self.loss:.3f}", *self.eta(seconds), f"{peak_mib():.0f} MiB"]


class Reporter:
    """Tells how a run goes. `prefix` (method and seed) opens every line; `quiet` says nothing at all.

    A terminal that can overwrite a line gets one bar per task with loss, ETA and memory; anything else gets a plain
    line every `interval` seconds. Colour only on a terminal, and never with NO_COLOR set.
    """

    def __init__(
        self, prefix: str = "", *, quiet: bool = False, stream: TextIO | None = None, interval: float = LINE_SECONDS
    ) -> None:
        self.prefix = printable(prefix)
        self.quiet = quiet
        self.stream = sys.stderr if stream is None else stream
        self.encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.interval = interval
        self.coloured = redraws(self.stream) and not os.environ.get("NO_COLOR")
        self._bar: _Steps | None = None
        self._title, self._steps, self._started = "", 0, 0.0

    def begin_task(self, index: int | None, total: int, name: str, steps: int) -> None:
        """Starts task `index` (0-based; None: all tasks at once) of `total`, with `steps` optimiser steps in all."""
        self.close()
        which = f"all {total} tasks" if index is None else f"task {index + 1}/{total}"
        self._title = f"{which} ({printable(name)})" if name else which
        self._steps, self._started = steps, time.monotonic()
        if steps and not redraws(self.stream):
            self._line(f"{self._title}: {steps} steps")

    def step(self, step: int, loss: float) -> None:
        """`step` optimiser steps of the task are done; the last one had this loss."""
        if self.quiet:
            return
        if self._bar is None:  # a resumed task starts in the middle: the ETA counts from here
            name, interval = self._prefixed(self._title), self.interval
            self._bar = _Steps(loss, name, self._steps, "steps", interval=interval, initial=step, file=self)
        self._bar.loss = loss
        self._bar.update(step - self._bar.n)
        if self._bar.moves and step >= self._steps:
            self._bar.refresh()

    def end_task(self, summary: str) -> None:
        """Ends the task with one lasting line."""
        self.close()
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
        """Takes the bar away; the cursor is at the start of an empty line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _prefixed(self, text: str) -> str:
        return f"{self.prefix}  {text}" if self.prefix else text

    def _line(self, text: str, colour: str = "") -> None:
        if self.quiet:
            return
        if self._bar is not None and self._bar.moves:
            self._bar.clear()
        line = self._prefixed(text)
        self.write(f"\x1b[{colour}m{line}\x1b[0m\n" if colour and self.coloured else f"{line}\n")

    def write(self, text: str) -> None:
        """To the stream, whatever its encoding lacks; its reader may have gone, which is no reason to stop a run."""
        try:
            with Bar.get_lock():  # lines of parallel runs must not interleave
                self.stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
                self.stream.flush()
        except OSError:
            self.quiet = True

    def flush(self) -> None:
        """Every `write` has done so."""

    def isatty(self) -> bool:
        """Of the stream."""
        return self.stream.isatty()
