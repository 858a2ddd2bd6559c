"""What the benchmark asks of a text-to-image model. A family of models is one file that fulfils it (`families.py`)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from dualcl.benchmark.core.domain import Site
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import check_text, no_pickles

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

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Any) -> Text:
        return Text(self.states[index], **{name: tensor[index] for name, tensor in self.further.items()})


class TextToImage(ABC):
    """A pretrained text-to-image model, frozen and in evaluation mode.

    B noised latents, N prompts, latents (C, h, w), images of S x S pixels. Passes run under the caller's autocast.
    """

    #: what its users call it, for error messages
    title: ClassVar[str]
    #: what is adapted: a U-Net, a transformer
    network: nn.Module
    info: ModelInfo
    vocabularies: tuple[Vocabulary, ...]
    device: torch.device

    @classmethod
    @abstractmethod
    def reads(cls, index: Mapping[str, Any]) -> bool:
        """Whether a model with this `model_index.json` is of the family."""

    @classmethod
    @abstractmethod
    def load(
        cls, source: Path | str, config: BaseConfig, name: str, weights: str, device: torch.device | str
    ) -> TextToImage:
        """The model at `source` (a directory, or a hub id); UserError when a part lacks or does not fit the others."""

    @abstractmethod
    def sites(self) -> dict[str, Site]:
        """The projections of the network that methods adapt: K and V of the layers that read the prompt."""

    @property
    @abstractmethod
    def text_only(self) -> frozenset[str]:
        """Modules of the network whose input is `Text.states` alone: sampling runs them once per prompt."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Text:
        """What the network reads of prompts with expanded tokens; UserError when one is too long."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the scaled latents (N, C, h, w), float32, of pixels (N, 3, S, S) in [-1, 1]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, S, S, 3) uint8 on the CPU of scaled latents (N, C, h, w)."""

    @abstractmethod
    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` random times of the noise schedule, on the CPU."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The noised latents (B, C, h, w), and what the network should predict for them."""

    @abstractmethod
    def predict(self, noisy: Tensor, times: Tensor, text: Text) -> Tensor:
        """The network's prediction (B, C, h, w) float32; times (B,), or one for all; a row of text for each sample."""

    @abstractmethod
    def sampler(self, name: SchedulerName, steps: int) -> Any:
        """A diffusers scheduler with its timesteps set: `timesteps`, `init_noise_sigma`, `step`.

        UserError for too many steps.
        """

    @abstractmethod
    def pipeline(self) -> str:
        """Name of diffusers' pipeline class."""

    @abstractmethod
    def lora_key(self, site: str, form: str) -> str:
        """What LoRA files of the form (diffusers-lora, kohya, peft) call a module of the network."""

    @abstractmethod
    def save(self, folder: Path, state: Mapping[str, Tensor], tables: Sequence[Tensor]) -> None:
        """Writes the model in diffusers layout, in float32.

        With the network's weights `state`, and for each vocabulary its token table (n, D).
        """


def offline() -> bool:
    """Whether the hub must not be asked."""
    return any(
        os.environ.get(k, "").lower() in ("1", "true", "yes", "on") for k in ("HF_HUB_OFFLINE", "DUALCL_OFFLINE")
    )


def load_parts(source: Path | str, config: BaseConfig, classes: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a model in diffusers layout, networks in `config.weights_dtype`; UserError names one that lacks."""
    common: dict[str, Any] = {}
    if isinstance(source, str):
        common = {"revision": config.revision, "local_files_only": offline()}
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    parts: dict[str, Any] = {}
    for part, cls in classes.items():
        extra: dict[str, Any] = {}
        if issubclass(cls, nn.Module):
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
        # where its files are missing, the library makes up a tokenizer of a few tokens
        if part.startswith("tokenizer") and len(loaded) < 256:
            raise _unusable(part, config.model, source, "it has no vocabulary")
        # such weights would be random ones, and nobody told
        if lacking := sorted(loaded[1]["missing_keys"]) if extra else []:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise _unusable(part, config.model, source, f"its file lacks {lacking[0]}{more}")
        parts[part] = loaded[0] if extra else loaded
    return {n: p.to(DTYPES[config.weights_dtype]) if isinstance(p, nn.Module) else p for n, p in parts.items()}


def _unusable(part: str, model: str, source: Path | str, reason: str) -> UserError:
    """What is wrong with a part of a model, and the mend."""
    mend = "save or download the model again"
    if isinstance(source, str):
        unset = ", or unset HF_HUB_OFFLINE and DUALCL_OFFLINE" if offline() else ""
        mend = f"check the id, give base.model a local directory{unset}"
    return UserError(f"cannot load {part} of the model {model}: {reason.rstrip('.')}; {mend}")
