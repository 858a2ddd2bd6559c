"""Makes the bundled weights: real training of real models on data that the suite draws itself."""

from __future__ import annotations

import hashlib
import math
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import dualcl.benchmark.core.compat  # noqa: F401 - before timm

# isort: split
import timm

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.seeding import derive_seed, numpy_generator
from dualcl.benchmark.pretraining.diffusion import GlyphDiffusionRecipe, make_glyph_diffusion
from dualcl.benchmark.pretraining.encoder import EncoderRecipe, make_encoder
from dualcl.benchmark.pretraining.portraits import JudgeRecipe, PortraitsRecipe, make_judge, make_portraits
from dualcl.benchmark.pretraining.renditions import RenditionsViTRecipe, augmented, make_renditions_vit, write_backbone
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
class GlyphViTRecipe:
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
    embed_dim: int = 128
    depth: int = 6
    num_heads: int = 4
    patch_size: int = 8
    input_size: int = 32


def pretrain(name: str, out: str | Path, seed: int = 0, **settings: Any) -> dict[str, Any]:
    """Trains the bundled model `name` and writes weights (float16 safetensors) and cards into the folder `out`.

    `settings` override the recipe's fields. Returns the JSON card. Progress goes to stderr. The same seed gives the
    same weights on one machine. Raises UserError for an unknown model or setting.
    """
    if name not in RECIPES:
        raise UserError(f"unknown model {name!r}; {nearest(name, RECIPES, 'models')}")
    recipe, make = RECIPES[name]
    known = asdict(recipe())
    for key in settings:
        if key not in known:
            raise UserError(f"unknown setting {key!r} of {name}; {nearest(key, known, 'settings')}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return make(folder, seed, recipe(**settings), settings)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _drawn(glyphs: dict[str, int], part: str, per_class: int, seed: int, size: int) -> tuple[NDArray[np.uint8], Tensor]:
    """Images (N, size, size, 3) of all glyphs, and their labels (N,)."""
    images = [
        draw_images(code, [numpy_generator(seed, "pretrain", name, part, i) for i in range(per_class)], size)
        for name, code in glyphs.items()
    ]
    return np.concatenate(images), torch.arange(len(glyphs)).repeat_interleave(per_class)


def _drawn_plainly(glyphs: dict[str, int], per_class: int, seed: int, size: int) -> NDArray[np.uint8]:
    """The training images of `_drawn` in the same pose, but solid black on white."""
    images = []
    for name, code in glyphs.items():
        for i in range(per_class):
            look = sample_look(numpy_generator(seed, "pretrain", name, "train", i))
            images.append(draw_glyph(code, in_black_on_white(look), size))
    return np.stack(images)


@torch.inference_mode()
def _features(model: nn.Module, images: NDArray[np.uint8]) -> Tensor:
    """What the model returns for the images, (N, D), in batches of 256."""
    model.eval()
    return torch.cat([model(to_input(chunk)) for chunk in torch.from_numpy(images).split(256)])


def _nearest_mean_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of the nearest class mean by cosine: train (N, D), test (M, D)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    means = torch.stack([train[labels == c].mean(0) for c in labels.unique()])
    return float((test @ F.normalize(means, dim=1).T).argmax(1).eq(test_labels).float().mean())


def _train(
    model: nn.Module,
    images: NDArray[np.uint8],
    plain: NDArray[np.uint8],
    labels: Tensor,
    seed: int,
    recipe: GlyphViTRecipe,
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
    pixels, plain_pixels = torch.from_numpy(images), torch.from_numpy(plain)
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
            inputs = torch.lerp(to_input(plain_pixels[index]), to_input(pixels[index]), share)
            scores = model(augmented(inputs, 3, generator))
            loss = F.cross_entropy(scores, labels[index], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            seen += len(index)
            loss_sum += float(loss.detach()) * len(index)
        _say(f"epoch {epoch + 1}/{recipe.epochs}  loss {loss_sum / seen:.3f}  {time.monotonic() - started:.0f} s")


def _make_glyph_vit(folder: Path, seed: int, recipe: GlyphViTRecipe, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains the ViT on the pretraining glyphs and writes glyph_vit.safetensors, .json and .md."""
    if recipe.classes < 0 or recipe.classes == 1:
        raise UserError(f"classes={recipe.classes}: give at least 2, or 0 for all {len(PRETRAINING_GLYPHS)}")
    chosen = dict(list(PRETRAINING_GLYPHS.items())[: recipe.classes or None])
    _say(f"drawing {len(chosen)} classes x {recipe.per_class + recipe.test_per_class} images")
    images, labels = _drawn(chosen, "train", recipe.per_class, seed, recipe.input_size)
    plain = _drawn_plainly(chosen, recipe.per_class, seed, recipe.input_size)
    test_images, test_labels = _drawn(chosen, "test", recipe.test_per_class, seed, recipe.input_size)
    timm_name = "vit_tiny_patch16_224"
    kwargs: dict[str, Any] = {
        "img_size": recipe.input_size,
        "patch_size": recipe.patch_size,
        "embed_dim": recipe.embed_dim,
        "depth": recipe.depth,
        "num_heads": recipe.num_heads,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pretrain", "init"))
        model: Any = timm.create_model(timm_name, pretrained=False, num_classes=len(chosen), **kwargs)
        started = time.monotonic()
        _train(model, images, plain, labels, seed, recipe)
        minutes = (time.monotonic() - started) / 60
    # what is measured is what is saved: the weights rounded to float16
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    own = float(_features(model, test_images).argmax(1).eq(test_labels).float().mean())
    model.reset_classifier(0)
    stream, stream_labels = _drawn(STREAM_GLYPHS, "train", 3 * recipe.test_per_class, seed, recipe.input_size)
    stream_test, stream_test_labels = _drawn(STREAM_GLYPHS, "test", recipe.test_per_class, seed, recipe.input_size)
    ncm = _nearest_mean_accuracy(
        _features(model, stream), stream_labels, _features(model, stream_test), stream_test_labels
    )
    weights = save({k: v.half().contiguous() for k, v in model.state_dict().items()})
    card = {
        "timm_name": timm_name,
        "kwargs": {**kwargs, "num_classes": 0},
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "input_size": recipe.input_size,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "trained_on": f"{len(chosen)} glyphs of DejaVu Sans x {recipe.per_class} images, none in a stream",
        "command": _command("glyph-vit", seed, settings),
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
    _say(f"held-out accuracy {own:.1%}, nearest class mean on the stream's classes {ncm:.1%}; written to {folder}")
    return card


def _command(name: str, seed: int, settings: dict[str, Any]) -> str:
    """What makes these weights again: the command line, or Python where it was told more than the name."""
    if seed == 0 and not settings:
        return f"dualcl pretrain {name}"
    told = "".join(f", {key}={value!r}" for key, value in {"seed": seed, **settings}.items())
    return f"dualcl.benchmark.pretraining.vit.pretrain({name!r}, out{told})"


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


def _make_diffusion(folder: Path, seed: int, recipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains the tiny Stable Diffusion on captioned glyphs and writes the folder glyph_diffusion."""
    return make_glyph_diffusion(folder, seed, recipe, _command("glyph-diffusion", seed, settings), _say)


def _make_judge(folder: Path, seed: int, recipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains the judge of portraits and writes the folder portraits_judge."""
    return make_judge(folder, seed, recipe, _command("portraits-judge", seed, settings), _say)


def _make_portraits(folder: Path, seed: int, recipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains the small Stable Diffusion on portraits, or goes on, and writes the folder portraits_diffusion."""
    return make_portraits(folder, seed, recipe, _command("portraits-diffusion", seed, settings), _say)


def _make_encoder(folder: Path, seed: int, recipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains the encoder of portraits, or goes on, and writes the folder portraits_encoder."""
    return make_encoder(folder, seed, recipe, _command("portraits-encoder", seed, settings), _say)


def _make_renditions(folder: Path, seed: int, recipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains the ViT of the renditions, or goes on, and writes renditions_vit.safetensors, .json and .md."""
    return make_renditions_vit(folder, seed, recipe, _command("renditions-vit", seed, settings), _say)


Maker = Callable[[Path, int, Any, dict[str, Any]], dict[str, Any]]

#: name -> (settings with their defaults, what trains and writes)
RECIPES: dict[str, tuple[type[Any], Maker]] = {
    "glyph-vit": (GlyphViTRecipe, _make_glyph_vit),
    "glyph-diffusion": (GlyphDiffusionRecipe, _make_diffusion),
    "renditions-vit": (RenditionsViTRecipe, _make_renditions),
    "portraits-judge": (JudgeRecipe, _make_judge),
    "portraits-diffusion": (PortraitsRecipe, _make_portraits),
    "portraits-encoder": (EncoderRecipe, _make_encoder),
}
