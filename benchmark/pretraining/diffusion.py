"""Makes the bundled tiny Stable Diffusion: tokenizer, CLIP text encoder, U-Net, VAE, from captioned glyphs."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
import diffusers
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dualcl.benchmark.core.files import atomic_write
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.seeding import derive_seed, numpy_generator
from dualcl.datasets.drawing.captions import (
    CLASS_NOUN,
    INK_AND_PAPER,
    KINDS,
    RENDITION_WORDS,
    Scene,
    caption_names,
    sample_caption,
    sample_look,
    sample_scene,
)
from dualcl.datasets.drawing.glyphs import COLOURS, draw_glyph, font_path

Say = Callable[[str], None]


@dataclass(frozen=True)
class GlyphDiffusionRecipe:
    """How `glyph-diffusion` is trained. `classes`: the first so many pretraining glyphs, 0 for all."""

    classes: int = 64
    per_class: int = 500
    vae_steps: int = 600
    unet_steps: int = 6400
    decoder_steps: int = 900
    reader_epochs: int = 4
    vae_batch: int = 64
    unet_batch: int = 32
    vae_lr: float = 2e-3
    lr: float = 1e-3
    caption_dropout: float = 0.1
    ema: float = 0.999
    image_size: int = 32
    latent_channels: int = 4
    text_width: int = 128
    text_length: int = 24
    samples_per_class: int = 8
    sampling_steps: int = 25
    guidance_scale: float = 4.0


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """Captioned drawings: images (N, size, size, 3) uint8, captions, and what the reader must say: (N,) each."""

    images: Tensor
    captions: list[str]
    glyph: Tensor
    ink: Tensor


def draw(names: list[str], part: str, per_class: int, seed: int, size: int) -> Drawn:
    """`per_class` random captioned drawings of each glyph."""
    codes, inks = caption_names(), list(COLOURS)
    images = np.empty((len(names) * per_class, size, size, 3), dtype=np.uint8)
    captions: list[str] = []
    glyphs, ink = [], []
    for g, name in enumerate(names):
        for i in range(per_class):
            rng = numpy_generator(seed, "glyph-diffusion", name, part, i)
            scene = sample_scene(name, rng)
            images[len(captions)] = draw_glyph(codes[name], sample_look(scene, rng), size)
            captions.append(sample_caption(scene, rng))
            glyphs.append(g)
            ink.append(inks.index(scene.ink))
    return Drawn(torch.from_numpy(images), captions, torch.tensor(glyphs), torch.tensor(ink))


def _to_input(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _batches(n: int, batch: int, seed: int, *key: int | str) -> Iterator[Tensor]:
    """Index batches without end: shuffled passes, the last short batch of each left out."""
    epoch = 0
    while True:
        order = torch.randperm(n, generator=torch_generator(seed, *key, epoch))
        yield from (b for b in order.split(batch) if len(b) == min(batch, n))
        epoch += 1


# --- models ----------------------------------------------------------------------------------------------------------


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


def make_tokenizer(folder: Path, length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learnt on the words of the captions; unknown words fall to bytes."""
    words = {w for name in caption_names() for w in name.split()}
    words |= {*COLOURS, *KINDS, *(w for w in RENDITION_WORDS.values() if w), CLASS_NOUN}
    words |= {"a", "an", "of", "on", "the", "with", "and", "my", "face", "image", "toy", "object", "animal", "person"}
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


def make_models(recipe: GlyphDiffusionRecipe, tokenizer: CLIPTokenizer) -> tuple[Any, Any, Any]:
    """(text encoder, U-Net, VAE) with fresh weights."""
    text: Any = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=2 * recipe.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=recipe.text_length,
            projection_dim=recipe.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet: Any = UNet2DConditionModel(
        sample_size=recipe.image_size // 4,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    vae: Any = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=recipe.image_size,
    )
    return text, unet, vae


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


# --- training --------------------------------------------------------------------------------------------------------


