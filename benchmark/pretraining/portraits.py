"""Makes the world of portraits: the judge of drawings, and a small Stable Diffusion from captioned portraits."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
import diffusers
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dualcl.benchmark.core.files import atomic_write
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.seeding import derive_seed, numpy_generator
from dualcl.benchmark.models.portraits_judge import Judge, load_judge
from dualcl.benchmark.pretraining.stages import Order, Say, Schedule, card_text, train
from dualcl.benchmark.pretraining.text_to_image import (
    TextAndUNet,
    contact_sheet,
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
from dualcl.datasets.drawing.people import sample_person
from dualcl.datasets.drawing.portrait_captions import (
    caption,
    caption_words,
    sample_asked,
    sample_caption,
    sample_kind,
    sample_named,
)
from dualcl.datasets.drawing.portraits import (
    ATTRIBUTES,
    CAPTIONED,
    HIDDEN,
    SIZE,
    draw_portrait,
    sample_attributes,
    sample_setting,
)

#: words of no caption that prompts may hold
_MORE_WORDS = (
    "my",
    "the",
    "on",
    "image",
    "face",
    "man",
    "woman",
    "character",
    "without",
    "standing",
    "near",
    "next",
    "to",
)


@dataclass(frozen=True)
class JudgeRecipe:
    """How `portraits-judge` is trained."""

    pictures: int = 24000
    test_pictures: int = 4000
    steps: int = 4000
    batch: int = 64
    lr: float = 2e-3


@dataclass(frozen=True)
class PortraitsRecipe:
    """How `portraits-diffusion` is trained. The first `vae_pictures` drawings make the autoencoder."""

    pictures: int = 40000
    vae_pictures: int = 10000
    test_pictures: int = 1000
    vae_steps: int = 12000
    vae_batch: int = 8
    vae_lr: float = 2e-3
    pull: float = 1e-4
    text_steps: int = 1000
    text_batch: int = 64
    text_lr: float = 1e-3
    unet_steps: int = 12000
    unet_batch: int = 16
    lr: float = 1e-3
    ema: float = 0.9993
    caption_dropout: float = 0.1
    decoder_steps: int = 6000
    latent_channels: int = 16
    width: int = 128
    inner_width: int = 192
    text_width: int = 256
    text_length: int = 40
    samples: int = 512
    sampling_steps: int = 25
    guidance_scale: float = 3.0


# --- drawings --------------------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """Pictures (N, 48, 48, 3) uint8, and the place of the value of each of `ATTRIBUTES`, (N, 14)."""

    images: Tensor
    values: Tensor

    def who(self, index: int) -> dict[str, str]:
        """The attributes of a picture by name."""
        return _named(self.values[index].tolist())


def _named(places: Sequence[int]) -> dict[str, str]:
    return {name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), places, strict=True)}


def _sample(part: str, rng: np.random.Generator) -> dict[str, str]:
    """The judge must know everyone, the model no one who is kept for a stream."""
    return sample_attributes(rng) if part.startswith("judge") else sample_person(rng, "pretraining")


def _one(seed: int, part: str, index: int) -> tuple[np.ndarray, list[int]]:
    rng = numpy_generator(seed, "portraits", part, index)
    who = _sample(part, rng)
    return draw_portrait(who, sample_setting(rng)), [ATTRIBUTES[name].index(who[name]) for name in ATTRIBUTES]


def hash_of(value: Any) -> str:
    """sha256 (16 hex digits) of it as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def drawing_hash() -> str:
    """Changes when the drawing does: sha256 (16 hex digits) of some pictures."""
    digest = hashlib.sha256(json.dumps(ATTRIBUTES).encode())
    for i in range(24):
        digest.update(_one(0, "judge-hash", i)[0].tobytes())
    return digest.hexdigest()[:16]


