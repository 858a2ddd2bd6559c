"""One file per data set family; a data set registers itself with `@register_dataset` in its own file.

As with methods, the index is read from the files' text: nothing is imported to list what there is.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.registry import registered


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set says of itself, known without importing it."""

    name: str
    domain: str
    summary: str
    module: str
    class_name: str
    needs_prepare: bool = False


@functools.lru_cache(maxsize=1)
def available_datasets() -> dict[str, DatasetInfo]:
    """All registered data sets by name."""
    return {
        name: DatasetInfo(name=name, module=f"{__name__}.{stem}", class_name=class_name, **given)
        for name, stem, class_name, given in registered(Path(__file__).parent, "register_dataset")
    }


def dataset_class(name: str, domain: str | None = None) -> Any:
    """The data set class called `name` (`.Config`, `.load(config)`, `.prepare(...)`); UserError when unknown."""
    known = {n: i for n, i in available_datasets().items() if domain is None or i.domain == domain}
    if name not in known:
        raise UserError(f"unknown data set data.name={name!r}; {nearest(name, known, 'data sets')}")
    info = known[name]
    return getattr(importlib.import_module(info.module), info.class_name)
