"""Makes `glyph-vit`: a small ViT pretrained on drawn glyphs; for tests."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
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
from dualcl.benchmark.pretraining.stages import Say
from dualcl.benchmark.pretraining.text_to_image import to_input
from dualcl.datasets.drawing.glyphs import (
    PRETRAINING_GLYPHS,
    STREAM_GLYPHS,
    draw_glyph,
    draw_images,
    in_black_on_white,
    sample_look,
)


@dataclass(frozen=True)
class GlyphViTRecipe(ViTRecipe):
    """How `glyph-vit` is trained."""

    per_class: int = 120
    test_per_class: int = 20
    epochs: int = 12
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    fade: float = 0.5


def _drawn(glyphs: dict[str, int], part: str, per_class: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, size, size, 3) uint8 of all glyphs, and their labels (N,)."""
    images = [
        draw_images(code, [numpy_generator(seed, "pretrain", name, part, i) for i in range(per_class)], size)
        for name, code in glyphs.items()
    ]
    return torch.from_numpy(np.concatenate(images)), torch.arange(len(glyphs)).repeat_interleave(per_class)


def _drawn_plainly(glyphs: dict[str, int], per_class: int, seed: int, size: int) -> Tensor:
    """The training images of `_drawn` in the same pose, but solid black on white."""
    images = []
    for name, code in glyphs.items():
        for i in range(per_class):
            look = sample_look(numpy_generator(seed, "pretrain", name, "train", i))
            images.append(draw_glyph(code, in_black_on_white(look), size))
    return torch.from_numpy(np.stack(images))


def _train(
    model: nn.Module,
    images: Tensor,
    plain: Tensor,
    labels: Tensor,
    seed: int,
    recipe: GlyphViTRecipe,
    say: Say,
) -> None:
    """AdamW, one warm-up epoch, then cosine to 0.

    Inks and papers of all colours leave a fresh transformer almost no first-order signal: it does not start to learn.
    So `images` are faded in over `plain`, the same glyphs in black on white, during the first part of the training.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr,
    )
    per_epoch = max(1, len(labels) // recipe.batch_size)
    total = recipe.epochs * per_epoch
    step, started = 0, time.monotonic()
    for epoch in range(recipe.epochs):
        generator = torch_generator(seed, "pretrain", "epoch", epoch)
        order = torch.randperm(len(labels), generator=generator)
        model.train()
        seen, loss_sum = 0, 0.0
        for index in order.split(recipe.batch_size)[:per_epoch]:
            warm = min(1.0, (step + 1) / per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / total))
            spread = torch.rand(len(index), 1, 1, 1, generator=generator) * 0.5 - 0.25
            share = (spread + step / total / recipe.fade).clamp_(0, 1)
            inputs = torch.lerp(to_input(plain[index]), to_input(images[index]), share)
            scores = model(augmented(inputs, 3, generator))
            loss = F.cross_entropy(scores, labels[index], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            seen += len(index)
            loss_sum += float(loss.detach()) * len(index)
        say(f"epoch {epoch + 1}/{recipe.epochs}  loss {loss_sum / seen:.3f}  {time.monotonic() - started:.0f} s")


def make_glyph_vit(folder: Path, seed: int, recipe: GlyphViTRecipe, command: str, say: Say) -> dict[str, Any]:
    """Trains the ViT on the pretraining glyphs and writes glyph_vit.safetensors, .json and .md; returns the card."""
    chosen = recipe.chosen(PRETRAINING_GLYPHS)
    say(f"drawing {len(chosen)} classes x {recipe.per_class + recipe.test_per_class} images")
    images, labels = _drawn(chosen, "train", recipe.per_class, seed, recipe.input_size)
    plain = _drawn_plainly(chosen, recipe.per_class, seed, recipe.input_size)
    test_images, test_labels = _drawn(chosen, "test", recipe.test_per_class, seed, recipe.input_size)
    model = recipe.fresh(len(chosen), derive_seed(seed, "pretrain", "init"))
    started = time.monotonic()
    _train(model, images, plain, labels, seed, recipe, say)
    minutes = (time.monotonic() - started) / 60
    round_as_stored(model)
    own = float(outputs(model, test_images).argmax(1).eq(test_labels).float().mean())
    model.reset_classifier(0)
    stream, stream_labels = _drawn(STREAM_GLYPHS, "train", 3 * recipe.test_per_class, seed, recipe.input_size)
    stream_test, stream_test_labels = _drawn(STREAM_GLYPHS, "test", recipe.test_per_class, seed, recipe.input_size)
    ncm = nearest_mean_accuracy(outputs(model, stream), stream_labels, outputs(model, stream_test), stream_test_labels)
    told = {
        "trained_on": f"{len(chosen)} glyphs of DejaVu Sans x {recipe.per_class} images, none in a stream",
        "command": command,
        "seed": seed,
        "measured": {
            "held_out_accuracy": round(own, 4),
            "stream_nearest_class_mean_accuracy": round(ncm, 4),
            "training_minutes": round(minutes, 1),
            "threads": torch.get_num_threads(),
        },
    }
    card = write_backbone(folder / "glyph_vit", model, recipe, told)
    write_text(folder / "glyph_vit", "glyph-vit", _card_text(card, list(chosen)))
    say(f"held-out accuracy {own:.1%}, nearest class mean on the stream's classes {ncm:.1%}; written to {folder}")
    return card


def _card_text(card: Mapping[str, Any], classes: list[str]) -> list[str]:
    """Paragraphs of the model card, every number from `card`."""
    recipe, measured, versions = card["recipe"], card["measured"], card["versions"]
    return [
        shape_of(card, "glyphs"),
        f"Made by `{card['command']}` from {card['trained_on']}; {recipe['epochs']} epochs from random weights, AdamW, "
        f"learning rate {recipe['lr']}, weight decay {recipe['weight_decay']}, one epoch of warm-up, cosine to 0, "
        f"batch {recipe['batch_size']}, label smoothing {recipe['label_smoothing']}; shifts of up to 3 px, colour "
        f"channels permuted; the drawings are faded in over black-on-white ones during the first {recipe['fade']:.0%}. "
        f"Seed {card['seed']} (initial weights, drawings, order). {measured['training_minutes']} minutes on "
        f"{measured['threads']} CPU thread(s); torch {versions['torch']}, timm {versions['timm']}. Stored in float16, "
        f"sha256 `{card['sha256']}`.",
        f"Measured (one run, the stored weights): {measured['held_out_accuracy']:.1%} over its own {len(classes)} "
        f"classes on {recipe['test_per_class']} new drawings of each. Nearest class mean (cosine) over the "
        f"{len(STREAM_GLYPHS)} classes of the stream, which it has never seen, from {3 * recipe['test_per_class']} "
        f"drawings of each, on {recipe['test_per_class']} others: "
        f"{measured['stream_nearest_class_mean_accuracy']:.1%} (chance: {1 / len(STREAM_GLYPHS):.0%}).",
        "Not for anything but this suite: it has seen nothing except drawn symbols.",
        f"Classes: {', '.join(classes)}.",
    ]
