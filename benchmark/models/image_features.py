"""Features of images and prompts for the evaluation of generated images, and the distance between sets of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import dualcl.benchmark.core.compat  # noqa: F401 - before timm and transformers

# isort: split
import timm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.models.bundled import bundled_backbones, bundled_diffusion
from dualcl.benchmark.models.portraits_judge import SIZE, WIDTH, load_judge
from dualcl.benchmark.models.vit import BackboneConfig, load_backbone
from dualcl.benchmark.models.weights import finite, no_pickles, offline, state_hash

Estimator = Literal["biased", "unbiased"]

CLIP = "openai/clip-vit-base-patch32"
BUNDLED = "glyph-vit"
JUDGE = "portraits-judge"
#: images or texts in a forward pass
BATCH = 64


class ImageFeatures(ABC):
    """A frozen model that turns images, and prompts where it reads text, into unit vectors of one space.

    Images are judged whole: resized to the model's input size, not cropped. Always in float32, whatever the autocast.
    """

    name: str
    #: of all weights, as `state_hash`
    sha256: str
    dim: int
    device: torch.device
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    #: what it can say of an image: attribute -> its values
    judged: Mapping[str, Sequence[str]] = MappingProxyType({})
    interpolation: str

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Features (N, D) float32 on the CPU, of L2 norm 1, of uint8 images (N, H, W, 3)."""
        with torch.autocast(self.device.type, enabled=False):
            rows = [F.normalize(self._images(self._pixels(p)).float(), dim=1).cpu() for p in images.split(BATCH)]
        return self._checked(torch.cat([torch.empty(0, self.dim), *rows]), "images")

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor | None:
        """Features (N, D) as those of images; None for a model without a text tower."""
        parts = [torch.empty(0, self.dim)]
        with torch.autocast(self.device.type, enabled=False):
            for start in range(0, len(texts), BATCH):
                rows = self._texts(list(texts[start : start + BATCH]))
                if rows is None:
                    return None
                parts.append(F.normalize(rows.float(), dim=1).cpu())
        return self._checked(torch.cat(parts), "prompts")

    def _checked(self, rows: Tensor, what: str) -> Tensor:
        if not bool(torch.isfinite(rows).all()):
            raise UserError(f"the features of {what} by {self.name} are not finite; choose another eval.features")
        return rows

    def attributes(self, images: Tensor) -> list[dict[str, str]] | None:
        """What uint8 images (N, H, W, 3) show, value by attribute; None for a model that judges none."""
        return None

    @abstractmethod
    def _images(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of normalised pixels (B, 3, S, S)."""

    def _texts(self, texts: list[str]) -> Tensor | None:
        """Features (B, D) of texts."""
        return None

    def _pixels(self, images: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) of uint8 images (B, H, W, 3)."""
        x = images.to(self.device).permute(0, 3, 1, 2).float().div(255)
        if tuple(x.shape[2:]) != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode=self.interpolation, align_corners=False, antialias=True)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x.clamp(0, 1) - mean) / std  # bicubic resizing overshoots


class BackboneFeatures(ImageFeatures):
    """Final features of a bundled or timm ViT; reads no text."""

    def __init__(self, name: str, device: torch.device) -> None:
        model, info = load_backbone(BackboneConfig(name=name))
        self.model: Any = model.to(device)
        self.name, self.sha256, self.device = name, info.weights_sha256, device
        self.size, self.mean, self.std = info.input_size, info.mean, info.std
        self.interpolation = "bilinear" if info.interpolation == "bilinear" else "bicubic"
        with torch.no_grad():
            self.dim = int(self._images(torch.zeros(1, 3, self.size, self.size, device=device)).shape[1])

    def _images(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.forward_head(self.model.forward_features(pixels), pre_logits=True)
        return features


class JudgeFeatures(ImageFeatures):
    """The hidden layer of the portraits' judge, which also reads attributes; reads no text."""

    name, dim, size, interpolation = JUDGE, WIDTH, SIZE, "bicubic"
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, device: torch.device) -> None:
        judge, card = load_judge()
        self.judge, self.device, self.sha256 = judge.to(device), device, card["sha256"]
        self.judged = judge.attributes

    def _images(self, pixels: Tensor) -> Tensor:
        return self.judge.features(pixels)

    @torch.no_grad()
    def attributes(self, images: Tensor) -> list[dict[str, str]]:
        """What uint8 images (N, H, W, 3) show, value by attribute."""
        with torch.autocast(self.device.type, enabled=False):
            pixels = [self._pixels(chunk) for chunk in images.split(BATCH)]
            scores = [{k: s.argmax(1).tolist() for k, s in self.judge(p).items()} for p in pixels]
        return [
            {name: self.judged[name][places[i]] for name, places in part.items()}
            for part in scores
            for i in range(len(next(iter(part.values()))))
        ]


