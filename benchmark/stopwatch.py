"""Durations that are never negative."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds since it was made; it stands still where the clock goes back, as after the move of a virtual machine."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds = 0.0

    def read(self) -> float:
        """Seconds so far."""
        now = time.perf_counter()
        self._seconds += max(0.0, now - self._last)
        self._last = now
        return self._seconds
