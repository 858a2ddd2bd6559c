"""What the two bundled backbones are made with: augmentation, features, class means, their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.files import atomic_write
from dualcl.benchmark.pretraining.text_to_image import to_input


@dataclass(frozen=True)
class ViTRecipe:
    """What a recipe says of the ViT's shape."""

    embed_dim: int = 128
    depth: int = 6
    num_heads: int = 4
    patch_size: int = 8
    input_size: int = 32

    def timm_kwargs(self) -> dict[str, Any]:
        """What `timm.create_model` is told."""
        return {
            "img_size": self.input_size,
            "patch_size": self.patch_size,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
        }


def write_backbone(path: Path, weights: bytes, card: Mapping[str, Any], text: str) -> None:
    """The three files of a bundled backbone: `path` with the suffixes .safetensors, .json and .md."""
    described = (json.dumps(card, indent=2) + "\n").encode()
    for suffix, data in (".safetensors", weights), (".json", described), (".md", text.encode()):
        with atomic_write(path.with_suffix(suffix)) as handle:
            handle.write(data)


def augmented(inputs: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Each image (B, 3, H, W) shifted by up to `by` pixels, its colour channels permuted."""
    batch, channels, height, width = inputs.shape
    shift = torch.randint(-by, by + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + shift[0]).clamp_(0, height - 1)
    columns = (torch.arange(width) + shift[1]).clamp_(0, width - 1)
    order = torch.rand(batch, channels, generator=generator).argsort(1)
    images = torch.arange(batch)[:, None, None, None]
    return inputs[images, order[:, :, None, None], rows[:, None, :, None], columns[:, None, None]]


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """What the model returns for images (N, S, S, 3) uint8, in batches of 256."""
    model.eval()
    return torch.cat([model(to_input(chunk)) for chunk in images.split(256)])


def nearest_mean_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of the nearest class mean by cosine: train (N, D), test (M, D)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    means = torch.stack([train[labels == c].mean(0) for c in labels.unique()])
    return float((test @ F.normalize(means, dim=1).T).argmax(1).eq(test_labels).float().mean())
