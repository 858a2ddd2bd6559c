"""What `dualcl bench concepts` measures of one method, in a process of its own: JSON on stdin and stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.devices import pick_device
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.core.machine import package_version
from dualcl.benchmark.core.settings import Resolved
from dualcl.benchmark.domains.customization import ConceptStreamConfig, Customization
from dualcl.benchmark.models.bundled import bundled_diffusion
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.stable_diffusion import StableDiffusion, cross_attention_sites
from dualcl.benchmark.models.text_to_image import DTYPES, BaseConfig, TextToImage
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run, device_name
from dualcl.benchmark.runs.step import make_optimizer
from dualcl.benchmark.speed.concepts import FULL_NAME, WARM_UP, ConceptJob
from dualcl.benchmark.speed.step_work import Noise, TaskSteps, answer, live_mib, peaks, reset_peaks, seconds
from dualcl.datasets.base import ImageSet
from dualcl.datasets.concepts import Concept, ConceptData

#: the parts of Stable Diffusion 1.1 to 1.5, as in the configuration files of those models
STABLE_DIFFUSION_1: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "sample_size": 512,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "epsilon",
    },
}
#: images of a concept when it is about growth
PER_CONCEPT = 4


def noise_concepts(count: int, per_concept: int, size: int) -> ConceptData:
    """`count` concepts of `per_concept` random images each, `size` x `size` pixels."""

    def images(name: str) -> ImageSet:
        ids = tuple(f"{name}/{i}" for i in range(per_concept))
        return ImageSet(ids, np.zeros(per_concept, dtype=np.int64), Noise(name, size), "noise")

    names = [f"noise {i}" for i in range(1, count + 1)]
    return ConceptData("noise", tuple(Concept(n, "symbol", images(n)) for n in names), "noise", "noise")


@torch.no_grad()
def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Sets all parameters: weights normal with variance 1 / fan-in, norms' scales to 1, biases to 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)


def random_diffusion(
    parts: Mapping[str, dict[str, Any]], config: BaseConfig, device: torch.device, name: str
) -> StableDiffusion:
    """A model of these configurations with random weights in `config.weights_dtype`, made on `device`.

    The tokenizer is the bundled one, set to the text encoder's length; its ids are among the first of the table.
    """
    diffusers_logging.set_verbosity_error()  # it warns of every conversion
    dtype = DTYPES[config.weights_dtype]
    generator = torch.Generator(device).manual_seed(0)
    built: dict[str, Any] = {}
    classes: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    for part, cls in classes.items():
        with torch.device("meta"):  # no initialisation that `fill` would only replace
            model = cls(**parts[part])
        built[part] = model.to(dtype).to_empty(device=device)
        fill(built[part], generator)
    text_config = CLIPTextConfig(**parts["text_encoder"])
    # not by way of meta: it holds position numbers besides its parameters
    text_encoder: Any = CLIPTextModel(text_config)
    built["text_encoder"] = text_encoder.to(device, dtype)
    fill(built["text_encoder"], generator)
    for site in cross_attention_sites(built["unet"]).values():
        site.module.float()
    if config.gradient_checkpointing:
        built["unet"].enable_gradient_checkpointing()
    folder = next(iter(bundled_diffusion().values())) / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=text_config.max_position_embeddings)
    scheduler = DDPMScheduler(**parts["scheduler"])
    return StableDiffusion(
        tokenizer=tokenizer, scheduler=scheduler, **built, name=name, weights="random", device=device
    )


@contextlib.contextmanager
def concept_run(
    resolved: Resolved, device: torch.device, per_concept: int, diffusion: TextToImage | None = None
) -> Iterator[Run]:
    """A run on noise, its folder deleted afterwards, with `diffusion` or the model that the configuration names."""
    diffusion = diffusion or load(resolved.section("base", BaseConfig), device)
    concepts = resolved.section("stream", ConceptStreamConfig).tasks or 1
    data = noise_concepts(concepts, per_concept, diffusion.info.image_size)
    domain = Customization(resolved, device, data=data, diffusion=diffusion)
    with tempfile.TemporaryDirectory() as folder:
        yield Run(resolved, RunFolder(Path(folder)), Reporter(quiet=True), domain)


def measure_once(resolved: Resolved, job: ConceptJob, diffusion: TextToImage) -> dict[str, Any]:
    """Training steps of the first concept and images of one denoising step, on `diffusion`."""
    device = diffusion.device
    with concept_run(resolved, device, 1, diffusion) as run:
        domain: Any = run.domain
        reset_peaks(device)
        shared = run.begin(0)
        own = {id(p): p for g in run.method.trained() for p in g.params}
        optimizer = make_optimizer(run.train, run.groups(shared), device)
        batches = enumerate(domain.batches(0, 0))
        fetched: list[tuple[int, Any]] = []
        encode = seconds(device, lambda: fetched.append(next(batches)))
        losses: list[float] = []

        def step() -> None:
            number, batch = fetched.pop()
            losses.append(run.step(batch, optimizer, 1.0, f"step {number}")[0])

        steps = [seconds(device, step)]
        while len(steps) < job.repeats:
            fetched.append(next(batches))
            steps.append(seconds(device, step))
        train_peak = peaks(device)
        run.method.end_task(0)
        reset_peaks(device)

        def sample() -> None:
            domain.sample(domain.prompts(0)[:1], [torch_generator(0, "bench", "sample")])

        samples = [seconds(device, sample) for _ in range(job.repeats)]
        return {
            "network_parameters": domain.adapted_parameters(),
            "parameters_trained": sum(p.numel() for p in own.values()),
            "token_parameters": sum(p.numel() for p in shared),
            "encode_seconds": encode,
            "step_seconds": steps,
            "sample_seconds": samples,
            "train_peak_mib": train_peak,
            "sample_peak_mib": peaks(device),
            "losses": losses,
            **_about(resolved, job, domain),
        }


def measure_growth(resolved: Resolved, job: ConceptJob) -> dict[str, Any]:
    """One run through all concepts, measured at those of `job.concepts`: one point for each.

    For the step times further runs go to each of the earlier ones and stay there; then all take steps in turn, so that
    whatever else the machine does falls on all of them.
    """
    device = pick_device(resolved.general.device)
    points: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(concept_run(resolved, device, PER_CONCEPT))
        for number in range(1, job.concepts[-1] + 1):
            reset_peaks(device)
            task = _begin(run, number)
            if number in job.concepts:
                points.append({"concept": number, "peak_mib": peaks(device), **task.held(), "live_mib": live_mib()})
            if number == job.concepts[-1]:
                held = []
                for early in job.concepts[:-1]:
                    other = stack.enter_context(concept_run(resolved, device, PER_CONCEPT))
                    for before in range(1, early):
                        _begin(other, before).end()
                    held.append(_begin(other, early))
                for point, times in zip(points, in_turn(device, job.repeats, [*held, task]), strict=True):
                    point["seconds"] = times
            task.end()
            if number in job.concepts:
                points[-1]["checkpoint_bytes"] = _checkpoint_bytes(run, number)
        return {"points": points, **_about(resolved, job, run.domain)}


def _begin(run: Run, number: int) -> TaskSteps:
    """Concept `number` (from 1 on) of a run, begun and a few steps on."""
    task = TaskSteps(run, number - 1)
    for _ in range(WARM_UP):
        task.step()
    return task


def in_turn(device: torch.device, repeats: int, tasks: Sequence[TaskSteps]) -> list[list[float]]:
    """Seconds per step of each task: rounds in alternating order, after one unmeasured round."""
    times: list[list[float]] = [[] for _ in tasks]
    for task in tasks:
        task.step()
    pairs = list(zip(times, tasks, strict=True))
    for i in range(repeats):
        for own, task in pairs if i % 2 == 0 else pairs[::-1]:
            own.append(seconds(device, task.step))
    return times


def _checkpoint_bytes(run: Run, number: int) -> int:
    """Size of the file that the run's tensors are saved in after a concept."""
    name = f"task_{number}"
    run.folder.save_checkpoint(name, run.tensors(), {})
    size = (run.folder.checkpoints / name / "state.safetensors").stat().st_size
    run.folder.keep_only()
    return size


def _about(resolved: Resolved, job: ConceptJob, domain: Any) -> dict[str, Any]:
    return {
        "image_size": domain.diffusion.info.image_size,
        "repeats": job.repeats,
        "device": device_name(domain.device),
        "settings": asdict(resolved.sections["method"]),
        **{name: package_version(name) for name in ("diffusers", "transformers")},
    }


def main() -> int:
    """Does the job on stdin."""
    job = ConceptJob(**json.load(sys.stdin))

    def work() -> dict[str, Any]:
        resolved = resolve(job.preset, job.method, job.sets)
        if resolved.general.threads is not None:
            torch.set_num_threads(resolved.general.threads)
        if job.concepts:
            return measure_growth(resolved, job)
        device = pick_device(resolved.general.device)
        base = resolved.section("base", BaseConfig)
        return measure_once(resolved, job, random_diffusion(STABLE_DIFFUSION_1, base, device, FULL_NAME))

    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
