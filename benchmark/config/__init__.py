"""Presets and what a command line makes of them: the resolved configuration of a run."""

from dualcl.benchmark.config.presets import Preset, bundled_presets, load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.settings import Resolved, flatten, parse_assignment

__all__ = ["Preset", "Resolved", "bundled_presets", "flatten", "load_preset", "parse_assignment", "resolve"]
