"""One file per method; a method registers itself with `@register_method` in its own file.

The index is read from the files' text, so that `dualcl list` needs neither torch nor an import of every method.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.registry import registered

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


@functools.lru_cache(maxsize=1)
def available_methods() -> dict[str, MethodInfo]:
    """All registered methods by name; a name registered twice raises ValueError."""
    return {
        name: MethodInfo(name=name, module=f"{__name__}.{stem}", **given)
        for name, stem, _, given in registered(Path(__file__).parent, "register_method")
    }


def method_info(name: str, domain: str | None = None) -> MethodInfo:
    """The method called `name`; raises UserError when it is unknown or does not serve `domain`."""
    methods = available_methods()
    if name not in methods:
        raise UserError(f"unknown method {name!r}; {nearest(name, methods, 'methods')}")
    info = methods[name]
    if domain is not None and domain not in info.domains:
        raise UserError(f"method {name!r} does not work in the domain {domain!r}; it serves: {', '.join(info.domains)}")
    return info


def method_class(name: str) -> type[Method]:
    """Imports and returns the class registered under `name`."""
    module = importlib.import_module(method_info(name).module)
    for value in vars(module).values():
        if isinstance(value, type) and vars(value).get("name") == name:
            return value
    raise ValueError(f"{module.__name__} declares {name!r} but registers no such class")
