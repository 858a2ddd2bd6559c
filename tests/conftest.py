"""A tree of tiny images, a preset with a tiny real ViT, and how to resolve and build a run from them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:  # the tests share the cores among their processes, not among threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

N_CLASSES = 7  # in 3 tasks: 3, 2 and 2 classes
MEMORY, ROOM = Path("/dev/shm"), 4 * 2**30


def pytest_configure(config: pytest.Config) -> None:
    """Temporary files lie in memory where there is room: every one of thousands would wait for the disk."""
    asked = config.option.basetemp or "PYTEST_DEBUG_TEMPROOT" in os.environ
    if not asked and os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)


@pytest.fixture(scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dualcl-cache")


@pytest.fixture(autouse=True)
def _no_home_cache(_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the suite remembers of verified files stays out of the user's home."""
    monkeypatch.setenv("DUALCL_CACHE", str(_cache))


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with seven classes of overlapping colours, 5 and 3 images of 32 px each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 3)):
        for label in range(N_CLASSES):
            folder = root / part / f"shade{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                colour = rng.normal((20 + 30 * label, 200 - 25 * label, 128), 20)
                pixels = np.clip(colour + rng.normal(0, 25, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def tiny_preset(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A preset on `image_tree` with a ViT of 5 blocks of width 32: deep enough for the default prompted blocks."""
    file = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    file.write_text(
        f"""
domain: classification
data: {{name: image-folder, root: "{image_tree}"}}
stream: {{tasks: 3}}
train: {{epochs: 1, batch_size: 6}}
eval: {{batch_size: 4}}
input: {{workers: 0, augment: none}}
backbone:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {{img_size: 32, patch_size: 16, embed_dim: 32, depth: 5, num_heads: 2}}
methods:
  coda_prompt: {{pool: 8}} # at most the backbone's width
  ranpac: {{width: 100}}
  moal: {{width: 100}}
  tuna: {{align_epochs: 2}}
  mos: {{align_epochs: 2}}
"""
    )
    return str(file)


@pytest.fixture(scope="session")
def tiny(tiny_preset: str) -> Callable[..., Any]:
    """tiny(method, *assignments) -> the resolved configuration of the method on `tiny_preset`."""
    from dualcl.benchmark.config.resolve import resolve

    def make(method: str, *sets: str) -> Any:
        return resolve(tiny_preset, method, sets)

    return make


@pytest.fixture(scope="session")
def build(tiny: Callable[..., Any]) -> Callable[..., Any]:
    """build(method, *assignments) -> (domain, method), as the runner builds them; the same weights every time."""
    import torch

    from dualcl.benchmark.domains import domain_class
    from dualcl.methods import method_class

    def make(name: str, *sets: str) -> tuple[Any, Any]:
        resolved = tiny(name, *sets)
        torch.manual_seed(0)
        domain: Any = domain_class(resolved.domain)(resolved, torch.device("cpu"))  # type: ignore[call-arg]
        return domain, method_class(name)(resolved.sections["method"], domain, len(domain.tasks), 0)

    return make


@pytest.fixture(scope="session")
def save_tiny_sd() -> Callable[..., Path]:
    """save_tiny_sd(folder, vae_channels, draw=None) -> `folder`: a Stable Diffusion as diffusers saves it.

    Epsilon prediction, 4 narrow cross-attention layers, latents of 8 px; the VAE doubles the size for every entry of
    `vae_channels` but one. Weights are random, or set by `draw(module)` in each part.
    """
    import dualcl.benchmark.core.compat  # noqa: F401

    # isort: split
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from dualcl.benchmark.models.bundled import bundled_diffusion

    def save(
        folder: Path, vae_channels: tuple[int, ...], draw: Callable[[torch.nn.Module], object] | None = None
    ) -> Path:
        tokenizer = CLIPTokenizer.from_pretrained(str(bundled_diffusion()["glyph-diffusion"]), subfolder="tokenizer")
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=24,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=vae_channels,
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=8 * 2 ** (len(vae_channels) - 1),
        )
        if draw is not None:
            for part in (text_encoder, unet, vae):
                draw(part)
        scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        )
        StableDiffusionPipeline(
            vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        ).save_pretrained(folder)
        return folder

    return save
