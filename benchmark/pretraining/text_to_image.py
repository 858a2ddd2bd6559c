"""What the makers of small text-to-image models share: tokenizer, schedule, files in diffusers layout, pictures."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from dualcl.benchmark.core.files import atomic_write
from dualcl.benchmark.core.generators import torch_generator
from dualcl.datasets.drawing.glyphs import font_path


def to_input(images: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) to float (B, 3, S, S) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def batches(n: int, batch: int, seed: int, *key: int | str) -> Iterator[Tensor]:
    """Index batches without end: shuffled passes, the last short batch of each left out."""
    epoch = 0
    while True:
        order = torch.randperm(n, generator=torch_generator(seed, *key, epoch))
        yield from (b for b in order.split(batch) if len(b) == min(batch, n))
        epoch += 1


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is one token.

    The tokenizers library breaks ties by an order that differs between processes, and with it all token ids.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for symbols in split for pair in pairwise(symbols))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for symbols in split:
            at = 0
            while at < len(symbols) - 1:
                if (symbols[at], symbols[at + 1]) == best:
                    symbols[at : at + 2] = ["".join(best)]
                at += 1


def make_tokenizer(folder: Path, words: Iterable[str], length: int) -> CLIPTokenizer:
    """A CLIP tokenizer to which each of `words` is one token; unknown words fall to bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(sorted(words))
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    made: Any = CLIPTokenizer
    return made(vocab=vocab, merges=merges, model_max_length=length)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v prediction (as Stable Diffusion 2)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def cosine(step: int, steps: int, warm: int) -> float:
    """Share of the learning rate at a step: a warm-up, then half a cosine."""
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of all images."""
    parts = [vae.encode(to_input(chunk)).latent_dist for chunk in images.split(256)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


class TextAndUNet(nn.Module):
    """The text encoder and U-Net, as one module to train."""

    def __init__(self, text: Any, unet: Any) -> None:
        super().__init__()
        self.text, self.unet = text, unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Prediction (B, C, h, w) for noisy latents (B, C, h, w), timesteps (B,) and token ids (B, L)."""
        context = self.text(ids).last_hidden_state
        predicted: Tensor = self.unet(noisy, timesteps, encoder_hidden_states=context).sample
        return predicted


def pipeline(tokenizer: CLIPTokenizer, text: Any, unet: Any, vae: Any, scheduler: Any) -> Any:
    """A `StableDiffusionPipeline` of these parts."""
    pipe: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Writes the pipeline in diffusers layout with float16 weights, replacing what is there."""
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    parts = {name: copy.deepcopy(getattr(pipe, name)).half() for name in ("text_encoder", "unet", "vae")}
    for part in parts.values():  # where a model came from is nobody's business
        part.config._name_or_path = ""
    pipeline(pipe.tokenizer, parts["text_encoder"], parts["unet"], parts["vae"], pipe.scheduler).save_pretrained(
        partial, safe_serialization=True
    )
    write_vocabulary(partial / "tokenizer")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_vocabulary(folder: Path) -> None:
    """Writes vocab.json and merges.txt from tokenizer.json: what CLIP tokenizers of transformers 4 read."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def write_card(target: Path, card: Mapping[str, Any], text: str) -> None:
    """card.json and README.md of a bundled model."""
    for name, data in ("card.json", json.dumps(card, indent=1) + "\n"), ("README.md", text):
        with atomic_write(target / name) as handle:
            handle.write(data.encode())


def contact_sheet(images: Tensor, captions: list[str], path: Path, columns: int = 8, zoom: int = 3) -> None:
    """A grid of samples with their captions below."""
    size = images.shape[1] * zoom
    font = ImageFont.truetype(str(font_path()), 10)
    width, height = size + 16, size + 52
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * width + 8, rows * height + 8), "white")
    pen = ImageDraw.Draw(page)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + i % columns * width, 8 + i // columns * height
        page.paste(Image.fromarray(image.numpy()).resize((size, size), Image.Resampling.NEAREST), (x, y))
        lines = textwrap.wrap(caption, 18)[:4]
        pen.multiline_text((x, y + size + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    with atomic_write(path) as handle:
        page.save(handle, format="PNG", optimize=True)


def weight_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each weight file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.safetensors"))
    }


@torch.no_grad()
def restored(vae: Any, images: Tensor) -> Tensor:
    """Images (N, S, S, 3) uint8 encoded and decoded again."""
    parts = [vae.decode(vae.encode(to_input(c)).latent_dist.mean).sample.clamp(-1, 1) for c in images.split(256)]
    return torch.cat(parts).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 images, in dB."""
    return float(10 * torch.log10(255**2 / F.mse_loss(a.float(), b.float())))