def drawn(folder: Path, part: str, count: int, seed: int, say: Say, piece: int = 2000) -> Drawn:
    """`count` pictures of a part; pieces of them are kept in `folder`."""
    images, values = [], []
    for start in range(0, count, piece):
        stop = min(count, start + piece)
        file = folder / f"{part}-{start}-{stop}.safetensors"
        told = {"of": f"{seed} {drawing_hash()}"}
        kept = _kept(file, told)
        if kept is None:
            say(f"drawing {part} {start} to {stop}")
            made = [_one(seed, part, i) for i in range(start, stop)]
            kept = {
                "images": torch.from_numpy(np.stack([image for image, _ in made])),
                "values": torch.tensor([places for _, places in made]),
            }
            with atomic_write(file) as handle:
                handle.write(save(kept, told))
        images.append(kept["images"])
        values.append(kept["values"])
    return Drawn(torch.cat(images), torch.cat(values))


def _kept(file: Path, told: Mapping[str, str]) -> dict[str, Tensor] | None:
    try:
        with safe_open(file, "pt") as opened:
            if opened.metadata() != told:
                return None
            return {k: opened.get_tensor(k) for k in ("images", "values")}
    except (SafetensorError, OSError, KeyError):
        return None


# --- the judge -------------------------------------------------------------------------------------------------------


