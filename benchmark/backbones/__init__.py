"""Bundled pretrained weights (safetensors) with their model cards."""

from __future__ import annotations

from pathlib import Path


def bundled_backbones() -> dict[str, Path]:
    """Bundled backbones: name -> json description beside the weights. Needs neither torch nor timm."""
    return {p.stem.replace("_", "-"): p for p in sorted(Path(__file__).parent.glob("*.json"))}


def bundled_diffusion() -> dict[str, Path]:
    """Bundled text-to-image models: name -> directory in diffusers layout."""
    return {p.parent.name.replace("_", "-"): p.parent for p in sorted(Path(__file__).parent.glob("*/model_index.json"))}
