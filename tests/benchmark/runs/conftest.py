"""What tests of runs share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dualcl.benchmark.runs.progress import Reporter


class Stopping(Reporter):
    """Interrupts the run after its `at`-th step, and keeps what it is told."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__(quiet=True)
        self.left, self.notes = at, list[str]()

    def step(self, step: int, loss: float) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        super().step(step, loss)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="session")
def stopping() -> Callable[..., Stopping]:
    """stopping(at) -> a Reporter that interrupts its run after the `at`-th step; stopping(): never."""
    return Stopping
