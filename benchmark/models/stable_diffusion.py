"""Stable Diffusion 1.x and 2.x in diffusers layout: a CLIP text encoder, a U-Net, a VAE."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from dualcl.benchmark.core.domain import Site
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.lean import make_lean
from dualcl.benchmark.models.noise_schedule import NoiseSchedule
from dualcl.benchmark.models.text_to_image import BaseConfig, ModelInfo, Text, TextToImage, Vocabulary
from dualcl.benchmark.models.weights import state_hash

#: settings of a U-Net that ask for further inputs, which it does without in silence, or else fails; and what does not
MORE_INPUTS: Mapping[str, tuple[Any, ...]] = {
    "time_cond_proj_dim": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "attention_type": (None, "default"),
    "dual_cross_attention": (None, False),
}


class StableDiffusion(TextToImage):
    """Tokenizer, CLIP text encoder, U-Net, VAE and noise schedule; all frozen and in evaluation mode."""

    title = "Stable Diffusion 1.x and 2.x"
    pipeline = StableDiffusionPipeline.__name__
    takes_images = True
    parts: ClassVar[Mapping[str, Any]] = {
        "tokenizer": CLIPTokenizer,
        "scheduler": NoiseSchedule,
        "text_encoder": CLIPTextModel,
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
    }

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
        self.network = unet
        attentions = {n: unet.get_submodule(n.rpartition(".")[0]) for n in cross_attention_sites(unet)}
        # some U-Nets have a second self-attention there
        self.text_only = frozenset(n for n, a in attentions.items() if getattr(a, "is_cross_attention", True))
        if unet.config.get("encoder_hid_dim_type"):  # what they read is projected first
            self.text_only = frozenset()
        self.device = torch.device(device)
        for part in (text_encoder, unet, vae):
            part.requires_grad_(False).eval().to(self.device)
        make_lean(unet)
        length = int(min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings))
        self.vocabularies = (Vocabulary(tokenizer, text_encoder, length),)
        size = unet.config.sample_size
        hashes = {p: state_hash(getattr(self, p).state_dict()) for p in ("text_encoder", "unet", "vae")}
        self.info = ModelInfo(
            name=name,
            weights=weights,
            weights_sha256=hashlib.sha256("".join(hashes.values()).encode()).hexdigest(),
            parts=hashes,
            image_size=size * 2 ** (len(vae.config.block_out_channels) - 1),
            latent_shape=(unet.config.in_channels, size, size),
            prediction_type=scheduler.config.prediction_type,
            timesteps=scheduler.config.num_train_timesteps,
        )

    @classmethod
    def reads(cls, index: Mapping[str, Any]) -> bool:
        """Whatever has one text encoder and a U-Net."""
        return not {"text_encoder_2", "transformer", "prior"} & index.keys()

    @classmethod
    def built(cls, parts: dict[str, Any], config: BaseConfig, **about: Any) -> StableDiffusion:
        """A model of loaded parts, sites in float32; UserError when they do not fit."""
        _check_fit(parts, config.model)
        for site in cross_attention_sites(parts["unet"]).values():
            site.module.float()
        if config.gradient_checkpointing:
            parts["unet"].enable_gradient_checkpointing()
        return cls(**parts, **about)

    def sites(self) -> dict[str, Site]:
        """K and V of every cross-attention."""
        return cross_attention_sites(self.unet)

    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Last hidden states (N, L, D) of the text encoder; `images` (N, n, D) where those are read."""
        further = {} if self.images is None else {"images": self.images(prompts)}
        return Text(self.text_encoder(self.vocabularies[0].ids(prompts)).last_hidden_state, **further)

    def predict(self, noisy: Tensor, times: Tensor, text: Text) -> Tensor:
        """The predicted noise or velocity (B, C, h, w), float32."""
        dtype, given = self.unet.conv_in.weight.dtype, text.further.get("images")
        states: Any = text.states.to(dtype)
        reading: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if given is not None and self.images is not None:
            states, reading = (states, [given.to(dtype)]), self.images.on(self.unet)
        with reading:
            out: Tensor = self.unet(noisy.to(dtype), times, encoder_hidden_states=states).sample
        return out.float()

    def save(self, folder: Path, state: Mapping[str, Tensor], tables: Sequence[Tensor]) -> None:
        """Writes stock parts: a U-Net with the weights `state`, a text encoder with another token table.

        All in float32: half precision would round updates, and parts of mixed precision do not run in a stock pipeline.
        """
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(self.unet.config)
        unet.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        pipeline: Any = StableDiffusionPipeline(
            vae=copy.deepcopy(self.vae).float(),
            text_encoder=self._with_table(tables[0]),
            tokenizer=self.tokenizer,
            unet=unet.eval(),
            scheduler=DDIMScheduler.from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)

    def _with_table(self, table: Tensor) -> Any:
        """A stock text encoder of the same weights in float32 whose token table is `table`."""
        encoder = self.text_encoder
        plain = CLIPTextModel(type(encoder.config).from_dict({**encoder.config.to_dict(), "vocab_size": len(table)}))
        embedding = encoder.get_input_embeddings()
        prefix = next(n for n, m in encoder.named_modules() if m is embedding)
        state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(f"{prefix}.")}
        plain.load_state_dict({**state, f"{prefix}.weight": table})
        return plain.float().eval()


def _check_fit(parts: dict[str, Any], given: str) -> None:
    unet, vae, text = parts["unet"].config, parts["vae"].config, parts["text_encoder"].config
    if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
        raise UserError(
            f"{given}: the U-Net takes {unet.in_channels} channels and gives {unet.out_channels}, the VAE has "
            f"{vae.latent_channels}; give a text-to-image model (no inpainting or depth variant)"
        )
    for key, harmless in MORE_INPUTS.items():
        if (value := unet.get(key)) not in harmless:
            raise UserError(
                f"{given}: {key}={value!r} in unet/config.json makes the U-Net want more than noise, time and text; "
                f"give a model without it ({StableDiffusion.title})"
            )
    if getattr(text, "use_attention_mask", False):
        raise UserError(
            f"{given}: use_attention_mask in text_encoder/config.json is not supported; give a model without"
        )
    width = unet.encoder_hid_dim if unet.get("encoder_hid_dim_type") else unet.cross_attention_dim
    if width != text.hidden_size:
        raise UserError(
            f"{given}: the U-Net attends to width {width}, the text encoder has {text.hidden_size}; "
            "the parts are of different models"
        )
    if not isinstance(unet.sample_size, int):
        raise UserError(f"{given}: unet/config.json must give sample_size as one number, not {unet.sample_size}")


def cross_attention_sites(unet: nn.Module) -> dict[str, Site]:
    """K and V projections of every cross-attention (`attn2.to_k`, `attn2.to_v`), in the order of the modules."""
    sites = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")) and isinstance(module, nn.Linear):
            sites[name] = Site(name, name, module, 0, module.out_features)
    return sites
