"""One file per method; a method registers itself with `@register_method` in its own file.

The index is read from the files' text, so that `dualcl list` needs neither torch nor an import of every method.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.registry import Entry, Plugin, find, module_of, registered

if TYPE_CHECKING:
    from dualcl.methods.base import Method


@dataclass(frozen=True)
class MethodInfo:
    """What a method says of itself, known without importing it."""

    name: str
    domains: tuple[str, ...]
    summary: str
    source: str
    module: str
    stores_data: bool = False
    #: None: built in
    plugin: Plugin | None = None

    @property
    def reference(self) -> str:
        """What finds it again, in any process."""
        return self.name if self.plugin is None else self.plugin.reference


def _info(entry: Entry) -> MethodInfo:
    return MethodInfo(name=entry.name, module=entry.module, plugin=entry.plugin, **entry.given)


@functools.lru_cache(maxsize=1)
def available_methods() -> dict[str, MethodInfo]:
    """All registered methods by name, those of installed packages too; UserError for a name registered twice."""
    return registered(Path(__file__).parent, __name__, "register_method", _info)


def method_info(reference: str, domain: str | None = None) -> MethodInfo:
    """The method called so, or that of FILE.py or FILE.py:NAME.

    Raises UserError when it is unknown or does not serve `domain`.
    """
    info = find(reference, available_methods(), "register_method", _info)
    if domain is not None and domain not in info.domains:
        serves = ", ".join(info.domains)
        raise UserError(f"method {info.name!r} does not work in the domain {domain!r}; it serves: {serves}")
    return info


def method_class(reference: str) -> type[Method]:
    """Imports and returns the class that `method_info` finds."""
    info = method_info(reference)
    module = module_of(info.module, info.plugin)
    for value in vars(module).values():
        if isinstance(value, type) and vars(value).get("name") == info.name:
            return value
    raise UserError(f"{module.__file__} says that it registers {info.name!r} but does not; use register_method there")
