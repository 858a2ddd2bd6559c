"""What a run reads from files, by content: the part that all domains share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.domain import Contents
from dualcl.benchmark.core.settings import Resolved
from dualcl.datasets import dataset_class
from dualcl.datasets.reading.content import pictures, words


def data_contents(resolved: Resolved, domain: str, data: Any = None) -> Contents:
    """Of the data set, which is loaded when first asked for unless it is given; empty for one that is drawn."""
    config = resolved.sections["data"]
    root = getattr(config, "root", None)
    if root is None and "data" not in resolved.plugins:
        return {}  # its configuration says all of it
    if root is not None and not Path(root).expanduser().is_dir():
        return {}

    @functools.cache
    def loaded() -> Any:
        return dataset_class(resolved.data_reference, domain).load(config) if data is None else data

    return {"data": lambda: pictures(loaded())[0], "words": lambda: words(loaded())}