class ClipFeatures(ImageFeatures):
    """Projected image and text features of a CLIP model (transformers), as compared by CLIP itself (cosine)."""

    interpolation = "bicubic"

    def __init__(self, source: str, device: torch.device) -> None:
        local = Path(source).expanduser().is_dir()
        where = str(Path(source).expanduser()) if local else source
        common: dict[str, Any] = {} if local else {"local_files_only": offline()}
        transformers_logging.set_verbosity_error()
        try:
            kind = CLIPConfig.get_config_dict(where, **common)[0].get("model_type")
            if kind != "clip":  # a tower alone, say: the rest would be random
                raise ValueError(f"its model type is {kind!r}, not 'clip'")
            processor: Any = CLIPImageProcessor.from_pretrained(where, **common)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(where, **common)
            loader: Any = CLIPModel
            with no_pickles(f"eval.features={source}"):
                model, info = loader.from_pretrained(where, use_safetensors=True, output_loading_info=True, **common)
            if info["missing_keys"]:
                raise ValueError(f"its weights lack {min(info['missing_keys'])}")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            mend = (
                "save it there with save_pretrained (model, image processor and tokenizer)"
                if local
                else "give eval.features a local CLIP directory, or run once with a network to fill the cache"
            )
            raise UserError(f"cannot load the CLIP model {source} ({first[:200]}); {mend}") from None
        self.model = model.requires_grad_(False).float().eval().to(device)
        self.name, self.device = Path(where).name if local else source, device
        finite(self.model.state_dict(), f"the CLIP model {source}")
        self.sha256 = state_hash(self.model.state_dict())
        self.dim = int(model.config.projection_dim)
        self.size = int(model.config.vision_config.image_size)
        self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)
        self.text_length = int(model.config.text_config.max_position_embeddings)

    def _images(self, pixels: Tensor) -> Tensor:
        # the towers by hand: what get_image_features returns differs between versions of transformers
        features: Tensor = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return features

    def _texts(self, texts: list[str]) -> Tensor | None:
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.text_length, return_tensors="pt"
        ).to(self.device)
        hidden = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        features: Tensor = self.model.text_projection(hidden.pooler_output)
        return features


def features_name(name: str, base_name: str) -> str:
    """`name`, or what "auto" stands for: for a bundled base model the bundled ViT or judge, else CLIP ViT-B/32."""
    if name != "auto":
        return name
    if base_name == "portraits-diffusion":
        return JUDGE
    return BUNDLED if base_name in bundled_diffusion() else CLIP


def load_features(name: str, device: torch.device | str, base_name: str) -> ImageFeatures:
    """The feature model that `eval.features` names.

    "auto": see `features_name`. A directory or a hub id is a CLIP model, any other name a bundled or timm backbone.
    Raises UserError when it is not there.
    """
    device = torch.device(device)
    name = features_name(name, base_name)
    if name == JUDGE:
        return JudgeFeatures(device)
    if Path(name).expanduser().is_dir():
        return ClipFeatures(name, device)
    if name in bundled_backbones() or timm.is_model(name):
        return BackboneFeatures(name, device)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return ClipFeatures(name, device)
    known = ["auto", CLIP, JUDGE, *bundled_backbones(), *timm.list_models("*vit*", pretrained=True)]
    raise UserError(
        f"unknown eval.features {name!r}; {nearest(name, known).split(' (')[0]}, or give a CLIP directory or hub id"
    )


def plain_prompt(prompt: str, placeholders: Iterable[str], noun: str) -> str:
    """The prompt with each run of placeholders replaced by the class noun; for a text tower that has never seen them.

    A placeholder that the noun follows is dropped, so the noun stays once; so is one without a noun (`noun` empty).
    """
    names = sorted((p for p in placeholders if p), key=len, reverse=True)
    if not names:
        return " ".join(prompt.split())
    one = "|".join(rf"(?<!\w){re.escape(n)}" if n[0].isalnum() else re.escape(n) for n in names)
    again = rf"(?:\s+{re.escape(noun)}(?!\w))?" if noun else ""
    pattern = rf"(?:{one})(?!\w)(?:\s+(?:{one})(?!\w))*{again}"
    return " ".join(re.sub(pattern, lambda _: f" {noun} ", prompt).split())


def mmd(x: Tensor, y: Tensor, *, estimator: Estimator, kernel: Literal["poly2"] = "poly2") -> float:
    """Squared maximum mean discrepancy between the sets x (n, D) and y (m, D), in float64 (Gretton et al., JMLR 2012).

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y), with k(a, b) = (a . b + 1)^2 ("poly2") on the rows as they come (the
    features here are unit vectors). "biased" (the V-statistic): all pairs, never negative, 0 for equal sets.
    "unbiased" (the U-statistic): the first two means leave out each row with itself, so the value may be negative; it
    needs two rows in each set, or raises UserError.
    """
    if kernel != "poly2":
        raise ValueError(f"kernel {kernel!r} is not known")
    if not len(x) or not len(y):
        raise ValueError("a set is empty")
    x, y = x.double(), y.double()
    xx, yy, xy = ((a @ b.T + 1).square() for a, b in ((x, x), (y, y), (x, y)))
    if estimator == "biased":
        # of equal sets too the sums may differ in the last bit; in this order a NaN stays one
        return max(float(xx.mean() + yy.mean() - 2 * xy.mean()), 0.0)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise UserError(
            f"eval.estimator=unbiased needs two images in each set, there are {n} and {m}; set eval.estimator=biased"
        )
    within_x = (xx.sum() - xx.diagonal().sum()) / (n * (n - 1))
    within_y = (yy.sum() - yy.diagonal().sum()) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())
