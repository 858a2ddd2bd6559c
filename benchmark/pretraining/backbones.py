"""What the two bundled backbones are made with: the model, augmentation, features, class means, cards and files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import atomic_write
from dualcl.benchmark.pretraining.stages import card_text
from dualcl.benchmark.pretraining.text_to_image import to_input

TIMM_NAME = "vit_tiny_patch16_224"


@dataclass(frozen=True)
class ViTRecipe:
    """What a recipe says of the ViT's shape and classes. `classes`: the first so many, 0 for all."""

    classes: int = 0
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

    def chosen(self, classes: Mapping[str, int]) -> dict[str, int]:
        """The first of `classes`. Raises UserError for a number of them that is none to tell apart."""
        if self.classes < 0 or self.classes == 1:
            raise UserError(f"classes={self.classes}: give at least 2, or 0 for all {len(classes)}")
        return dict(list(classes.items())[: self.classes or None])

    def fresh(self, classes: int, seed: int) -> Any:
        """timm's model with a classifier for so many classes and weights drawn from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return timm.create_model(TIMM_NAME, pretrained=False, num_classes=classes, **self.timm_kwargs())


def round_as_stored(model: nn.Module) -> None:
    """Rounds the weights to float16, so that what is measured is what is saved."""
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})


def write_backbone(path: Path, model: nn.Module, recipe: ViTRecipe, told: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the weights as `path`.safetensors and their card, which `told` adds to, as `path`.json; returns it."""
    weights = save({k: v.half().contiguous() for k, v in model.state_dict().items()})
    card = {
        "timm_name": TIMM_NAME,
        "kwargs": {**recipe.timm_kwargs(), "num_classes": 0},
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "input_size": recipe.input_size,
        "sha256": hashlib.sha256(weights).hexdigest(),
        **told,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    for suffix, data in (".safetensors", weights), (".json", (json.dumps(card, indent=2) + "\n").encode()):
        with atomic_write(path.with_suffix(suffix)) as handle:
            handle.write(data)
    return card


def shape_of(card: Mapping[str, Any], stream: str) -> str:
    """What a model card says of the network and its inputs."""
    kwargs = card["kwargs"]
    return (
        f"A small Vision Transformer for the stream `{stream}`: timm's `{card['timm_name']}` at "
        f"{card['input_size']} px with {kwargs['patch_size']} px patches, depth {kwargs['depth']}, width "
        f"{kwargs['embed_dim']}, {kwargs['num_heads']} heads; {card['parameters']:,} parameters, no classifier. "
        "Inputs: RGB scaled to [0, 1], then normalised with mean 0.5 and standard deviation 0.5. Output: the class "
        f"token after the final norm, {kwargs['embed_dim']} numbers."
    )


def write_text(path: Path, title: str, paragraphs: list[str]) -> None:
    """The model card for people, as `path`.md."""
    with atomic_write(path.with_suffix(".md")) as handle:
        handle.write(card_text(title, paragraphs).encode())


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
