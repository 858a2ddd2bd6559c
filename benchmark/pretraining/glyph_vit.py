"""Makes `glyph-vit`: a small ViT pretrained on drawn glyphs; for tests."""

from __future__ import annotations

import hashlib
import math
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.seeding import derive_seed, numpy_generator
from dualcl.benchmark.pretraining.backbones import (
    ViTRecipe,
    augmented,
    nearest_mean_accuracy,
    outputs,
    write_backbone,
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
    """How `glyph-vit` is trained. `classes`: the first so many pretraining glyphs, 0 for all."""

    classes: int = 0
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
    if recipe.classes < 0 or recipe.classes == 1:
        raise UserError(f"classes={recipe.classes}: give at least 2, or 0 for all {len(PRETRAINING_GLYPHS)}")
    chosen = dict(list(PRETRAINING_GLYPHS.items())[: recipe.classes or None])
    say(f"drawing {len(chosen)} classes x {recipe.per_class + recipe.test_per_class} images")
    images, labels = _drawn(chosen, "train", recipe.per_class, seed, recipe.input_size)
    plain = _drawn_plainly(chosen, recipe.per_class, seed, recipe.input_size)
    test_images, test_labels = _drawn(chosen, "test", recipe.test_per_class, seed, recipe.input_size)
    timm_name = "vit_tiny_patch16_224"
    kwargs = recipe.timm_kwargs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pretrain", "init"))
        model: Any = timm.create_model(timm_name, pretrained=False, num_classes=len(chosen), **kwargs)
        started = time.monotonic()
        _train(model, images, plain, labels, seed, recipe, say)
        minutes = (time.monotonic() - started) / 60
    # what is measured is what is saved: the weights rounded to float16
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    own = float(outputs(model, test_images).argmax(1).eq(test_labels).float().mean())
    model.reset_classifier(0)
    stream, stream_labels = _drawn(STREAM_GLYPHS, "train", 3 * recipe.test_per_class, seed, recipe.input_size)
    stream_test, stream_test_labels = _drawn(STREAM_GLYPHS, "test", recipe.test_per_class, seed, recipe.input_size)
    ncm = nearest_mean_accuracy(outputs(model, stream), stream_labels, outputs(model, stream_test), stream_test_labels)
    weights = save({k: v.half().contiguous() for k, v in model.state_dict().items()})
    card = {
        "timm_name": timm_name,
        "kwargs": {**kwargs, "num_classes": 0},
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "input_size": recipe.input_size,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "trained_on": f"{len(chosen)} glyphs of DejaVu Sans x {recipe.per_class} images, none in a stream",
        "command": command,
        "seed": seed,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "measured": {
            "held_out_accuracy": round(own, 4),
            "stream_nearest_class_mean_accuracy": round(ncm, 4),
            "training_minutes": round(minutes, 1),
            "threads": torch.get_num_threads(),
        },
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
    write_backbone(folder / "glyph_vit", weights, card, _model_card(card, chosen))
    say(f"held-out accuracy {own:.1%}, nearest class mean on the stream's classes {ncm:.1%}; written to {folder}")
    return card


def _model_card(card: dict[str, Any], chosen: dict[str, int]) -> str:
    """The model card as Markdown, every number from `card`."""
    recipe, measured, kwargs, versions = card["recipe"], card["measured"], card["kwargs"], card["versions"]
    seed, n = card["seed"], len(chosen)
    sections = {
        "# glyph-vit": [
            f"A small Vision Transformer for the bundled `glyphs` stream: timm's `{card['timm_name']}` at "
            f"{card['input_size']} px with {kwargs['patch_size']} px patches, depth {kwargs['depth']}, "
            f"width {kwargs['embed_dim']}, {kwargs['num_heads']} heads; {card['parameters']:,} parameters. "
            "No classifier. Inputs: RGB scaled to [0, 1], then normalised with mean 0.5 and standard deviation 0.5. "
            f"Output: the class token after the final norm, {kwargs['embed_dim']} numbers."
        ],
        "## How it was made": [
            f"`{card['command']}`: {n} classes x {recipe['per_class']} images, drawn by the suite from the DejaVu Sans "
            f"font inside matplotlib; {recipe['epochs']} epochs from random weights; AdamW, learning rate "
            f"{recipe['lr']}, weight decay {recipe['weight_decay']}, one epoch of warm-up, cosine to 0, "
            f"batch {recipe['batch_size']}, label smoothing {recipe['label_smoothing']}; "
            "augmentation: shifts of up to 3 px, colour channels permuted; the drawings are "
            f"faded in over black-on-white ones during the first {recipe['fade']:.0%}. Seed {seed} "
            "(initial weights, drawings, order). "
            f"{measured['training_minutes']} minutes on {measured['threads']} CPU thread(s); "
            f"torch {versions['torch']}, timm {versions['timm']}. Stored in float16. "
            f"sha256 of the file: `{card['sha256']}`."
        ],
        f"## Measured (one run, seed {seed}, with the stored float16 weights)": [
            f"- {measured['held_out_accuracy']:.1%} accuracy over its own {n} classes on {recipe['test_per_class']} "
            "new drawings per class.",
            f"- {measured['stream_nearest_class_mean_accuracy']:.1%} nearest class mean (cosine) over the "
            f"{len(STREAM_GLYPHS)} stream classes, which the model has never seen, "
            f"from {3 * recipe['test_per_class']} drawings per "
            f"class, on {recipe['test_per_class']} others (chance: {1 / len(STREAM_GLYPHS):.0%}).",
        ],
        "## What it is not for": ["Anything but this suite: it has seen nothing except drawn symbols."],
        "## Classes": [", ".join(chosen) + "."],
    }
    wrap = textwrap.TextWrapper(110, break_on_hyphens=False, break_long_words=False)
    parts = []
    for title, paragraphs in sections.items():
        lines = []
        for paragraph in paragraphs:
            wrap.subsequent_indent = "  " if paragraph.startswith("- ") else ""
            lines.append(wrap.fill(paragraph))
        parts.append("\n".join([title, "", *lines, ""]))
    return "\n".join(parts)
