"""diffusers' StableDiffusionPipeline: images as its scripts' validation makes them, and all in one call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

with contextlib.suppress(ImportError):  # mends what the libraries trip over in some environments; no part of theirs
    import dualcl.benchmark.core.compat  # noqa: F401

import diffusers
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline

VERSIONS = {m.__name__: m.__version__ for m in (diffusers, transformers)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make(setup: dict[str, Any]) -> Mapping[str, Callable[[], float]]:
    """one_by_one: a call per image; batched: one call; brightness: mean level of the first image."""
    pipeline = StableDiffusionPipeline.from_pretrained(setup["model"], safety_checker=None)
    pipeline.to(setup["device"], DTYPES[setup["precision"]])
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, steps_offset=1, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    number = setup["images"]

    def images(seeds: list[int]) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = ["a photo of a circle"] * len(seeds)
        return pipeline(prompts, num_inference_steps=setup["steps"], guidance_scale=7.5, generator=generators).images

    def one_by_one() -> int:
        for seed in range(number):
            images([seed])
        return number

    def batched() -> int:
        images(list(range(number)))
        return number

    def brightness() -> float:
        return float(np.asarray(images([0])[0], dtype=np.float64).mean())

    return {"one_by_one": one_by_one, "batched": batched, "brightness": brightness}
