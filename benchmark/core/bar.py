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
    """Counts from `initial` to `total` (None: unknown), `size` of them making a `unit`; `update(n)` counts n more.

    It says nothing for `interval` seconds, on a terminal for `wait`; `close` takes it away. `given` goes to tqdm.
    """

    monitor_interval = 0  # a thread, and a run forks
    wait = 0.5

    def __init__(
        self, name: str, total: int | None, unit: str, size: int = 1, interval: float = LINE_SECONDS, **given: Any
    ) -> None:
        self.size, self.moves = size, redraws(given.setdefault("file", sys.stderr))
        every, wait = (BAR_SECONDS, self.wait) if self.moves else (interval, interval)
        shown = "{desc} |{bar}| {facts}" if self.moves else "{desc}: {facts}"
        given |= {"unit": unit, "bar_format": shown, "mininterval": every, "delay": wait}
        super().__init__(desc=name, total=total, miniters=1, position=0, leave=False, **given)

    def eta(self, seconds: float) -> list[str]:
        """The time left when it took `seconds` from `initial` to here; empty before there is one, and at the end."""
        done, left = self.n - self.initial, (self.total or 0) - self.n
        return [f"ETA {duration(left * seconds / done)}"] if done > 0 and left > 0 else []

    def facts(self, seconds: float) -> list[str]:
        """What is said beside the bar, `seconds` after it began."""
        of = f" of {self.total / self.size:.0f}" if self.total else ""
        share = f" ({100 * self.n / self.total:.0f}%)" if self.total else ""
        speed = (self.n - self.initial) / self.size / max(seconds, 1e-9)
        return [f"{self.n / self.size:.0f}{of} {self.unit}{share}", *self.eta(seconds), f"{speed:.1f} {self.unit}/s"]

    @property
    def format_dict(self) -> dict[str, Any]:
        """As tqdm's; the name gives way before the facts do."""
        told = super().format_dict
        told |= {"facts": ", ".join(self.facts(told["elapsed"])), "ncols": None}
        if self.moves:
            told["ncols"] = shutil.get_terminal_size().columns - 1
            told["prefix"] = self.desc[: max(0, told["ncols"] - len(told["facts"]) - 12)]
        return told

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """As tqdm's; a line where nothing can be written over."""
        if self.moves:
            return bool(super().display(msg, pos))
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False


Bar.set_lock(threading.RLock())  # not one between processes: forked ones write nothing