def _cosine(step: int, steps: int, warm: int) -> float:
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _train_vae(vae: Any, images: Tensor, seed: int, recipe: GlyphDiffusionRecipe, say: Say) -> None:
    """Pixel error, and a light pull of the latents to a normal distribution."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=0.0)
    started, running = time.monotonic(), 0.0
    batches = _batches(len(images), recipe.vae_batch, seed, "glyph-diffusion", "vae")
    vae.train()
    for step in range(recipe.vae_steps):
        inputs = _to_input(images[next(batches)])
        posterior = vae.encode(inputs).latent_dist
        latents = posterior.sample(torch_generator(seed, "glyph-diffusion", "vae-noise", step))
        error = _pixel_error(vae.decode(latents).sample, inputs)
        pull = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error + 1e-3 * pull
        for group in optimizer.param_groups:
            group["lr"] = recipe.vae_lr * _cosine(step, recipe.vae_steps, 30)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        running = 0.95 * running + 0.05 * float(error.detach()) if step else float(error.detach())
        if step % 50 == 49:
            say(f"vae step {step + 1}/{recipe.vae_steps}  loss {running:.4f}  {time.monotonic() - started:.0f} s")
    vae.eval().requires_grad_(False)


def _pixel_error(restored: Tensor, inputs: Tensor) -> Tensor:
    """L1 on pixels and, for edges, on the differences of neighbours."""
    error = F.l1_loss(restored, inputs)
    for dim in (2, 3):
        error = error + 0.5 * F.l1_loss(restored.diff(dim=dim), inputs.diff(dim=dim))
    return error


def _train_decoder(
    vae: Any, images: Tensor, latents: tuple[Tensor, Tensor], seed: int, recipe: GlyphDiffusionRecipe, say: Say
) -> None:
    """Trains the decoder on, the latents as they are: what the U-Net has learnt stays true."""
    params = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for p in params:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(params, lr=recipe.vae_lr, weight_decay=0.0)
    batches = _batches(len(images), recipe.vae_batch, seed, "glyph-diffusion", "decoder")
    mean, std = latents
    running, started = 0.0, time.monotonic()
    for step in range(recipe.decoder_steps):
        index = next(batches)
        noise = torch.randn(
            mean[index].shape, generator=torch_generator(seed, "glyph-diffusion", "decoder-noise", step)
        )
        error = _pixel_error(vae.decode(mean[index] + std[index] * noise).sample, _to_input(images[index]))
        for group in optimizer.param_groups:
            group["lr"] = recipe.vae_lr * _cosine(step, recipe.decoder_steps, 30)
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        running = 0.95 * running + 0.05 * float(error.detach()) if step else float(error.detach())
        if step % 50 == 49:
            seconds = time.monotonic() - started
            say(f"decoder step {step + 1}/{recipe.decoder_steps}  loss {running:.4f}  {seconds:.0f} s")
    vae.requires_grad_(False)


@torch.no_grad()
def _encode(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of all images."""
    parts = [vae.encode(_to_input(chunk)).latent_dist for chunk in images.split(256)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


class _Trained(nn.Module):
    """The text encoder and U-Net, trained together."""

    def __init__(self, text: Any, unet: Any) -> None:
        super().__init__()
        self.text, self.unet = text, unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Prediction (B, C, h, w) for noisy latents (B, C, h, w), timesteps (B,) and token ids (B, L)."""
        context = self.text(ids).last_hidden_state
        predicted: Tensor = self.unet(noisy, timesteps, encoder_hidden_states=context).sample
        return predicted


def _train_unet(
    model: _Trained,
    latents: tuple[Tensor, Tensor],
    ids: Tensor,
    empty: Tensor,
    scheduler: Any,
    seed: int,
    recipe: GlyphDiffusionRecipe,
    say: Say,
    snapshot: Callable[[_Trained, int], None] | None,
) -> _Trained:
    """AdamW on the v-prediction error, cosine schedule; returns the moving average of the weights."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=recipe.lr
    )
    average = copy.deepcopy(model).requires_grad_(False)
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    mean, std = latents
    batches = _batches(len(mean), recipe.unet_batch, seed, "glyph-diffusion", "unet")
    started, running = time.monotonic(), 0.0
    model.train()
    for step in range(recipe.unet_steps):
        index = next(batches)
        generator = torch_generator(seed, "glyph-diffusion", "unet-noise", step)
        clean = mean[index] + std[index] * torch.randn(mean[index].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        # most of them in the middle, where shapes are decided (logit-normal, as Stable Diffusion 3)
        share = torch.randn(len(index), generator=generator).sigmoid()
        timesteps = (share * scheduler.config.num_train_timesteps).long()
        dropped = torch.rand(len(index), 1, generator=generator) < recipe.caption_dropout
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps, torch.where(dropped, empty, ids[index])), target)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _cosine(step, recipe.unet_steps, 100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(recipe.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_([a for a, _ in pairs], [p.detach() for _, p in pairs], 1 - keep)
        running = 0.98 * running + 0.02 * float(loss.detach()) if step else float(loss.detach())
        if step % 50 == 49:
            say(f"unet step {step + 1}/{recipe.unet_steps}  loss {running:.4f}  {time.monotonic() - started:.0f} s")
        if snapshot is not None and step % 600 == 599:
            snapshot(average, step + 1)
    return average.eval()


class _Reader(nn.Module):
    """Reads glyph and ink of a drawing: only for measuring, not shipped."""

    def __init__(self, glyphs: int, inks: int) -> None:
        super().__init__()

        def stage(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.GELU())

        self.body = nn.Sequential(stage(3, 48), stage(48, 96), stage(96, 192), nn.Flatten(), nn.Linear(192 * 16, 256))
        self.glyph, self.ink = nn.Linear(256, glyphs), nn.Linear(256, inks)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, glyphs) and (B, inks) of images (B, 3, 32, 32) in [-1, 1]."""
        hidden = F.gelu(self.body(images))
        return self.glyph(hidden), self.ink(hidden)


def _train_reader(drawn: Drawn, seed: int, recipe: GlyphDiffusionRecipe, say: Say) -> _Reader:
    reader = _Reader(int(drawn.glyph.max()) + 1, len(COLOURS))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.05)
    batches = _batches(len(drawn.images), 128, seed, "glyph-diffusion", "reader")
    steps = max(1, recipe.reader_epochs * len(drawn.images) // 128)
    for step in range(steps):
        index = next(batches)
        glyph, ink = reader(_to_input(drawn.images[index]))
        loss = F.cross_entropy(glyph, drawn.glyph[index]) + F.cross_entropy(ink, drawn.ink[index])
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * _cosine(step, steps, 50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 200 == 199:
            say(f"reader step {step + 1}/{steps}  loss {float(loss.detach()):.3f}")
    return reader.eval()


@torch.no_grad()
def _read(reader: _Reader, images: Tensor) -> tuple[Tensor, Tensor]:
    parts = [reader(_to_input(chunk)) for chunk in images.split(256)]
    return torch.cat([g.argmax(1) for g, _ in parts]), torch.cat([i.argmax(1) for _, i in parts])


# --- what is written -------------------------------------------------------------------------------------------------


def _pipeline(tokenizer: CLIPTokenizer, text: Any, unet: Any, vae: Any, scheduler: Any) -> Any:
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
    _pipeline(pipe.tokenizer, parts["text_encoder"], parts["unet"], parts["vae"], pipe.scheduler).save_pretrained(
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


@torch.no_grad()
def _sample(pipe: Any, prompts: list[str], seed: int, recipe: GlyphDiffusionRecipe) -> Tensor:
    """uint8 images (N, size, size, 3), one per prompt."""
    out: list[NDArray[np.float32]] = []
    for start in range(0, len(prompts), 64):
        chunk = prompts[start : start + 64]
        generators = [torch_generator(seed, "glyph-diffusion", "sample", start + i) for i in range(len(chunk))]
        images = pipe(
            chunk,
            num_inference_steps=recipe.sampling_steps,
            guidance_scale=recipe.guidance_scale,
            generator=generators,
            output_type="np",
        ).images
        out.append(images)
    return torch.from_numpy((np.concatenate(out) * 255).round().clip(0, 255).astype(np.uint8))


def _sheet(images: Tensor, captions: list[str], path: Path, columns: int = 8, zoom: int = 3) -> None:
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


def _folder_hash(folder: Path) -> dict[str, str]:
    """sha256 of each weight file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.safetensors"))
    }


