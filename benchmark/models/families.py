"""The families of text-to-image models there are, and which of them a model is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import DiffusionPipeline

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import read_json
from dualcl.benchmark.models.bundled import bundled_diffusion, check_bundled
from dualcl.benchmark.models.stable_diffusion import StableDiffusion
from dualcl.benchmark.models.text_to_image import BaseConfig, TextToImage, offline

#: asked in turn
FAMILIES: tuple[type[TextToImage], ...] = (StableDiffusion,)


def load(config: BaseConfig, device: torch.device | str = "cpu") -> TextToImage:
    """Loads the model that `config` names, everything frozen.

    Raises UserError when it is not there, is of no family, lacks a part, or its parts do not fit one another.
    """
    bundled = bundled_diffusion()
    source, name, weights = _locate(config.model, bundled)
    index = _index(source, config)
    family = next((f for f in FAMILIES if index is None or f.reads(index)), None)
    if family is None:
        known = " and ".join(f.title for f in FAMILIES)
        raise UserError(f"{config.model} is a {(index or {}).get('_class_name')}; only {known} are supported")
    if config.model in bundled:
        for file, digest in read_json(bundled[config.model] / "card.json")["weights_sha256"].items():
            check_bundled(bundled[config.model] / file, digest)
    return family.load(source, config, name, weights, device)


def _locate(model: str, bundled: dict[str, Path]) -> tuple[Path | str, str, str]:
    """(source for from_pretrained, name, origin of the weights)."""
    if model in bundled:
        return bundled[model], model, "bundled"
    path = Path(model).expanduser()
    if path.is_dir():
        return path, path.name, "local directory"
    if path.exists():
        raise UserError(f"base.model={model} is a file; give a directory in diffusers layout")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"base.model={model} is no directory; {nearest(model, bundled, 'bundled models')}, or give a hub id such "
            "as CompVis/stable-diffusion-v1-4"
        )
    return model, model, f"hub: {model}"


def _index(source: Path | str, config: BaseConfig) -> dict[str, Any] | None:
    """What `model_index.json` says, before anything large is loaded; None where the hub has none to give.

    Parts of a hub's model may be in the cache without it; they then speak for themselves.
    """
    if isinstance(source, str):
        try:
            found: Any = DiffusionPipeline.load_config(source, revision=config.revision, local_files_only=offline())
            return dict(found)
        except Exception:  # each of the libraries raises kinds of its own; the parts' errors say what is wrong
            return None
    if not (source / "model_index.json").is_file():
        raise UserError(
            f"{config.model} holds no model_index.json; give a directory in diffusers layout (save_pretrained)"
        )
    try:
        index = read_json(source / "model_index.json")
    except ValueError:
        index = None
    if not isinstance(index, dict):
        raise UserError(f"{source / 'model_index.json'} is not valid JSON; save or download the model again")
    return index
