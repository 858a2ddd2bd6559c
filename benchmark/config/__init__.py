"""Presets and what a command line makes of them: the resolved configuration of a run."""

from dualcl.benchmark.config.presets import PRESET_DIR, Preset, bundled_presets, load_preset
from dualcl.benchmark.config.resolve import help_text, own_values, resolve, section_classes
from dualcl.benchmark.core.settings import (
    GeneralConfig,
    Resolved,
    ResourcesConfig,
    TrainConfig,
    coerce,
    flatten,
    parse_assignment,
    positive,
)

__all__ = [
    "PRESET_DIR",
    "GeneralConfig",
    "Preset",
    "Resolved",
    "ResourcesConfig",
    "TrainConfig",
    "bundled_presets",
    "coerce",
    "flatten",
    "help_text",
    "load_preset",
    "own_values",
    "parse_assignment",
    "positive",
    "resolve",
    "section_classes",
]