def make_glyph_diffusion(
    folder: Path, seed: int, recipe: GlyphDiffusionRecipe, command: str, say: Say
) -> dict[str, Any]:
    """Trains all parts and writes the folder glyph_diffusion (diffusers layout, model card, samples.png)."""
    names = list(caption_names())[: recipe.classes or None]
    target = folder / "glyph_diffusion"
    scratch = folder / ".glyph_diffusion.tokenizer"
    began = time.monotonic()
    say(f"drawing {len(names)} glyphs x {recipe.per_class} captioned images")
    drawn = draw(names, "train", recipe.per_class, seed, recipe.image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "glyph-diffusion", "init"))
        tokenizer = make_tokenizer(scratch, recipe.text_length)
        shutil.rmtree(scratch, ignore_errors=True)
        text, unet, vae = make_models(recipe, tokenizer)
        scheduler: Any = make_scheduler()
        _train_vae(vae, drawn.images, seed, recipe, say)
        mean, std = _encode(vae, drawn.images)
        scale = 1 / float((mean.square() + std.square()).mean().sqrt())
        vae.register_to_config(scaling_factor=scale)
        say(f"latents: mean {float(mean.mean()):.3f}, standard deviation {1 / scale:.3f}")

        def ids(captions: list[str]) -> Tensor:
            tokens: Tensor = tokenizer(
                captions, padding="max_length", truncation=True, max_length=recipe.text_length, return_tensors="pt"
            ).input_ids
            return tokens

        def snapshot(average: _Trained, step: int) -> None:
            save_pipeline(_pipeline(tokenizer, average.text, average.unet, vae, scheduler), target)

        averaged = _train_unet(
            _Trained(text, unet),
            (mean * scale, std * scale),
            ids(drawn.captions),
            ids([""]),
            scheduler,
            seed,
            recipe,
            say,
            snapshot,
        )
        _train_decoder(vae, drawn.images, (mean, std), seed, recipe, say)
        minutes = (time.monotonic() - began) / 60
        save_pipeline(_pipeline(tokenizer, averaged.text, averaged.unet, vae, scheduler), target)
        reader = _train_reader(drawn, seed, recipe, say)
    return measure(target, names, reader, seed, recipe, command, minutes, say)


