"""One file per data set family; a data set registers itself with `@register_dataset` in its own file.

As with methods, the index is read from the files' text: nothing is imported to list what there is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.registry import Entry, Plugin, find, is_file, module_of, registered


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set says of itself, known without importing it."""

    name: str
    domain: str
    summary: str
    module: str
    class_name: str
    needs_prepare: bool = False
    #: None: built in
    plugin: Plugin | None = None

    @property
    def reference(self) -> str:
        """What finds it again, in any process."""
        return self.name if self.plugin is None else self.plugin.reference


def _info(entry: Entry) -> DatasetInfo:
    return DatasetInfo(entry.name, module=entry.module, class_name=entry.class_name, plugin=entry.plugin, **entry.given)


@functools.lru_cache(maxsize=1)
def available_datasets() -> dict[str, DatasetInfo]:
    """All registered data sets by name, those of installed packages too; UserError for a name registered twice."""
    return registered(Path(__file__).parent, __name__, "register_dataset", _info)


def dataset_info(reference: str, domain: str | None = None) -> DatasetInfo:
    """The data set called so, or that of FILE.py or FILE.py:NAME; UserError when unknown or of another domain."""
    known = available_datasets()
    if not is_file(reference):
        known = {name: info for name, info in known.items() if domain in (None, info.domain)}
    info = find(reference, known, "register_dataset", _info, "data.name=")
    if domain not in (None, info.domain):
        raise UserError(f"data set {info.name!r} is of the domain {info.domain!r}, not of {domain!r}")
    return info


def dataset_class(reference: str, domain: str | None = None) -> Any:
    """The class that `dataset_info` finds (`.Config`, `.load(config)`, `.prepare(...)`)."""
    info = dataset_info(reference, domain)
    return getattr(module_of(info.module, info.plugin), info.class_name)
