"""Bundled pretrained weights (safetensors) with their model cards."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dualcl.benchmark.core.errors import UserError

#: kept for tests: `dualcl list --all` alone shows them
UNLISTED = ("glyph-vit", "glyph-diffusion")


def check_bundled(file: Path, sha256: str) -> None:
    """UserError when a bundled file is not the one that its card describes."""
    if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
        raise UserError(f"the bundled weights {file} are damaged (sha256 differs); put them back: install dualcl again")


def bundled_backbones() -> dict[str, Path]:
    """Bundled backbones: name -> json description beside the weights. Needs neither torch nor timm."""
    return {p.stem.replace("_", "-"): p for p in sorted(Path(__file__).parent.glob("*.json"))}


def bundled_diffusion() -> dict[str, Path]:
    """Bundled text-to-image models: name -> directory in diffusers layout."""
    return {p.parent.name.replace("_", "-"): p.parent for p in sorted(Path(__file__).parent.glob("*/model_index.json"))}


def bundled_encoders() -> dict[str, Path]:
    """Bundled encoders of pictures: name -> folder of model.safetensors, card.json, README.md."""
    return {
        p.parent.name.replace("_", "-"): p.parent for p in sorted(Path(__file__).parent.glob("*_encoder/card.json"))
    }


def bundled_judge() -> Path:
    """The folder of the portraits' judge: model.safetensors, card.json, README.md."""
    return Path(__file__).parent / "portraits_judge"
