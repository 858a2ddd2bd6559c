"""One file per data set family; a data set registers itself with `@register_dataset` in its own file.

As with methods, the index is read from the files' text: nothing is imported to list what there is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.registry import Registered, find, is_file, registered


@dataclass(frozen=True, kw_only=True)
class DatasetInfo(Registered):
    """What a data set says of itself, known without importing it."""

    noun: ClassVar[str] = "data set"
    decorator: ClassVar[str] = "register_dataset"

    domain: str
    summary: str
    needs_prepare: bool = False
    #: False: shown by `dualcl list --all` alone
    listed: bool = True


@functools.lru_cache(maxsize=1)
def available_datasets() -> dict[str, DatasetInfo]:
    """All registered data sets by name, those of installed packages too; UserError for a name registered twice."""
    return registered(Path(__file__).parent, __name__, DatasetInfo)


def dataset_info(reference: str, domain: str | None = None) -> DatasetInfo:
    """The data set called so, or that of FILE.py or FILE.py:NAME; UserError when unknown or of another domain."""
    known = available_datasets()
    if not is_file(reference):
        known = {name: info for name, info in known.items() if domain in (None, info.domain)}
    info = find(reference, known, DatasetInfo, "data.name=")
    if domain not in (None, info.domain):
        raise UserError(f"data set {info.name!r} is of the domain {info.domain!r}, not of {domain!r}")
    return info


def dataset_class(reference: str, domain: str | None = None) -> Any:
    """The class that `dataset_info` finds (`.Config`, `.load(config)`, `.prepare(...)`)."""
    return dataset_info(reference, domain).load()
