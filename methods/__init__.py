"""One file per method; a method registers itself with `@register_method` in its own file.

The index is read from the files' text, so that `dualcl list` needs neither torch nor an import of every method.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.registry import Registered, find, registered

if TYPE_CHECKING:
    from dualcl.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class MethodInfo(Registered):
    """What a method says of itself, known without importing it."""

    noun: ClassVar[str] = "method"
    decorator: ClassVar[str] = "register_method"

    domains: tuple[str, ...]
    summary: str
    source: str
    stores_data: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.domains, tuple):
            raise UserError(f"{self.place}: domains must be a tuple of texts, got {self.domains!r}")


@functools.lru_cache(maxsize=1)
def available_methods() -> dict[str, MethodInfo]:
    """All registered methods by name, those of installed packages too; UserError for a name registered twice."""
    return registered(Path(__file__).parent, __name__, MethodInfo)


def method_info(reference: str, domain: str | None = None) -> MethodInfo:
    """The method called so, or that of FILE.py or FILE.py:NAME.

    Raises UserError when it is unknown or does not serve `domain`.
    """
    info = find(reference, available_methods(), MethodInfo)
    if domain is not None and domain not in info.domains:
        serves = ", ".join(info.domains)
        raise UserError(f"method {info.name!r} does not work in the domain {domain!r}; it serves: {serves}")
    return info


def method_class(reference: str) -> type[Method]:
    """Imports and returns the class that `method_info` finds."""
    cls: type[Method] = method_info(reference).load()
    return cls
