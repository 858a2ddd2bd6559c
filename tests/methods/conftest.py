"""A small text-to-image model in memory, a preset of three concepts, and runs on copies of that model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CONCEPTS = """
domain: customization
data: {name: glyph-concepts, concepts: 3, per_concept: 3}
stream: {tasks: 2}
train: {epochs: 1, steps: 2, batch_size: 2, checkpoint_seconds: 0, log_every: 1}
eval: {n: 1, steps: 1, guidance: 1.0, features: glyph-vit}
prior: {n: 2, steps: 1, guidance: 1.0}
threads: 1
methods:
  lora: {rank: 2}
  clora: {rank: 2}
  orthogonal_adaptation: {rank: 2}
  mix_of_show: {rank: 2}
  clora_null: {rank: 2}
  loraclr: {rank: 2}
  encoder: {encoder: untrained}
  cidm: {rank: 2}
  lora_merge: {rank: 2}
  stamina: {rank: 2}
  ewc_dc: {rank: 2, fisher_batches: 1}
  dsc: {rank: 2}
  ewc: {fisher_batches: 1}
  custom_diffusion_merge: {captions: 60}
  generative_replay: {per_concept: 2}
"""
#: the same of requests
REQUESTS = CONCEPTS.replace(
    "{name: glyph-concepts, concepts: 3, per_concept: 3}",
    '{name: unlearn-prompts, requests: ["umbrella = symbol", "cat = house", "star = symbol"], '
    'keep: ["a photo of sun", "a photo of moon"], retained: ["a photo of heart"]}',
)


@pytest.fixture(scope="session")
def small_diffusion() -> Any:
    """The bundled model with a random U-Net of 4 narrow cross-attention layers: its text encoder is a trained one."""
    from dualcl.benchmark.models.families import load
    from dualcl.benchmark.models.stable_diffusion import StableDiffusion
    from dualcl.benchmark.models.text_to_image import BaseConfig

    # isort: split
    from diffusers import UNet2DConditionModel

    whole = load(BaseConfig())
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=whole.info.latent_shape[-1],
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 24),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=whole.text_encoder.config.hidden_size,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusion(whole.tokenizer, whole.text_encoder, unet, whole.vae, whole.scheduler, "small", "random")


@pytest.fixture(scope="session")
def concepts_preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two of three concepts, two steps each."""
    file = tmp_path_factory.mktemp("concepts") / "concepts.yaml"
    file.write_text(CONCEPTS)
    return str(file)


@pytest.fixture(scope="session")
def stream_of(concepts_preset: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """stream_of(method) -> the preset whose stream it takes: two of three concepts, or of three requests."""
    from dualcl.methods import method_class

    file = tmp_path_factory.mktemp("requests") / "requests.yaml"
    file.write_text(REQUESTS)
    return lambda name: str(file) if "requests" in method_class(name).requires else concepts_preset


@pytest.fixture(scope="session")
def concepts(stream_of: Callable[[str], str], small_diffusion: Any) -> Callable[..., Any]:
    """concepts(method, folder, *assignments, kind=Run) -> a run on a fresh copy of the small model, not begun yet."""
    from dualcl.benchmark.config.resolve import resolve
    from dualcl.benchmark.domains.customization import Customization
    from dualcl.benchmark.runs.folder import RunFolder
    from dualcl.benchmark.runs.progress import Reporter
    from dualcl.benchmark.runs.runner import Run

    def make(name: str, folder: Path, *sets: str, kind: type[Run] = Run) -> Run:
        resolved = resolve(stream_of(name), name, sets)
        domain = Customization(resolved, torch.device("cpu"), diffusion=copy.deepcopy(small_diffusion))
        return kind(resolved, RunFolder(folder), Reporter(quiet=True), domain)

    return make


@pytest.fixture(scope="session")
def empty_record() -> Callable[[], dict[str, Any]]:
    """empty_record() -> what `Run.execute` fills."""
    return lambda: {"tasks": [], "matrix": {"rows": []}, "measured": {"tasks": []}}


@pytest.fixture(scope="session")
def executed(empty_record: Callable[[], dict[str, Any]]) -> Callable[..., Any]:
    """executed(resolved, folder, kind=Run) -> the run of a resolved configuration, done."""
    from dualcl.benchmark.runs.folder import RunFolder
    from dualcl.benchmark.runs.progress import Reporter
    from dualcl.benchmark.runs.runner import Run

    def execute(resolved: Any, folder: Path, kind: type[Run] = Run) -> Run:
        work = kind(resolved, RunFolder(folder), Reporter(quiet=True))
        work.execute(empty_record())
        return work

    return execute


@pytest.fixture
def resumed(executed: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """resumed(resolved, where) -> the tensors that a run ends with, whether interrupted at step `where` or not."""
    from dualcl.benchmark.runs.runner import Run

    def run_twice(resolved: Any, where: str) -> dict[str, torch.Tensor]:
        class Killed(Run):
            def step(self, batch: Any, optimizer: Any, factor: float, at: str, ended: bool = False) -> Any:
                if at == where:
                    raise KeyboardInterrupt
                return super().step(batch, optimizer, factor, at, ended)

        whole: dict[str, torch.Tensor] = executed(resolved, tmp_path / "whole").tensors()
        with pytest.raises(KeyboardInterrupt):
            executed(resolved, tmp_path / "run", Killed)
        assert (tmp_path / "run" / "checkpoints" / "partial").is_dir()
        again = executed(resolved, tmp_path / "run").tensors()
        assert again.keys() == whole.keys()
        assert [n for n, t in again.items() if not torch.equal(t, whole[n])] == []
        return whole

    return run_twice
