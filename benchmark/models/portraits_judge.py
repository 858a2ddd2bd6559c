"""The judge of portraits: a small bundled classifier with one head for each attribute of a drawing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.models.bundled import bundled_judge, check_bundled

#: side of the pictures that it reads
SIZE = 48
WIDTH = 192


class Judge(nn.Module):
    """Convolutions that keep where things are, one hidden layer, a linear head per attribute."""

    def __init__(self, attributes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.attributes = {name: tuple(values) for name, values in attributes.items()}

        def stage(a: int, b: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.GELU())

        self.body = nn.Sequential(
            stage(3, 32, 2), stage(32, 64, 2), stage(64, 64, 1), stage(64, 128, 2), nn.Conv2d(128, 48, 1), nn.GELU()
        )
        self.hidden = nn.Linear(48 * (SIZE // 8) ** 2, WIDTH)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values)) for name, values in self.attributes.items()})

    def features(self, images: Tensor) -> Tensor:
        """(B, 192) of images (B, 3, 48, 48) in [-1, 1]."""
        return F.gelu(self.hidden(self.body(images).flatten(1)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Scores (B, values) for each attribute, of images (B, 3, 48, 48) in [-1, 1]."""
        hidden = self.features(images)
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """The place of each attribute's value, (N, attributes), of uint8 pictures (N, 48, 48, 3)."""
        device = next(self.parameters()).device
        parts = [torch.empty(0, len(self.attributes), dtype=torch.long)]
        for chunk in images.split(128):
            pixels = chunk.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
            parts.append(torch.stack([scores.argmax(1) for scores in self(pixels).values()], 1).cpu())
        return torch.cat(parts)


def load_judge(folder: Path | None = None) -> tuple[Judge, dict[str, Any]]:
    """The bundled judge, or that of a folder, in float32, and its card. UserError when its file is damaged."""
    folder = folder or bundled_judge()
    card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    check_bundled(folder / "model.safetensors", card["sha256"])
    judge = Judge(card["attributes"])
    judge.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return judge.requires_grad_(False).eval(), card