def measure(
    target: Path,
    names: list[str],
    reader: _Reader,
    seed: int,
    recipe: GlyphDiffusionRecipe,
    command: str,
    minutes: float,
    say: Say,
) -> dict[str, Any]:
    """Samples the saved model, lets the reader say what is on the pictures, and writes the cards."""
    # what is measured is what is saved
    pipe: Any = StableDiffusionPipeline.from_pretrained(target, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    test = draw(names, "test", recipe.samples_per_class, seed, recipe.image_size)
    read_glyph, read_ink = _read(reader, test.images)
    restored = _restored(pipe.vae, test.images)
    again_glyph, again_ink = _read(reader, restored)

    def share(right: Tensor) -> float:
        return round(float(right.float().mean()), 4)

    measured: dict[str, Any] = {
        "reader_on_drawings": {"glyph": share(read_glyph == test.glyph), "ink": share(read_ink == test.ink)},
        "reader_on_vae_reconstructions": {
            "glyph": share(again_glyph == test.glyph),
            "ink": share(again_ink == test.ink),
        },
        "vae_psnr": round(_psnr(restored, test.images), 2),
    }
    scenes = [
        Scene(name, *INK_AND_PAPER[numpy_generator(seed, "sample", name, k).integers(len(INK_AND_PAPER))])
        for k in range(recipe.samples_per_class)
        for name in names
    ]
    say(f"sampling {len(scenes)} images")
    images = _sample(pipe, [s.caption() for s in scenes], seed, recipe)
    glyph, ink = _read(reader, images)
    right_glyph = torch.tensor([names[g] == s.name for g, s in zip(glyph.tolist(), scenes, strict=True)])
    right_ink = torch.tensor([list(COLOURS)[i] == s.ink for i, s in zip(ink.tolist(), scenes, strict=True)])
    measured["samples"] = {"n": len(scenes), "glyph": share(right_glyph), "ink": share(right_ink)}
    step = max(1, len(scenes) // 64)
    # another glyph in every column and row
    shown = [(i + i // 8 * 5) % len(scenes) for i in range(0, len(scenes), step)][:64]
    _sheet(images[shown], [scenes[i].caption() for i in shown], target / "samples.png")
    card = {
        "name": "glyph-diffusion",
        "weights_sha256": _folder_hash(target),
        "trained_on": f"{len(names)} glyphs of DejaVu Sans x {recipe.per_class} captioned drawings, none a concept",
        "command": command,
        "seed": seed,
        "recipe": asdict(recipe),
        "parameters": {
            n: sum(p.numel() for p in getattr(pipe, n).parameters()) for n in ("text_encoder", "unet", "vae")
        },
        "measured": measured,
        "training": {"minutes": round(minutes, 1), "threads": torch.get_num_threads(), "device": "cpu"},
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "glyphs": names,
    }
    with atomic_write(target / "card.json") as handle:
        handle.write((json.dumps(card, indent=1) + "\n").encode())
    with atomic_write(target / "README.md") as handle:
        handle.write(_card_text(card).encode())
    say(json.dumps(measured))
    return card


@torch.no_grad()
def _restored(vae: Any, images: Tensor) -> Tensor:
    """Images (N, S, S, 3) uint8 encoded and decoded again."""
    parts = [vae.decode(vae.encode(_to_input(c)).latent_dist.mean).sample.clamp(-1, 1) for c in images.split(256)]
    return torch.cat(parts).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def _psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 images, in dB."""
    return float(10 * torch.log10(255**2 / F.mse_loss(a.float(), b.float())))


def _card_text(card: dict[str, Any]) -> str:
    """The model card as Markdown, every number from `card`."""
    recipe, measured, size, versions = card["recipe"], card["measured"], card["parameters"], card["versions"]
    drawings, restored, samples = (
        measured[k] for k in ("reader_on_drawings", "reader_on_vae_reconstructions", "samples")
    )
    wrap = textwrap.TextWrapper(116, break_on_hyphens=False, break_long_words=False)
    paragraphs = [
        "A tiny Stable Diffusion for `glyph-concepts`: the real diffusers and transformers classes at "
        f"{recipe['image_size']} px. Text encoder {size['text_encoder']:,}, U-Net {size['unet']:,}, VAE "
        f"{size['vae']:,} parameters; v prediction; float16 safetensors. "
        "`StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)` loads it.",
        f"Made by `{card['command']}` on {card['trained_on']}, in {card['training']['minutes']} minutes on "
        f"{card['training']['threads']} CPU threads (a busy machine), seed {card['seed']}, torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}, transformers {versions['transformers']}. VAE {recipe['vae_steps']} steps "
        f"of {recipe['vae_batch']}; text encoder and U-Net together {recipe['unet_steps']} steps of "
        f"{recipe['unet_batch']}, of which the moving average of the weights is kept; then the VAE's decoder alone "
        f"{recipe['decoder_steps']} steps, the latents as they are. AdamW, cosine schedules.",
        "Measured (one run): a classifier trained on the same drawings reads the glyph in "
        f"{drawings['glyph']:.1%} and the ink in {drawings['ink']:.1%} of new drawings, in {restored['glyph']:.1%} and "
        f"{restored['ink']:.1%} of the same drawings after the VAE ({measured['vae_psnr']} dB), and the prompted glyph "
        f"in {samples['glyph']:.1%} and the prompted ink in {samples['ink']:.1%} of {samples['n']} samples (DDIM, "
        f"{recipe['sampling_steps']} steps, guidance {recipe['guidance_scale']}).",
    ]
    text = "# glyph-diffusion\n\n" + "\n\n".join(wrap.fill(p) for p in paragraphs)
    text += "\n\n![64 samples with their captions](samples.png)\n\n"
    text += "Not for anything but this suite: it has seen nothing except drawn symbols.\n\n"
    return text + "## Glyphs\n\n" + wrap.fill(", ".join(card["glyphs"]) + ".") + "\n"
