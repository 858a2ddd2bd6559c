"""Makes `renditions-vit`: a small ViT pretrained on pictographs in a few renditions only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.seeding import derive_seed, numpy_generator
from dualcl.benchmark.pretraining.backbones import (
    ViTRecipe,
    augmented,
    nearest_mean_accuracy,
    outputs,
    round_as_stored,
    shape_of,
    write_backbone,
    write_text,
)
from dualcl.benchmark.pretraining.stages import Order, Say, Schedule, train
from dualcl.benchmark.pretraining.text_to_image import to_input
from dualcl.datasets.drawing.glyphs import draw_glyph, in_black_on_white
from dualcl.datasets.drawing.renditions import CLUTTER, GLYPHS, RENDITIONS, Glyphs, Renditions, sample_rendition


@dataclass(frozen=True)
class RenditionsViTRecipe(ViTRecipe):
    """How `renditions-vit` is trained."""

    per_class: int = 200
    test_per_class: int = 20
    steps: int = 4000
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    fade: float = 0.35
    shift: int = 4
    patch_size: int = 6
    input_size: int = 48


def _draw(
    names: Mapping[str, int], part: str, count: int, kinds: Renditions, seed: int, size: int
) -> tuple[Tensor, Tensor]:
    """Images (2, N, size, size, 3) uint8 as they are and in black on white, and their labels (N,)."""
    images = np.empty((2, len(names) * count, size, size, 3), dtype=np.uint8)
    for label, (name, code) in enumerate(names.items()):
        for i in range(count):
            look = sample_rendition(numpy_generator(seed, "renditions", "pretrain", name, part, i), kinds)
            images[0, label * count + i] = draw_glyph(code, look, size)
            images[1, label * count + i] = draw_glyph(code, in_black_on_white(look), size)
    return torch.from_numpy(images), torch.arange(len(names)).repeat_interleave(count)


def nearest_mean(model: nn.Module, glyphs: Glyphs, kinds: Renditions, per_class: int, seed: int, size: int) -> float:
    """Accuracy of the nearest class mean by cosine, from 3 times as many drawings as it is tested on."""
    (train_images, labels), (test_images, test_labels) = (
        _draw(GLYPHS[glyphs], part, count, kinds, seed, size)
        for part, count in (("train", 3 * per_class), ("test", per_class))
    )
    known, new = (outputs(model, images[0]) for images in (train_images, test_images))
    return nearest_mean_accuracy(known, labels, new, test_labels)


def make_renditions_vit(folder: Path, seed: int, recipe: RenditionsViTRecipe, command: str, say: Say) -> dict[str, Any]:
    """Trains the ViT, or goes on, and writes renditions_vit.safetensors, .json and .md; returns the card.

    Inks and papers of all colours leave a fresh transformer almost no first-order signal. So the drawings are faded in
    over the same ones in black on white.
    """
    chosen = recipe.chosen(GLYPHS["pretraining"])
    say(f"drawing {len(chosen)} classes x {recipe.per_class + recipe.test_per_class} images")
    images, labels = _draw(chosen, "train", recipe.per_class, "known", seed, recipe.input_size)
    model = recipe.fresh(len(chosen), derive_seed(seed, "renditions", "init"))
    order = Order(len(labels), recipe.batch, seed, "renditions", "order")

    def loss(step: int) -> Tensor:
        generator = torch_generator(seed, "renditions", "step", step)
        index = order(step)
        spread = torch.rand(len(index), 1, 1, 1, generator=generator) * 0.5 - 0.25
        share = (spread + step / recipe.steps / recipe.fade).clamp_(0, 1)
        inputs = torch.lerp(to_input(images[1, index]), to_input(images[0, index]), share)
        scores = model(augmented(inputs, recipe.shift, generator))
        return F.cross_entropy(scores, labels[index], label_smoothing=recipe.label_smoothing)

    pixels = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
    told = {"seed": seed, "drawing": pixels, **asdict(recipe)}
    schedule = Schedule(recipe.steps, recipe.lr, warm=300, flat=0.3, weight_decay=recipe.weight_decay)
    model = train(folder / "state" / "renditions-vit.safetensors", told, model, loss, schedule, say)
    round_as_stored(model)
    own_images, own_labels = _draw(chosen, "test", recipe.test_per_class, "known", seed, recipe.input_size)
    own = float(outputs(model, own_images[0]).argmax(1).eq(own_labels).float().mean())
    model.reset_classifier(0)
    means = {
        f"{glyphs}, {kinds} renditions": round(
            nearest_mean(model, glyphs, kinds, recipe.test_per_class, seed, recipe.input_size), 4
        )
        for glyphs in ("tuning", "reported")
        for kinds in ("known", "new")
    }
    told = {
        "trained_on": f"{len(chosen)} pictographs of DejaVu Sans x {recipe.per_class} images, none in a stream, in the "
        f"renditions {', '.join(RENDITIONS['known'])}",
        "command": command,
        "seed": seed,
        "drawing": pixels,
        "measured": {"held_out_accuracy": round(own, 4), "nearest_class_mean_accuracy": means},
    }
    card = write_backbone(folder / "renditions_vit", model, recipe, told)
    write_text(folder / "renditions_vit", "renditions-vit", _card_text(card, list(chosen)))
    say(json.dumps(card["measured"]))
    return card


def _card_text(card: Mapping[str, Any], classes: list[str]) -> list[str]:
    """Paragraphs of the model card, every number from `card`."""
    recipe, measured, versions = card["recipe"], card["measured"], card["versions"]
    means = "; ".join(f"{name} {share:.1%}" for name, share in measured["nearest_class_mean_accuracy"].items())
    return [
        shape_of(card, "renditions"),
        f"Made by `{card['command']}` from {card['trained_on']}, at most {CLUTTER} piece of clutter; "
        f"{recipe['steps']} steps of {recipe['batch']} from random weights, AdamW, learning rate {recipe['lr']}, "
        f"weight decay {recipe['weight_decay']}, label smoothing {recipe['label_smoothing']}; shifts of up to "
        f"{recipe['shift']} px, colour channels permuted; the drawings are faded in over the same in black on white "
        f"during the first {recipe['fade']:.0%}. Seed {card['seed']}, torch {versions['torch']}, timm "
        f"{versions['timm']}. Stored in float16, sha256 `{card['sha256']}`.",
        f"Measured (one run, the stored weights): {measured['held_out_accuracy']:.1%} over its own {len(classes)} "
        f"classes on {recipe['test_per_class']} new drawings of each. Nearest class mean (cosine) over 20 classes that "
        f"it has never seen, from {3 * recipe['test_per_class']} drawings of each, on {recipe['test_per_class']} "
        f"others: {means}. The new renditions are {', '.join(RENDITIONS['new'])}.",
        "Not for anything but this suite: it has seen nothing except drawn symbols.",
        f"Classes: {', '.join(classes)}.",
    ]
