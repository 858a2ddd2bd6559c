"""The one place that imports by name: what few reports need and is slow to import (pandas, matplotlib, scipy)."""

import importlib
from typing import Any


def late(name: str) -> Any:
    """The module `name` of this package."""
    return importlib.import_module(f"{__package__}.{name}")
