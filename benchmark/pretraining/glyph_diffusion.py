"""Makes the bundled tiny Stable Diffusion: tokenizer, CLIP text encoder, U-Net, VAE, from captioned glyphs."""

from __future__ import annotations

import copy
import json
import shutil
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.seeding import derive_seed, numpy_generator
from dualcl.benchmark.pretraining.text_to_image import (
    TextAndUNet,
    batches,
    contact_sheet,
    cosine,
    encode,
    make_scheduler,
    make_tokenizer,
    pipeline,
    psnr,
    restored,
    save_pipeline,
    to_input,
    weight_hashes,
    write_card,
)
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
from dualcl.datasets.drawing.glyphs import COLOURS, draw_glyph

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


# --- models ----------------------------------------------------------------------------------------------------------


def _words() -> set[str]:
    """The words of the captions, and some more."""
    words = {w for name in caption_names() for w in name.split()}
    words |= {*COLOURS, *KINDS, *(w for w in RENDITION_WORDS.values() if w), CLASS_NOUN}
    return words | {
        "a",
        "an",
        "of",
        "on",
        "the",
        "with",
        "and",
        "my",
        "face",
        "image",
        "toy",
        "object",
        "animal",
        "person",
    }


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


# --- training --------------------------------------------------------------------------------------------------------


def _train_vae(vae: Any, images: Tensor, seed: int, recipe: GlyphDiffusionRecipe, say: Say) -> None:
    """Pixel error, and a light pull of the latents to a normal distribution."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=0.0)
    started, running = time.monotonic(), 0.0
    order = batches(len(images), recipe.vae_batch, seed, "glyph-diffusion", "vae")
    vae.train()
    for step in range(recipe.vae_steps):
        inputs = to_input(images[next(order)])
        posterior = vae.encode(inputs).latent_dist
        latents = posterior.sample(torch_generator(seed, "glyph-diffusion", "vae-noise", step))
        error = _pixel_error(vae.decode(latents).sample, inputs)
        pull = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error + 1e-3 * pull
        for group in optimizer.param_groups:
            group["lr"] = recipe.vae_lr * cosine(step, recipe.vae_steps, 30)
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
    order = batches(len(images), recipe.vae_batch, seed, "glyph-diffusion", "decoder")
    mean, std = latents
    running, started = 0.0, time.monotonic()
    for step in range(recipe.decoder_steps):
        index = next(order)
        noise = torch.randn(
            mean[index].shape, generator=torch_generator(seed, "glyph-diffusion", "decoder-noise", step)
        )
        error = _pixel_error(vae.decode(mean[index] + std[index] * noise).sample, to_input(images[index]))
        for group in optimizer.param_groups:
            group["lr"] = recipe.vae_lr * cosine(step, recipe.decoder_steps, 30)
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        running = 0.95 * running + 0.05 * float(error.detach()) if step else float(error.detach())
        if step % 50 == 49:
            seconds = time.monotonic() - started
            say(f"decoder step {step + 1}/{recipe.decoder_steps}  loss {running:.4f}  {seconds:.0f} s")
    vae.requires_grad_(False)


def _train_unet(
    model: TextAndUNet,
    latents: tuple[Tensor, Tensor],
    ids: Tensor,
    empty: Tensor,
    scheduler: Any,
    seed: int,
    recipe: GlyphDiffusionRecipe,
    say: Say,
    snapshot: Callable[[TextAndUNet, int], None] | None,
) -> TextAndUNet:
    """AdamW on the v-prediction error, cosine schedule; returns the moving average of the weights."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=recipe.lr
    )
    average = copy.deepcopy(model).requires_grad_(False)
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    mean, std = latents
    order = batches(len(mean), recipe.unet_batch, seed, "glyph-diffusion", "unet")
    started, running = time.monotonic(), 0.0
    model.train()
    for step in range(recipe.unet_steps):
        index = next(order)
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
            group["lr"] = recipe.lr * cosine(step, recipe.unet_steps, 100)
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
    order = batches(len(drawn.images), 128, seed, "glyph-diffusion", "reader")
    steps = max(1, recipe.reader_epochs * len(drawn.images) // 128)
    for step in range(steps):
        index = next(order)
        glyph, ink = reader(to_input(drawn.images[index]))
        loss = F.cross_entropy(glyph, drawn.glyph[index]) + F.cross_entropy(ink, drawn.ink[index])
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cosine(step, steps, 50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 200 == 199:
            say(f"reader step {step + 1}/{steps}  loss {float(loss.detach()):.3f}")
    return reader.eval()


@torch.no_grad()
def _read(reader: _Reader, images: Tensor) -> tuple[Tensor, Tensor]:
    parts = [reader(to_input(chunk)) for chunk in images.split(256)]
    return torch.cat([g.argmax(1) for g, _ in parts]), torch.cat([i.argmax(1) for _, i in parts])


# --- what is written -------------------------------------------------------------------------------------------------


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
        tokenizer = make_tokenizer(scratch, _words(), recipe.text_length)
        shutil.rmtree(scratch, ignore_errors=True)
        text, unet, vae = make_models(recipe, tokenizer)
        scheduler: Any = make_scheduler()
        _train_vae(vae, drawn.images, seed, recipe, say)
        mean, std = encode(vae, drawn.images)
        scale = 1 / float((mean.square() + std.square()).mean().sqrt())
        vae.register_to_config(scaling_factor=scale)
        say(f"latents: mean {float(mean.mean()):.3f}, standard deviation {1 / scale:.3f}")

        def ids(captions: list[str]) -> Tensor:
            tokens: Tensor = tokenizer(
                captions, padding="max_length", truncation=True, max_length=recipe.text_length, return_tensors="pt"
            ).input_ids
            return tokens

        def snapshot(average: TextAndUNet, step: int) -> None:
            save_pipeline(pipeline(tokenizer, average.text, average.unet, vae, scheduler), target)

        averaged = _train_unet(
            TextAndUNet(text, unet),
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
        save_pipeline(pipeline(tokenizer, averaged.text, averaged.unet, vae, scheduler), target)
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
    seen_again = restored(pipe.vae, test.images)
    again_glyph, again_ink = _read(reader, seen_again)

    def share(right: Tensor) -> float:
        return round(float(right.float().mean()), 4)

    measured: dict[str, Any] = {
        "reader_on_drawings": {"glyph": share(read_glyph == test.glyph), "ink": share(read_ink == test.ink)},
        "reader_on_vae_reconstructions": {
            "glyph": share(again_glyph == test.glyph),
            "ink": share(again_ink == test.ink),
        },
        "vae_psnr": round(psnr(seen_again, test.images), 2),
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
    contact_sheet(images[shown], [scenes[i].caption() for i in shown], target / "samples.png")
    card = {
        "name": "glyph-diffusion",
        "weights_sha256": weight_hashes(target),
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
    write_card(target, card, _card_text(card))
    say(json.dumps(measured))
    return card


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
