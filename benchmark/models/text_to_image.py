"""What the benchmark asks of a text-to-image model. A family of models is one file that fulfils it (`families.py`)."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from dualcl.benchmark.core.domain import Site
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import check_text

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SchedulerName = Literal["ddim", "dpm"]


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
class ModelInfo:
    """What a model is, for the record."""

    name: str
    #: where the weights came from: bundled, a directory, a hub id
    weights: str
    #: over all parts
    weights_sha256: str
    #: part -> sha256 of its weights
    parts: dict[str, str]
    image_size: int
    #: (C, h, w)
    latent_shape: tuple[int, int, int]
    prediction_type: str
    #: of the noise schedule
    timesteps: int


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with the text encoder that reads its tokens; a concept has rows in each vocabulary of a model."""

    tokenizer: Any
    encoder: Any
    #: L, tokens of a prompt with start and end
    length: int

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (N, L) of the prompts, padded; UserError when a prompt does not fit the text encoder."""
        for prompt in prompts:
            check_text(prompt, "a prompt")
        rows = self.tokenizer(list(prompts), padding="max_length", truncation=False, max_length=self.length).input_ids
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.length:
                raise UserError(
                    f"the prompt {prompt!r} has {len(row)} tokens, the model takes {self.length}; shorten it"
                )
        return torch.tensor(rows, device=self.encoder.device)


class Text:
    """What a network reads of N prompts: named tensors, N rows each. `text[index]` takes rows of all of them."""

    def __init__(self, states: Tensor, **further: Tensor) -> None:
        #: (N, L, D), which the text-only modules read
        self.states = states
        self.further = further

    def __getitem__(self, index: Any) -> Text:
        return Text(self.states[index], **{name: tensor[index] for name, tensor in self.further.items()})


class ImageReader(Protocol):
    """What a prompt brings beside its text, and layers that read it; see `image_branch.py`."""

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Tokens (P, n, D) of prompts with expanded tokens."""

    def on(self, network: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within it the network reads them."""


class TextToImage(ABC):
    """A pretrained text-to-image model, frozen and in evaluation mode; a family is a subclass.

    B noised latents (C, h, w), N prompts, images of S x S pixels. Passes run under the caller's autocast. VAE and noise
    schedule are those of diffusion models that predict noise or velocity; a family with others has methods of its own.
    """

    #: what its users call it, and diffusers' class of such pipelines
    title: ClassVar[str]
    pipeline: ClassVar[str]
    #: folders of a model directory, and the classes that read them
    parts: ClassVar[Mapping[str, Any]]
    #: what is adapted, and its folder: a U-Net, a transformer
    network: nn.Module
    part: ClassVar[str] = "unet"
    vae: Any
    scheduler: Any
    info: ModelInfo
    vocabularies: tuple[Vocabulary, ...]
    #: modules of the network whose input is `Text.states` alone: sampling runs them once per prompt
    text_only: frozenset[str]
    device: torch.device
    #: parts that were there in half precision alone
    halves: tuple[str, ...] = ()
    #: whether `images` may be set: the network then reads pictures' tokens beside the text
    takes_images: ClassVar[bool] = False
    images: ImageReader | None = None

    @classmethod
    @abstractmethod
    def reads(cls, index: Mapping[str, Any]) -> bool:
        """Whether a model with this `model_index.json` is of the family."""

    @classmethod
    @abstractmethod
    def built(cls, parts: dict[str, Any], config: BaseConfig, **about: Any) -> TextToImage:
        """A model of loaded parts; `about`: name, origin of the weights, device. UserError when they do not fit."""

    @abstractmethod
    def sites(self) -> dict[str, Site]:
        """The projections of the network that methods adapt: K and V of the layers that read the prompt."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Text:
        """What the network reads of prompts with expanded tokens; UserError when one is too long."""

    @abstractmethod
    def predict(self, noisy: Tensor, times: Tensor, text: Text) -> Tensor:
        """The network's prediction (B, C, h, w) float32; times (B,), or one for all; a row of text for each sample."""

    @abstractmethod
    def save(self, folder: Path, state: Mapping[str, Tensor], tables: Sequence[Tensor]) -> None:
        """Writes the model in diffusers layout and float32, with the network's weights `state`.

        `tables` (n, D) are the token tables of the vocabularies.
        """

    def lora_key(self, site: str, form: str) -> str:
        """What LoRA files of the form (diffusers-lora, kohya, peft) call a module of the network."""
        if form == "kohya":
            return f"lora_unet_{site.replace('.', '_')}"
        return f"{self.part if form == 'diffusers-lora' else 'base_model.model'}.{site}"

    @contextlib.contextmanager
    def _vae_in_range(self) -> Iterator[None]:
        """Within it the VAE runs in float32 if float16 would overflow, as its `force_upcast` says."""
        own, kind = self.vae.dtype, self.device.type
        half = own == torch.float16 or (
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        )
        if not (half and self.vae.config.force_upcast):
            yield
            return
        self.vae.float()
        try:
            with torch.autocast(kind, enabled=False):
                yield
        finally:
            self.vae.to(own)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the scaled latents (N, C, h, w), float32, of pixels (N, 3, S, S) in [-1, 1]."""
        scale = self.vae.config.scaling_factor
        with self._vae_in_range():
            posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        mean, std = posterior.mean.float() * scale, posterior.std.float() * scale
        _check_range(mean + std, "the latents that the VAE makes of images")
        return mean, std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, S, S, 3) uint8 on the CPU of scaled latents (N, C, h, w)."""
        with self._vae_in_range():
            pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
        _check_range(pixels, "the images that the VAE makes")
        levels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round()
        return levels.permute(0, 2, 3, 1).to("cpu", torch.uint8)

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` random times of the noise schedule, on the CPU."""
        return torch.randint(0, self.info.timesteps, (n,), generator=generator)

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The noised latents (B, C, h, w), and what the network should predict for them."""
        velocity = self.info.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(clean, noise, times) if velocity else noise
        return self.scheduler.add_noise(clean, noise, times), target

    def noise_weights(self, times: Tensor) -> Tensor:
        """(B,): what turns squared distances between predictions at these times into those between the noises meant."""
        if self.info.prediction_type == "epsilon":
            return torch.ones(len(times), device=times.device)
        # noise = sqrt(share of the signal) * velocity + a part of the noised latents, which all predictions share
        shares: Tensor = self.scheduler.alphas_cumprod.to(times.device)[times].float()
        return shares

    def sampler(self, name: SchedulerName, steps: int) -> Any:
        """A diffusers scheduler with its timesteps set; UserError for too many steps, or settings it cannot do with.

        What `step` draws comes from its `generator`, a list with one for each image. As diffusers' pipelines: latents
        are never clipped, and timesteps are shifted by one.
        """
        if not 1 <= steps < self.info.timesteps:
            raise UserError(f"denoising steps must be from 1 to {self.info.timesteps - 1}, got {steps}")
        cls: Any = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}[name]
        fixed: dict[str, Any] = {"ddim": {"clip_sample": False}, "dpm": {}}[name]
        try:
            scheduler = cls.from_config(self.scheduler.config, steps_offset=1, **fixed)
            scheduler.set_timesteps(steps)
        except (NotImplementedError, ValueError, ImportError) as error:
            raise UserError(
                f"the sampler {name} does not take what {self.info.name} sets in its scheduler_config.json: "
                f"{str(error).strip().splitlines()[0]}; choose another sampler, or change it there"
            ) from None
        return scheduler


def _check_range(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            f"{what} are not finite: its numbers are too large for this precision; set precision=fp32 and "
            "base.weights_dtype=fp32, or bf16 for both"
        )
