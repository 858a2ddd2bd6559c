"""Stable Diffusion models in diffusers layout: loading, freezing, hashing, and the sites that methods adapt."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from dualcl.benchmark.core.domain import Site
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import check_text, read_json
from dualcl.benchmark.models.bundled import bundled_diffusion, check_bundled
from dualcl.benchmark.models.lean import make_lean
from dualcl.benchmark.models.weights import no_pickles, state_hash

PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BaseConfig:
    """The pretrained text-to-image model."""

    model: str = field(
        default="glyph-diffusion",
        metadata={"help": "a bundled name, a directory in diffusers layout, or a hub id (Stable Diffusion 1.x or 2.x)"},
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub id"})
    variant: str | None = field(default=None, metadata={"help": "file variant of a hub id, e.g. fp16"})
    weights_dtype: Literal["fp32", "fp16", "bf16"] = field(
        default="fp32", metadata={"help": "of the frozen weights; adapted projections stay float32"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, about a third more time"})


@dataclass(frozen=True)
class DiffusionInfo:
    """What a model is, for the record."""

    name: str
    #: where the weights came from: bundled, a directory, a hub id
    weights: str
    #: over all parts
    weights_sha256: str
    #: part -> sha256 of its weights
    parts: dict[str, str]
    image_size: int
    latent_size: int
    prediction_type: str


class Diffusion:
    """Tokenizer, CLIP text encoder, U-Net, VAE and noise schedule; all frozen and in evaluation mode."""

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        unet: Any,
        vae: Any,
        scheduler: Any,
        name: str,
        weights: str,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.text_encoder, self.unet, self.vae = text_encoder, unet, vae
        self.device = torch.device(device)
        for part in (text_encoder, unet, vae):
            part.requires_grad_(False).eval().to(self.device)
        make_lean(unet)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        size = unet.config.sample_size
        hashes = {p: state_hash(getattr(self, p).state_dict()) for p in ("text_encoder", "unet", "vae")}
        self.info = DiffusionInfo(
            name=name,
            weights=weights,
            weights_sha256=hashlib.sha256("".join(hashes.values()).encode()).hexdigest(),
            parts=hashes,
            image_size=size * factor,
            latent_size=size,
            prediction_type=scheduler.config.prediction_type,
        )

    @property
    def text_length(self) -> int:
        """L, tokens of a prompt with start and end."""
        return int(min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings))

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, L) of the prompts, padded; UserError when a prompt does not fit the text encoder."""
        length = self.text_length
        for prompt in prompts:
            check_text(prompt, "a prompt")
        rows = self.tokenizer(list(prompts), padding="max_length", truncation=False, max_length=length).input_ids
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > length:
                raise UserError(f"the prompt {prompt!r} has {len(row)} tokens, the model takes {length}; shorten it")
        return torch.tensor(rows, device=self.device)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Last hidden states (N, L, D) of token ids (N, L)."""
        hidden: Tensor = self.text_encoder(ids).last_hidden_state
        return hidden

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the scaled latents (N, C, h, w), float32, of pixels (N, 3, S, S) in [-1, 1]."""
        scale = self.vae.config.scaling_factor
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mean.float() * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, S, S, 3) uint8 on the CPU of scaled latents (N, C, h, w)."""
        pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
        levels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round()
        return levels.permute(0, 2, 3, 1).to("cpu", torch.uint8)


def offline() -> bool:
    """Whether the hub must not be asked."""
    return any(
        os.environ.get(k, "").lower() in ("1", "true", "yes", "on") for k in ("HF_HUB_OFFLINE", "DUALCL_OFFLINE")
    )


def load_diffusion(config: BaseConfig, device: torch.device | str = "cpu") -> Diffusion:
    """Loads the model that `config` names, everything frozen.

    Raises UserError when it is not there, lacks a part, or its parts do not fit one another.
    """
    bundled = bundled_diffusion()
    source, name, weights = _locate(config.model, bundled)
    _check_layout(source, config.model)
    if config.model in bundled:
        for file, digest in read_json(bundled[config.model] / "card.json")["weights_sha256"].items():
            check_bundled(bundled[config.model] / file, digest)
    dtype = DTYPES[config.weights_dtype]
    common: dict[str, Any] = {}
    if isinstance(source, str):
        common = {"revision": config.revision, "local_files_only": offline()}
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    parts: dict[str, Any] = {}
    classes: dict[str, Any] = {
        "tokenizer": CLIPTokenizer,
        "scheduler": DDPMScheduler,
        "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
    }
    for part, cls in classes.items():
        extra: dict[str, Any] = {}
        if part in ("text_encoder", "unet", "vae"):
            # the name of the argument changed between versions of the libraries, converting afterwards works in all
            extra = {"use_safetensors": True, "variant": config.variant, "output_loading_info": True}
        try:
            with no_pickles(f"base.model={config.model}"):
                loaded = cls.from_pretrained(source, subfolder=part, **common, **extra)
        except UserError:
            raise
        except Exception as error:  # each of the libraries raises kinds of its own
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise _unusable(part, config.model, source, first if len(first) <= 200 else f"{first[:200]}...") from None
        parts[part] = loaded[0] if extra else loaded
        # where its files are missing, the library makes up a tokenizer of a few tokens
        if part == "tokenizer" and len(loaded) < 256:
            raise _unusable(part, config.model, source, "it has no vocabulary")
        # such weights would be random ones, and nobody told
        if lacking := sorted(loaded[1]["missing_keys"]) if extra else []:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise _unusable(part, config.model, source, f"its file lacks {lacking[0]}{more}")
    for part in ("text_encoder", "unet", "vae"):
        parts[part] = parts[part].to(dtype)
    _check_fit(parts, config.model)
    for site in cross_attention_sites(parts["unet"]).values():
        site.module.float()
    if config.gradient_checkpointing:
        parts["unet"].enable_gradient_checkpointing()
    return Diffusion(**parts, name=name, weights=weights, device=device)


def _unusable(part: str, model: str, source: Path | str, reason: str) -> UserError:
    """What is wrong with a part of a model, and the mend."""
    mend = "save or download the model again"
    if isinstance(source, str):
        unset = ", or unset HF_HUB_OFFLINE and DUALCL_OFFLINE" if offline() else ""
        mend = f"check the id, give base.model a local directory{unset}"
    return UserError(f"cannot load {part} of the model {model}: {reason.rstrip('.')}; {mend}")


def _locate(model: str, bundled: dict[str, Path]) -> tuple[Path | str, str, str]:
    """(source for from_pretrained, name, origin of the weights)."""
    if model in bundled:
        return bundled[model], model, "bundled"
    path = Path(model).expanduser()
    if path.is_dir():
        return path, path.name, "local directory"
    if path.exists():
        raise UserError(f"base.model={model} is a file; give a directory in diffusers layout")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"base.model={model} is no directory; {nearest(model, bundled, 'bundled models')}, or give a hub id such "
            "as CompVis/stable-diffusion-v1-4"
        )
    return model, model, f"hub: {model}"


def _check_layout(source: Path | str, given: str) -> None:
    if isinstance(source, str):
        return
    if not (source / "model_index.json").is_file():
        raise UserError(f"{given} holds no model_index.json; give a directory in diffusers layout (save_pretrained)")
    try:
        index = read_json(source / "model_index.json")
    except ValueError:
        index = None
    if not isinstance(index, dict):
        raise UserError(f"{source / 'model_index.json'} is not valid JSON; save or download the model again")
    if "text_encoder_2" in index or "transformer" in index:
        raise UserError(f"{given} is a {index.get('_class_name')}; only Stable Diffusion 1.x and 2.x are supported")
    missing = [p for p in PARTS if not (source / p).is_dir()]
    if missing:
        lacking = ", ".join(f"{p}/" for p in missing)
        raise UserError(f"{given} lacks {lacking}; a Stable Diffusion directory has {', '.join(PARTS)}")


def _check_fit(parts: dict[str, Any], given: str) -> None:
    unet, vae, text = parts["unet"].config, parts["vae"].config, parts["text_encoder"].config
    if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
        raise UserError(
            f"{given}: the U-Net takes {unet.in_channels} channels and gives {unet.out_channels}, the VAE has "
            f"{vae.latent_channels}; give a text-to-image model (no inpainting or depth variant)"
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise UserError(
            f"{given}: the U-Net attends to width {unet.cross_attention_dim}, the text encoder has {text.hidden_size}; "
            "the parts are of different models"
        )
    if not isinstance(unet.sample_size, int):
        raise UserError(f"{given}: unet/config.json must give sample_size as one number, not {unet.sample_size}")
    kind = parts["scheduler"].config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"{given}: prediction type {kind!r} is not supported; epsilon and v_prediction are")


def cross_attention_sites(unet: nn.Module) -> dict[str, Site]:
    """K and V projections of every cross-attention (`attn2.to_k`, `attn2.to_v`), in the order of the modules."""
    sites = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(module, nn.Linear):
            sites[name] = Site(name, name, module, 0, module.out_features)
    return sites
