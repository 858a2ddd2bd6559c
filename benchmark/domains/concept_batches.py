"""Encoded photographs and the noised batches made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass
class Entries:
    """Encoded training images: latent mean and deviation (n, C, h, w), and the prompts of each."""

    mean: Tensor
    std: Tensor
    prompts: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.prompts)

    def __add__(self, other: Entries) -> Entries:
        return Entries(
            torch.cat([self.mean, other.mean]), torch.cat([self.std, other.std]), self.prompts + other.prompts
        )


@dataclass
class ConceptBatch:
    """Noised latents and what to predict: latents and targets (B, C, h, w), timesteps (B,), prompts, weights (B,)."""

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    prompts: list[str]
    #: of each sample's error in the loss
    weights: Tensor


def square(image: Image.Image, size: int, interpolation: str = "bicubic") -> Tensor:
    """The centre square of an RGB image at `size` pixels, uint8 (size, size, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    method = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    cropped = image.crop((left, top, left + side, top + side))
    if side != size:
        cropped = cropped.resize((size, size), method)
    return torch.from_numpy(np.array(cropped, dtype=np.uint8))
