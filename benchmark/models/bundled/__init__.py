"""Bundled pretrained weights (safetensors) with their model cards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError

#: where the bundled models lie
BUNDLED = Path(__file__).parent
#: kept for tests: `dualcl list --all` alone shows them
UNLISTED = ("glyph-vit", "glyph-diffusion")


def intact(file: Path, sha256: str) -> bool:
    """Whether a bundled file is the one that its card describes."""
    return hashlib.sha256(file.read_bytes()).hexdigest() == sha256


def check_bundled(file: Path, sha256: str) -> None:
    """UserError when a bundled file is not the one that its card describes."""
    if not intact(file, sha256):
        raise UserError(f"the bundled weights {file} are damaged (sha256 differs); put them back: install dualcl again")


def bundled_backbones() -> dict[str, Path]:
    """Bundled backbones: name -> json description beside the weights. Needs neither torch nor timm."""
    return {p.stem.replace("_", "-"): p for p in sorted(BUNDLED.glob("*.json"))}


def bundled_diffusion() -> dict[str, Path]:
    """Bundled text-to-image models: name -> directory in diffusers layout."""
    return {p.parent.name.replace("_", "-"): p.parent for p in sorted(BUNDLED.glob("*/model_index.json"))}


def bundled_encoders() -> dict[str, Path]:
    """Bundled encoders of pictures: name -> folder of model.safetensors, card.json, README.md."""
    return {p.parent.name.replace("_", "-"): p.parent for p in sorted(BUNDLED.glob("*_encoder/card.json"))}


def bundled_judge() -> Path:
    """The folder of the portraits' judge: model.safetensors, card.json, README.md."""
    return BUNDLED / "portraits_judge"


def bundled_weights() -> dict[str, dict[Path, str]]:
    """Every bundled model: name -> its files of weights, each with the sha256 in the model's card."""
    found = {
        name: {card.with_suffix(".safetensors"): read_card(card)["sha256"]}
        for name, card in bundled_backbones().items()
    }
    for name, folder in bundled_diffusion().items():
        found[name] = {
            folder / file: sha256 for file, sha256 in read_card(folder / "card.json")["weights_sha256"].items()
        }
    for name, folder in {**bundled_encoders(), "portraits-judge": bundled_judge()}.items():
        found[name] = {folder / "model.safetensors": read_card(folder / "card.json")["sha256"]}
    return found


def read_card(file: Path) -> dict[str, Any]:
    """What a bundled model's card says; read without torch."""
    card: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return card
