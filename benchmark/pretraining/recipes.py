"""Which bundled models can be made again, and the one way to: `dualcl pretrain`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.pretraining.encoder import EncoderRecipe, make_encoder
from dualcl.benchmark.pretraining.glyph_diffusion import GlyphDiffusionRecipe, make_glyph_diffusion
from dualcl.benchmark.pretraining.glyph_vit import GlyphViTRecipe, make_glyph_vit
from dualcl.benchmark.pretraining.portraits import JudgeRecipe, PortraitsRecipe, make_judge, make_portraits
from dualcl.benchmark.pretraining.renditions import RenditionsViTRecipe, make_renditions_vit
from dualcl.benchmark.pretraining.stages import Say

#: (folder, seed, recipe, the command that does it, progress) -> the JSON card
Maker = Callable[[Path, int, Any, str, Say], dict[str, Any]]

#: name -> (settings with their defaults, what trains and writes)
RECIPES: dict[str, tuple[type[Any], Maker]] = {
    "glyph-vit": (GlyphViTRecipe, make_glyph_vit),
    "glyph-diffusion": (GlyphDiffusionRecipe, make_glyph_diffusion),
    "renditions-vit": (RenditionsViTRecipe, make_renditions_vit),
    "portraits-judge": (JudgeRecipe, make_judge),
    "portraits-diffusion": (PortraitsRecipe, make_portraits),
    "portraits-encoder": (EncoderRecipe, make_encoder),
}


def pretrain(name: str, out: str | Path, seed: int = 0, **settings: Any) -> dict[str, Any]:
    """Trains the bundled model `name` and writes weights (float16 safetensors) and cards into the folder `out`.

    `settings` override the recipe's fields. Returns the JSON card. Progress goes to stderr. The same seed gives the
    same weights on one machine. Raises UserError for an unknown model or setting.
    """
    if name not in RECIPES:
        raise UserError(f"unknown model {name!r}; {nearest(name, RECIPES, 'models')}")
    recipe, make = RECIPES[name]
    known = asdict(recipe())
    for key in settings:
        if key not in known:
            raise UserError(f"unknown setting {key!r} of {name}; {nearest(key, known, 'settings')}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return make(folder, seed, recipe(**settings), _command(name, seed, settings), _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _command(name: str, seed: int, settings: dict[str, Any]) -> str:
    """What makes these weights again: the command line, or Python where it was told more than the name."""
    if seed == 0 and not settings:
        return f"dualcl pretrain {name}"
    told = "".join(f", {key}={value!r}" for key, value in {"seed": seed, **settings}.items())
    return f"dualcl.benchmark.pretraining.recipes.pretrain({name!r}, out{told})"
