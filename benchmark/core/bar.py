"""How far something is: a bar that moves on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from typing import Any

from tqdm import tqdm

from dualcl.benchmark.core.text import duration

#: seconds between two looks of a bar, and between two lines
BAR_SECONDS, LINE_SECONDS = 0.1, 5.0


def redraws(stream: Any) -> bool:
    """Whether what stands on `stream` can be written over."""
    return bool(stream.isatty()) and os.environ.get("TERM", "") != "dumb"


class Bar(tqdm):
    """Counts from `start` to `total` (None: unknown), `size` of them making a `unit`; `update(n)` counts n more.

    It says nothing for `interval` seconds, on a terminal for `wait`; `close` takes it away.
    """

    monitor_interval = 0  # a thread, and a run forks

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        start: int = 0,
        size: int = 1,
        stream: Any = None,
        interval: float = LINE_SECONDS,
        wait: float = 0.5,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self.size, self.moves = size, redraws(stream)
        super().__init__(
            desc=name,
            total=total,
            initial=start,
            unit=unit,
            file=stream,
            leave=False,
            position=0,
            miniters=1,
            mininterval=BAR_SECONDS if self.moves else interval,
            delay=wait if self.moves else interval,
            bar_format="{desc} |{bar}| {facts}" if self.moves else "{desc}: {facts}",
        )

    def eta(self, seconds: float) -> list[str]:
        """The time left when it took `seconds` from `start` to here; empty before there is one, and at the end."""
        done = self.n - self.initial
        if done <= 0 or self.total is None or self.n >= self.total:
            return []
        return [f"ETA {duration((self.total - self.n) * seconds / done)}"]

    def facts(self, seconds: float) -> list[str]:
        """What is said beside the bar, `seconds` after it began."""
        of = "" if self.total is None else f" of {self.total / self.size:.0f}"
        share = f" ({100 * self.n / self.total:.0f}%)" if self.total else ""
        speed = (self.n - self.initial) / self.size / max(seconds, 1e-9)
        return [f"{self.n / self.size:.0f}{of} {self.unit}{share}", *self.eta(seconds), f"{speed:.1f} {self.unit}/s"]

    @property
    def format_dict(self) -> dict[str, Any]:
        """As tqdm's; the name gives way before the facts do."""
        told = super().format_dict
        told["facts"] = ", ".join(self.facts(told["elapsed"]))
        if not self.moves:
            return {**told, "ncols": None}
        columns = shutil.get_terminal_size().columns
        return {**told, "ncols": columns - 1, "prefix": self.desc[: max(0, columns - len(told["facts"]) - 13)]}

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """As tqdm's; a line where nothing can be written over."""
        if self.moves:
            return bool(super().display(msg, pos))
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False


Bar.set_lock(threading.RLock())  # not one between processes: forked ones write nothing
