"""The decorator by which a data set registers itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", bound=type)


def register_dataset(name: str, *, domain: str, summary: str, needs_prepare: bool = False) -> Callable[[T], T]:
    """Registers a data set class; arguments must be literals (the index is read without importing).

    The class has `Config` (a frozen dataclass, the keys below `data.`), `load(config)` (a classmethod: ClassData, or
    ConceptData in customization) and, with `needs_prepare`, `prepare(config)` (a classmethod: downloads, verifies,
    splits).
    """

    def apply(cls: T) -> T:
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return apply
