"""Bundled pretrained weights (safetensors) with their model cards."""

from __future__ import annotations

from pathlib import Path


def bundled_backbones() -> dict[str, Path]:
    """Bundled backbones: name -> json description beside the weights. Needs neither torch nor timm."""
    return {p.stem.replace("_", "-"): p for p in sorted(Path(__file__).parent.glob("*.json"))}
