"""Finished runs of the bundled text-to-image model, each made once, a random Stable Diffusion, a start of Python."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TINY = (
    "threads=1",
    "stream.tasks=3",
    "data.per_concept=2",
    "train.steps=2",
    "train.batch_size=2",
    "method.lr=0.01",
    "eval.n=1",
    "eval.steps=1",
    "eval.every=0",
    "eval.guidance=7.5",
    "eval.scheduler=ddim",
    "train.epochs=1",
)


@pytest.fixture
def starts() -> Callable[..., tuple[subprocess.CompletedProcess[str], float]]:
    """starts(code, *arguments) -> the finished `python -c`, and its time in starts that import what is light, and YAML.

    Of the processor, as others may use it too, and in a ratio, as machines differ.
    """

    def spent(*args: str) -> tuple[subprocess.CompletedProcess[str], float]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", *args], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def measure(code: str, *args: str) -> tuple[subprocess.CompletedProcess[str], float]:
        light = "import argparse, dataclasses, importlib.metadata, json, pathlib, re, yaml"
        done, own = spent(code, *args)
        return done, own / max(spent(light)[1] for _ in range(2))

    return measure


@pytest.fixture(scope="session")
def concept_run(tmp_path_factory: pytest.TempPathFactory, _cache: Path) -> Callable[..., Path]:
    """concept_run(method, *assignments) -> the folder of a finished run of three concepts of `glyph-concepts`."""
    import torch

    from dualcl.benchmark.config.resolve import resolve
    from dualcl.benchmark.runs.runner import run

    made: dict[tuple[str, ...], Path] = {}

    def make(method: str, *sets: str) -> Path:
        key = (method, *sets)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("concepts") / f"{method}-run"
            with torch.enable_grad():  # whatever the test that asks first has set
                run(resolve("glyph-concepts", method, [*TINY, *sets]), made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def sd_folder(save_tiny_sd: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion of 16 px as diffusers saves it: epsilon prediction, 4 cross-attention layers."""
    return save_tiny_sd(tmp_path_factory.mktemp("model") / "random-sd", (8, 16))


@pytest.fixture(scope="session")
def sd_preset(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two concepts of three images, taught to `sd_folder` in two steps each."""
    file = tmp_path_factory.mktemp("preset") / "sd.yaml"
    file.write_text(
        f"""
domain: customization
data: {{name: glyph-concepts, concepts: 2, per_concept: 3}}
base: {{model: "{sd_folder}"}}
train: {{epochs: 1, steps: 2, batch_size: 2, checkpoint_seconds: 0, log_every: 1}}
eval: {{n: 1, steps: 2, guidance: 2.0, features: glyph-vit}}
prior: {{n: 2, steps: 2, guidance: 2.0}}
threads: 1
methods: {{lora: {{rank: 2}}, clora: {{rank: 2}}, orthogonal_adaptation: {{rank: 2}}, mix_of_show: {{rank: 2}},
  lora_merge: {{rank: 2}}, clora_null: {{rank: 2}}, stamina: {{rank: 2}}, cidm: {{rank: 2}}, loraclr: {{rank: 2}},
  encoder: {{encoder: untrained}},
  ewc_dc: {{rank: 2, fisher_batches: 1}}, dsc: {{rank: 2}}}}
"""
    )
    return str(file)


@pytest.fixture(scope="session")
def loaded_sd(sd_folder: Path) -> Any:
    """`sd_folder`, loaded; copy it before anything is trained on it."""
    from dualcl.benchmark.models.families import load
    from dualcl.benchmark.models.text_to_image import BaseConfig

    return load(BaseConfig(model=str(sd_folder)))


@pytest.fixture
def diffusion(loaded_sd: Any) -> Any:
    """A copy of `sd_folder`'s model."""
    return copy.deepcopy(loaded_sd)


@pytest.fixture(scope="session")
def sd_run(sd_preset: str, loaded_sd: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """sd_run(method, *assignments, diffusion=None) -> a `Run` on `sd_preset` that was not begun, in a new folder."""
    from dualcl.benchmark.config.resolve import resolve
    from dualcl.benchmark.domains.customization import Customization
    from dualcl.benchmark.runs.folder import RunFolder
    from dualcl.benchmark.runs.progress import Reporter
    from dualcl.benchmark.runs.runner import Run

    def make(method: str, *sets: str, diffusion: Any = None) -> Any:
        resolved = resolve(sd_preset, method, sets)
        if diffusion is None and not any(s.startswith("base.") for s in sets):
            diffusion = copy.deepcopy(loaded_sd)
        domain = Customization(resolved, torch.device("cpu"), diffusion=diffusion)
        return Run(resolved, RunFolder(tmp_path_factory.mktemp("sd-run")), Reporter(quiet=True), domain)

    return make


@pytest.fixture(scope="session")
def empty_record() -> Callable[[], dict[str, Any]]:
    """empty_record() -> what `Run.execute` fills."""
    return lambda: {"tasks": [], "matrix": {"rows": []}, "measured": {"tasks": []}}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP model of 24 px with the bundled tokenizer, as transformers saves it."""
    import dualcl.benchmark.core.compat  # noqa: F401

    # isort: split
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    from dualcl.benchmark.models.bundled import bundled_diffusion

    tokenizer = CLIPTokenizer.from_pretrained(str(bundled_diffusion()["glyph-diffusion"]), subfolder="tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 20,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    vision = {**small, "image_size": 24, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder
