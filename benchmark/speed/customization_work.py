"""Writes what `dualcl bench customization` measures on, in a process of its own: JSON on stdin and stdout."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
import diffusers
import transformers

from dualcl.benchmark.models.bundled import bundled_diffusion
from dualcl.benchmark.models.stable_diffusion import StableDiffusion
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.speed.concepts_work import STABLE_DIFFUSION_1, random_diffusion
from dualcl.benchmark.speed.step_work import Noise, answer


def write_model(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> StableDiffusion:
    """Saves a Stable Diffusion 1.x with random weights, different in `parts`, in diffusers layout; returns it."""
    whole = {name: {**config, **parts.get(name, {})} for name, config in STABLE_DIFFUSION_1.items()}
    model = random_diffusion(whole, BaseConfig(), torch.device("cpu"), "random")
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        getattr(model, part).save_pretrained(folder / part)
    _write_tokenizer(folder / "tokenizer", whole["text_encoder"])
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(model.scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", transformers.CLIPTokenizer.__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return model


def _write_tokenizer(folder: Path, text: Mapping[str, Any]) -> None:
    """The bundled tokenizer, filled up to the size of the table with words that no text holds."""
    shutil.copytree(next(iter(bundled_diffusion().values())) / "tokenizer", folder)
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = whole["model"]["vocab"]
    for number in range(len(vocabulary), text["vocab_size"]):
        vocabulary[f"\u0120unused{number}</w>"] = number
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = text["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_images(folder: Path, count: int, size: int) -> None:
    """`count` images of random pixels, `size` x `size`."""
    folder.mkdir()
    for number in range(count):
        Noise(folder.name, size)(number).save(folder / f"{number}.png")


def main() -> int:
    """Does the job on stdin."""
    job = json.load(sys.stdin)

    def work() -> dict[str, Any]:
        folder = Path(job["folder"])
        model = write_model(folder / "model", job["parts"])
        for name, count in zip(("concept", "class"), job["images"], strict=True):
            write_images(folder / name, count, model.info.image_size)
        parameters = {
            part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("unet", "vae", "text_encoder")
        }
        return {"parameters": parameters, "image_size": model.info.image_size}

    torch.manual_seed(0)
    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
