"""Which pictographs and which renditions a network is pretrained on, and which only the stream shows. No model code."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from dualcl.datasets.drawing.glyphs import PRETRAINING_GLYPHS, STREAM_GLYPHS, Look, sample_look

Glyphs = Literal["reported", "tuning", "pretraining"]
Renditions = Literal["known", "new"]

#: what the pretraining shows, and what it never shows
RENDITIONS: dict[Renditions, tuple[str, ...]] = {
    "known": ("solid", "gradient", "outline"),
    "new": ("hatched", "dotted", "noise", "sketch"),
}
#: the most strokes, rings and dots strewn over one drawing
CLUTTER = 1

_TUNING = list(PRETRAINING_GLYPHS)[::5][:20]
#: readable name -> code point; no class is in two of them
GLYPHS: dict[Glyphs, dict[str, int]] = {
    "reported": STREAM_GLYPHS,
    "tuning": {name: PRETRAINING_GLYPHS[name] for name in _TUNING},
    "pretraining": {name: code for name, code in PRETRAINING_GLYPHS.items() if name not in _TUNING},
}


def sample_rendition(rng: np.random.Generator, renditions: Renditions) -> Look:
    """A random look in one of these renditions."""
    look, kinds = sample_look(rng), RENDITIONS[renditions]
    return replace(look, rendition=kinds[rng.integers(len(kinds))], clutter=int(rng.integers(0, CLUTTER + 1)))
