"""Importing what takes seconds."""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType


def import_large(name: str) -> ModuleType:
    """The module called `name`, imported without the collector of cycles, which then leaves what it made alone.

    torch, transformers and diffusers make half a million objects that live as long as the process; looking through
    them again and again, while they are made and when the process ends, takes two fifths of its start.
    """
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        module = importlib.import_module(name)
        gc.freeze()
    finally:
        gc.enable()
    return module