def _roughened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, S, S) shifted by up to a pixel; half of them blurred or noisy, as those of a model are."""
    b, _, s, _ = images.shape
    shift = torch.randint(-1, 2, (2, b, 1), generator=generator)
    rows, columns = ((torch.arange(s) + d).clamp_(0, s - 1) for d in shift)
    images = images[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    light = 1 + 0.06 * (2 * torch.rand(b, 3, 1, 1, generator=generator) - 1)
    blur = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = 0.6 * torch.rand(b, 1, 1, 1, generator=generator) * (torch.rand(b, 1, 1, 1, generator=generator) < 0.5)
    noise = 0.1 * torch.rand(b, 1, 1, 1, generator=generator) * (torch.rand(b, 1, 1, 1, generator=generator) < 0.5)
    mixed = torch.lerp(images, blur, share) * light
    return mixed + noise * torch.randn(mixed.shape, generator=generator)


def make_judge(folder: Path, seed: int, recipe: JudgeRecipe, command: str, say: Say) -> dict[str, Any]:
    """Trains the judge and writes the folder portraits_judge."""
    state = folder / "state"
    told = {
        "seed": seed,
        "drawing": drawing_hash(),
        "pictures": recipe.pictures,
        "batch": recipe.batch,
        "lr": recipe.lr,
    }
    known = drawn(state, "judge", recipe.pictures, seed, say)
    order = Order(recipe.pictures, recipe.batch, seed, "portraits", "judge-order")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "portraits", "judge-init"))
        judge = Judge(ATTRIBUTES)

    def loss(step: int) -> Tensor:
        index = order(step)
        generator = torch_generator(seed, "portraits", "judge-rough", step)
        scores = judge(_roughened(to_input(known.images[index]), generator))
        parts = [
            F.cross_entropy(s, known.values[index, i], label_smoothing=0.02) for i, s in enumerate(scores.values())
        ]
        return torch.stack(parts).sum()

    schedule = Schedule(recipe.steps, recipe.lr, flat=0.4, weight_decay=0.05, ema=0.998)
    average = train(state / "judge.safetensors", told, judge, loss, schedule, say)
    # what is measured is what is saved
    average.load_state_dict({k: v.half().float() for k, v in average.state_dict().items()})
    test = drawn(state, "judge-test", recipe.test_pictures, seed, say)
    right = average.read(test.images).eq(test.values).float().mean(0).tolist()
    weights = save({k: v.half().contiguous() for k, v in average.state_dict().items()})
    card = {
        "name": "portraits-judge",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "attributes": ATTRIBUTES,
        "captioned": list(CAPTIONED),
        "command": command,
        "seed": seed,
        "drawing": drawing_hash(),
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in average.parameters()),
        "measured": {
            "n": len(test.images),
            "right": {name: round(value, 4) for name, value in zip(ATTRIBUTES, right, strict=True)},
        },
        "versions": {"torch": torch.__version__},
    }
    target = folder / "portraits_judge"
    with atomic_write(target / "model.safetensors") as handle:
        handle.write(weights)
    write_card(target, card, _judge_text(card))
    say(json.dumps(card["measured"]))
    return card


def _judge_text(card: Mapping[str, Any]) -> str:
    recipe, measured = card["recipe"], card["measured"]
    told = ", ".join(f"{name.replace('_', ' ')} {value:.2%}" for name, value in measured["right"].items())
    paragraphs = [
        f"Reads {len(card['attributes'])} attributes of a 48 px portrait as the suite draws them: a convolutional "
        f"network of {card['parameters']:,} parameters with one head each; float16 safetensors. Its hidden layer is "
        "what `eval.features=portraits-judge` compares.",
        f"Made by `{card['command']}`: {recipe['pictures']} drawings with all values equally often, of everyone, also "
        f"of those kept for streams; {recipe['steps']} steps of {recipe['batch']}, some blurred or noisy; seed "
        f"{card['seed']}, torch {card['versions']['torch']}.",
        f"Right on {measured['n']} other drawings (stored weights): {told}.",
        "Not for anything but this suite: it has seen nothing except drawn portraits.",
    ]
    return card_text("portraits-judge", paragraphs)


# --- the model -------------------------------------------------------------------------------------------------------


def make_vae(recipe: PortraitsRecipe) -> Any:
    """An autoencoder of f = 4 with fresh weights."""
    make: Any = AutoencoderKL
    return make(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=SIZE,
    )


class TextReader(nn.Module):
    """A text encoder, and heads that say from its last token which value of each attribute a caption names, or none."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text
        width = text.config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, len(values) + 1) for values in CAPTIONED.values())

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Logits (B, values + 1) of each attribute of `CAPTIONED`, the last for a caption that does not name it."""
        read = self.text(ids).pooler_output
        return [head(read) for head in self.heads]


def make_text(recipe: PortraitsRecipe, tokenizer: CLIPTokenizer) -> Any:
    """A CLIP text encoder with fresh weights."""
    make_config: Any = CLIPTextConfig
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=3 * recipe.text_width // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=recipe.text_length,
        projection_dim=recipe.text_width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    make: Any = CLIPTextModel
    return make(config)


def make_unet(recipe: PortraitsRecipe) -> Any:
    """A U-Net with fresh weights; on the way up the text is read twice at 6 x 6 (`inner_width`) and at 12 x 12."""
    widths = recipe.width, recipe.inner_width
    unet: Any = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=tuple(max(1, w // 32) for w in widths),  # how many heads
        norm_num_groups=16,
        time_embedding_dim=recipe.text_width // 2,
    )
    unet.set_attn_processor(AttnProcessor())  # at this size twice as fast as fused attention
    return unet


class Portraits:
    """The stages of `portraits-diffusion`; what each needs is made when asked for, or read from `folder`/state."""

    def __init__(self, folder: Path, seed: int, recipe: PortraitsRecipe, say: Say) -> None:
        self.folder, self.state, self.seed, self.recipe, self.say = folder, folder / "state", seed, recipe, say
        self.target = folder / "portraits_diffusion"
        scratch = self.state / "tokenizer"
        self.tokenizer = make_tokenizer(scratch, {*caption_words(), *_MORE_WORDS}, recipe.text_length)
        shutil.rmtree(scratch)
        self.scheduler: Any = make_scheduler()

    def told(self, *names: str) -> dict[str, Any]:
        """What a stage depends on: these fields of the recipe, seed and drawing."""
        return {"seed": self.seed, "drawing": drawing_hash(), **{name: getattr(self.recipe, name) for name in names}}

    def told_with_words(self, *names: str) -> dict[str, Any]:
        """The same of a stage that reads captions."""
        return {**self.told(*names), "words": hash_of(self.tokenizer.get_vocab())}

    _VAE = ("vae_pictures", "vae_batch", "vae_lr", "pull", "latent_channels")
    _TEXT = ("text_steps", "text_batch", "text_lr", "text_width", "text_length")
    _UNET = (
        "vae_steps",
        *("pictures", "unet_batch", "lr", "ema", "caption_dropout", "width", "inner_width"),
        *_TEXT,
        *_VAE,
    )

    def _fresh(self, name: str, make: Callable[[], Any]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "portraits", f"{name}-init"))
            return make()

    def pictures(self, count: int) -> Drawn:
        """The first `count` drawings to train on."""
        return drawn(self.state, "train", count, self.seed, self.say)

    def vae(self) -> Any:
        """The trained autoencoder, its latents scaled to 1."""
        recipe, key = self.recipe, ("portraits", "vae")
        vae = self._fresh("vae", lambda: make_vae(recipe))
        images = self.pictures(recipe.vae_pictures).images
        order = Order(len(images), recipe.vae_batch, self.seed, *key)

        def loss(step: int) -> Tensor:
            inputs = to_input(images[order(step)])
            posterior = vae.encode(inputs).latent_dist
            latents = posterior.sample(torch_generator(self.seed, *key, "noise", step))
            pull = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            return _pixel_error(vae.decode(latents).sample, inputs) + recipe.pull * pull

        schedule = Schedule(recipe.vae_steps, recipe.vae_lr, flat=0.5)
        vae = train(self.state / "vae.safetensors", self.told(*self._VAE), vae, loss, schedule, self.say)
        vae.requires_grad_(False)
        mean, std = encode(vae, images[:2000])
        scale = 1 / float((mean.square() + std.square()).mean().sqrt())
        vae.register_to_config(scaling_factor=scale)
        self.say(f"latents: standard deviation {1 / scale:.3f}, of the noise {float(std.mean()):.3f}")
        return vae

    def text(self) -> Any:
        """A text encoder that has learnt to read captions, as that of Stable Diffusion has: which value each names."""
        recipe, key = self.recipe, ("portraits", "text")
        reader = self._fresh("text", lambda: TextReader(make_text(recipe, self.tokenizer)))

        def loss(step: int) -> Tensor:
            captions, places = [], []
            for i in range(recipe.text_batch):
                rng = numpy_generator(self.seed, *key, step, i)
                who, named = sample_attributes(rng), sample_named(rng)
                captions.append(caption(who, named, kind=sample_kind(rng)))
                places.append([v.index(who[n]) if n in named else len(v) for n, v in CAPTIONED.items()])
            target = torch.tensor(places).T
            errors = [F.cross_entropy(x, t) for x, t in zip(reader(self.ids(captions)), target, strict=True)]
            return torch.stack(errors).mean()

        schedule = Schedule(recipe.text_steps, recipe.text_lr, flat=0.3, weight_decay=0.01)
        told = self.told_with_words(*self._TEXT)
        return train(self.state / "text.safetensors", told, reader, loss, schedule, self.say).text

    def text_and_unet(self, vae: Any) -> TextAndUNet:
        """The text encoder as it is, and the moving average of a U-Net trained on the v-prediction error.

        A text encoder that learns along is disturbed by the U-Net's small gradients: at 1,000 steps a caption then
        lowers the error by 0.001, with the frozen one by 0.007.
        """
        recipe, key, scheduler = self.recipe, ("portraits", "unet"), self.scheduler
        pictures = self.pictures(recipe.pictures)
        self.say("encoding")
        parts = [encode(vae, chunk) for chunk in pictures.images.split(2000)]
        scale = vae.config.scaling_factor
        mean = torch.cat([(m * scale).half() for m, _ in parts])
        std = torch.cat([(s * scale).half() for _, s in parts])
        model = TextAndUNet(self.text().requires_grad_(False), self._fresh("unet", lambda: make_unet(recipe)))
        order = Order(len(mean), recipe.unet_batch, self.seed, *key)

        def loss(step: int) -> Tensor:
            index = order(step)
            generator = torch_generator(self.seed, *key, "noise", step)
            rng = numpy_generator(self.seed, *key, "captions", step)
            captions = [sample_caption(pictures.who(i), rng) for i in index.tolist()]
            captions = ["" if rng.uniform() < recipe.caption_dropout else text for text in captions]
            center = mean[index].float()
            clean = center + std[index].float() * torch.randn(center.shape, generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            # most of them in the middle, where shapes are decided (logit-normal, as Stable Diffusion 3)
            share = torch.randn(len(index), generator=generator).sigmoid()
            timesteps = (share * scheduler.config.num_train_timesteps).long()
            noisy = scheduler.add_noise(clean, noise, timesteps)
            target = scheduler.get_velocity(clean, noise, timesteps)
            return F.mse_loss(model(noisy, timesteps, self.ids(captions)), target)

        def at_save(average: TextAndUNet, step: int) -> None:
            self.save(average, vae)

        schedule = Schedule(recipe.unet_steps, recipe.lr, warm=200, weight_decay=0.01, ema=recipe.ema)
        told = self.told_with_words(*self._UNET)
        file = self.state / "unet.safetensors"
        return train(file, told, model, loss, schedule, self.say, at_save=at_save)

    def ids(self, captions: list[str]) -> Tensor:
        """Token ids (B, L)."""
        tokens: Tensor = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.recipe.text_length,
            return_tensors="pt",
        ).input_ids
        return tokens

    def better_decoder(self, vae: Any) -> Any:
        """Trains the decoder on, the latents as they are: what the U-Net has learnt stays true."""
        recipe, key = self.recipe, ("portraits", "decoder")
        images = self.pictures(recipe.pictures).images
        order = Order(len(images), recipe.vae_batch, self.seed, *key)
        for p in (*vae.decoder.parameters(), *vae.post_quant_conv.parameters()):
            p.requires_grad_(True)

        def loss(step: int) -> Tensor:
            inputs = to_input(images[order(step)])
            with torch.no_grad():
                latents = vae.encode(inputs).latent_dist.sample(torch_generator(self.seed, *key, "noise", step))
            return _pixel_error(vae.decode(latents).sample, inputs)

        schedule = Schedule(recipe.decoder_steps, recipe.vae_lr / 2, flat=0.3, ema=0.998)
        told = self.told(*self._VAE, "vae_steps", "pictures")
        vae = train(self.state / "decoder.safetensors", told, vae, loss, schedule, self.say)
        return vae.requires_grad_(False)

    def save(self, model: TextAndUNet, vae: Any) -> None:
        """Writes the pipeline."""
        save_pipeline(pipeline(self.tokenizer, model.text, model.unet, vae, self.scheduler), self.target)


def _pixel_error(again: Tensor, inputs: Tensor) -> Tensor:
    return F.l1_loss(again, inputs) + 2 * F.mse_loss(again, inputs)


def make_portraits(folder: Path, seed: int, recipe: PortraitsRecipe, command: str, say: Say) -> dict[str, Any]:
    """Trains all parts, or goes on, and writes the folder portraits_diffusion (diffusers layout, card, samples.png)."""
    work = Portraits(folder, seed, recipe, say)
    vae = work.vae()
    model = work.text_and_unet(vae)
    vae = work.better_decoder(vae)
    work.save(model, vae)
    return measure(work, command)


# --- what is measured ------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(pipe: Any, prompts: list[str], seed: int, recipe: PortraitsRecipe) -> Tensor:
    """uint8 images (N, 48, 48, 3), one per prompt."""
    out = []
    for start in range(0, len(prompts), 32):
        chunk = prompts[start : start + 32]
        images = pipe(
            chunk,
            num_inference_steps=recipe.sampling_steps,
            guidance_scale=recipe.guidance_scale,
            generator=[torch_generator(seed, "portraits", "sample", start + i) for i in range(len(chunk))],
            output_type="np",
        ).images
        out.append((images * 255).round().clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.concatenate(out))


def prompted(count: int, seed: int) -> tuple[list[str], list[dict[str, str]]]:
    """Captions of new persons, and what each names."""
    asked = []
    for i in range(count):
        rng = numpy_generator(seed, "portraits", "prompts", i)
        asked.append(sample_asked(sample_person(rng, "pretraining"), rng))
    return [text for text, _ in asked], [named for _, named in asked]


def right_share(judge: Judge, images: Tensor, named: list[dict[str, str]]) -> dict[str, float]:
    """Share of what was asked for that the judge sees, per attribute and for "all"."""
    seen = judge.read(images).tolist()
    right: dict[str, list[bool]] = {name: [] for name in CAPTIONED}
    for places, asked in zip(seen, named, strict=True):
        read = {name: judge.attributes[name][i] for name, i in zip(judge.attributes, places, strict=True)}
        for name, value in asked.items():
            right[name].append(read[name] == value)
    every = [x for values in right.values() for x in values]
    return {name: round(float(np.mean(values)), 4) for name, values in {"all": every, **right}.items() if values}


def measure(work: Portraits, command: str, judge: Judge | None = None) -> dict[str, Any]:
    """Samples the saved model, lets the judge say what is on the pictures, and writes the cards."""
    recipe, target, say = work.recipe, work.target, work.say
    judge = judge or load_judge()[0]
    pipe: Any = StableDiffusionPipeline.from_pretrained(target, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.set_attn_processor(AttnProcessor())
    test = drawn(work.state, "test", recipe.test_pictures, work.seed, say)
    again = restored(pipe.vae, test.images)
    plain, after = (judge.read(x).eq(test.values).float().mean(0).tolist() for x in (test.images, again))
    texts, named = prompted(recipe.samples, work.seed)
    say(f"sampling {len(texts)} images")
    images = sample(pipe, texts, work.seed, recipe)
    measured = {
        "vae_psnr": round(psnr(again, test.images), 2),
        "judge_on_drawings": dict(zip(ATTRIBUTES, (round(v, 4) for v in plain), strict=True)),
        "judge_on_vae_reconstructions": dict(zip(ATTRIBUTES, (round(v, 4) for v in after), strict=True)),
        "samples": {"n": len(texts), **right_share(judge, images, named)},
    }
    contact_sheet(images[:48], texts[:48], target / "samples.png", columns=8, zoom=3)
    card = {
        "name": "portraits-diffusion",
        "weights_sha256": weight_hashes(target),
        "trained_on": f"{recipe.pictures} captioned drawings, none of a person of a stream",
        "command": command,
        "seed": work.seed,
        "drawing": drawing_hash(),
        "recipe": asdict(recipe),
        "parameters": {n: _count(getattr(pipe, n)) for n in ("text_encoder", "unet", "vae")},
        "measured": measured,
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "captioned": CAPTIONED,
        "hidden": HIDDEN,
    }
    write_card(target, card, _card_text(card))
    say(json.dumps(measured))
    return card


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _card_text(card: Mapping[str, Any]) -> str:
    """The model card as Markdown, every number from `card`."""
    recipe, measured, size, versions = card["recipe"], card["measured"], card["parameters"], card["versions"]
    samples = measured["samples"]
    wrap = textwrap.TextWrapper(116, break_on_hyphens=False, break_long_words=False)

    def listed(shares: Mapping[str, float]) -> str:
        return ", ".join(f"{k.replace('_', ' ')} {v:.1%}" for k, v in shares.items() if k not in ("n", "all"))

    paragraphs = [
        "A small Stable Diffusion of portraits at 48 px, of diffusers' and transformers' own classes. Text encoder "
        f"{size['text_encoder']:,}, U-Net {size['unet']:,}, autoencoder {size['vae']:,} parameters; v prediction; "
        "float16 safetensors. `StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)` loads it.",
        f"Made by `{card['command']}` on {card['trained_on']}; seed {card['seed']}, torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}, transformers {versions['transformers']}. Autoencoder "
        f"{recipe['vae_steps']} steps of {recipe['vae_batch']}; text encoder {recipe['text_steps']} steps of "
        f"{recipe['text_batch']} on what captions name, then frozen; U-Net "
        f"{recipe['unet_steps']} steps of {recipe['unet_batch']}, of which the moving average is kept; then the "
        f"decoder alone {recipe['decoder_steps']} steps. Each caption names 3 to 6 of the attributes, "
        f"{recipe['caption_dropout']:.0%} are dropped.",
        f"Measured: the autoencoder restores {recipe['test_pictures']} other drawings at {measured['vae_psnr']} dB; "
        f"the judge then reads {listed(measured['judge_on_vae_reconstructions'])}. Of what {samples['n']} prompts name "
        f"(DDIM, {recipe['sampling_steps']} steps, guidance {recipe['guidance_scale']}) it sees {samples['all']:.1%}: "
        f"{listed(samples)}.",
    ]
    text = "# portraits-diffusion\n\n" + "\n\n".join(wrap.fill(p) for p in paragraphs)
    text += "\n\n![48 samples with their captions](samples.png)\n\n"
    text += "Not for anything but this suite: it has seen nothing except drawn portraits.\n\n## Attributes\n\n"
    rows = [f"- {name.replace('_', ' ')}: {', '.join(values)}" for name, values in card["captioned"].items()]
    rows += [f"- {name} (no caption names it): {', '.join(values)}" for name, values in card["hidden"].items()]
    wrap.subsequent_indent = "  "
    return text + "\n".join(wrap.fill(row) for row in rows) + "\n"
