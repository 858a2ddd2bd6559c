"""Noise schedules as a model's config names them: betas of the class, refusals by name, samplers that follow them."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
import diffusers

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.models.families import load
from dualcl.benchmark.models.noise_schedule import noise_schedule
from dualcl.benchmark.models.sampling import sample
from dualcl.benchmark.models.text_to_image import BaseConfig
from dualcl.benchmark.runs.runner import run as run_whole

CLASSES = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type) and name != "DPMSolverSDEScheduler"
)
#: the betas and the prediction are those of noise or velocity
FITTING = [
    *("DDIMInverse", "DDIMParallel", "DDIM", "DDPMParallel", "DDPM", "DEISMultistep", "DPMSolverMultistepInverse"),
    *("DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete"),
    *("KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "RePaint", "SASolver", "UniPCMultistep"),
]


def images(diffusion: Any, sampler: Any, batch_size: int = 2, steps: int = 2) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    how = {"scheduler": sampler, "steps": steps, "guidance": 1.0, "batch_size": batch_size}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of algorithms that diffusers will drop
        return sample(diffusion, ["a symbol", "a house"], generators, **how)


def with_schedule(diffusion: Any, **config: Any) -> Any:
    twin = copy.copy(diffusion)
    twin.scheduler = noise_schedule(config, "x")
    return twin


# --- which classes, and what they mean --------------------------------------------------------------------------------


def test_the_classes_are_those_of_diffusers() -> None:
    assert len(CLASSES) > 30
    assert {f"{name}Scheduler" for name in FITTING} <= set(CLASSES)


@pytest.mark.parametrize("name", [f"{name}Scheduler" for name in FITTING])
@pytest.mark.parametrize("given", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_start": 0.002}])
def test_what_a_config_leaves_open_is_the_default_of_its_class(name: str, given: dict[str, Any]) -> None:
    theirs: Any = getattr(diffusers, name)(**given)
    ours = noise_schedule({"_class_name": name, **given}, "x")
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6, atol=0)
    assert ours.config.prediction_type == theirs.config.get("prediction_type", "epsilon")


def test_a_class_whose_package_is_missing_has_its_own_defaults_too() -> None:
    ours = noise_schedule({"_class_name": "DPMSolverSDEScheduler"}, "x")
    assert torch.equal(ours.betas, torch.linspace(0.00085, 0.012, 1000))


@pytest.mark.parametrize("name", [n for n in [*CLASSES, "MyScheduler", "utils"] if n[:-9] not in FITTING])
def test_other_classes_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"^x: the scheduler {name} is not supported; epsilon and v_prediction"):
        noise_schedule({"_class_name": name, "prediction_type": "epsilon"}, "x")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"prediction_type": "sample"}, "the prediction type 'sample'"),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({"_class_name": "DEISMultistepScheduler", "use_flow_sigmas": True}, "flow matching"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "'continuous'"),
        ({"variance_type": "learned_range"}, "'learned_range'"),
        ({"beta_schedule": "cosine"}, "the noise schedule of its DDPMScheduler (cosine is not implemented"),
        ({"beta_start": "a"}, "the noise schedule of its DDPMScheduler"),
        ({"beta_end": 1.5}, "betas are shares"),
        ({"num_train_timesteps": 0}, "betas are shares"),
        ({"trained_betas": [0.1] * 10}, "a list of 10 trained_betas for 1000 steps"),
        ({"rescale_betas_zero_snr": True}, "epsilon at zero terminal SNR"),
        ({"trained_betas": [0.1] * 999 + [1.0]}, "epsilon at zero terminal SNR"),
        ({"_class_name": "LCMScheduler", "prediction_type": "epsilon"}, "LCMScheduler"),
    ],
)
def test_settings_that_train_something_else_are_refused_in_one_line(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        noise_schedule({"_class_name": "DDPMScheduler", **config}, "x")
    assert words in str(error.value)
    assert str(error.value).startswith("x: ")
    assert "\n" not in str(error.value)


SCHEDULES = {
    **{
        name: {"beta_schedule": name} for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
    },
    "exp": {"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp"},
    "trained": {"trained_betas": np.linspace(1e-4, 0.01, 1000).tolist()},
    "zero SNR": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in SCHEDULES for k in ("epsilon", "v_prediction") if (n, k) != ("zero SNR", "epsilon")],
)
def test_training_samplers_and_exports_share_every_schedule(
    loaded_sd: Any, tmp_path: Path, name: str, kind: str
) -> None:
    config = {"_class_name": "DDPMScheduler", "prediction_type": kind, **SCHEDULES[name]}
    cls = getattr(diffusers, config["_class_name"])
    wanted = cls.from_config(config).alphas_cumprod
    twin = with_schedule(loaded_sd, **config)
    assert torch.equal(twin.scheduler.alphas_cumprod, wanted)
    for sampler in ("ddim", "dpm"):
        # at zero SNR one of them puts 2^-24 in the place of 0
        assert torch.allclose(twin.sampler(sampler, 3).alphas_cumprod, wanted, rtol=0, atol=1e-7)
        assert images(twin, sampler).float().std() > 1
    if name not in ("linear", "scaled_linear") and kind == "v_prediction":
        state, vocabulary = twin.network.state_dict(), twin.vocabularies[0]
        twin.save(tmp_path / "m", state, [vocabulary.encoder.get_input_embeddings().weight.detach()])
        again = load(BaseConfig(model=str(tmp_path / "m")))
        assert torch.equal(again.scheduler.alphas_cumprod, wanted)
        assert again.info.prediction_type == kind


# --- noise ------------------------------------------------------------------------------------------------------------

DPM = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "scaled_linear"}
NOISY: list[dict[str, Any]] = [
    {**DPM, "algorithm_type": "sde-dpmsolver++"},
    {**DPM, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    {**DPM, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"},
    {"_class_name": "SASolverScheduler", "algorithm_type": "data_prediction", "variance_type": None},
]


@pytest.mark.parametrize("config", [*[{"_class_name": f"{n}Scheduler"} for n in FITTING], *NOISY], ids=str)
def test_an_image_is_a_function_of_its_own_generator_whatever_the_scheduler(loaded_sd: Any, config: Any) -> None:
    twin = with_schedule(loaded_sd, **config)
    for sampler in ("ddim", "dpm"):
        first = images(twin, sampler)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert torch.equal(images(twin, sampler), first)
        assert torch.equal(torch.get_rng_state(), state)
        alone = images(twin, sampler, batch_size=1)
        assert (alone.int() - first.int()).abs().max() <= 1


def test_a_sampler_that_draws_noise_is_that_of_the_stock_pipeline(loaded_sd: Any) -> None:
    twin = with_schedule(loaded_sd, **NOISY[0])
    pipe: Any = diffusers.StableDiffusionPipeline(
        vae=twin.vae,
        text_encoder=twin.text_encoder,
        tokenizer=twin.tokenizer,
        unet=twin.unet,
        scheduler=diffusers.DPMSolverMultistepScheduler.from_config(twin.scheduler.config, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": generators, "output_type": "np"}
    stock = pipe(prompt=["a symbol", "a house"], **call).images
    assert np.abs((stock * 255).round() - images(twin, "dpm", steps=4).numpy()).max() <= 1
    plain = images(with_schedule(loaded_sd, **DPM), "dpm", steps=4)
    assert (plain.int() - images(twin, "dpm", steps=4).int()).abs().max() > 10


@pytest.fixture
def base(sd_folder: Path, tmp_path: Path) -> Any:
    """base(**settings) -> a model directory with these settings of the scheduler."""

    def make(**settings: Any) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(sd_folder, folder, dirs_exist_ok=True)
        config = folder / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
        return folder

    return make


def test_a_network_that_does_not_change_does_not_drift_under_a_sampler_that_draws_noise(
    base: Any, sd_preset: str, tmp_path: Path
) -> None:
    sets = [f"base.model={base(**NOISY[0])}", "eval.scheduler=dpm", "eval.n=2", "train.steps=2"]
    record = run_whole(resolve(sd_preset, "textual_inversion", sets), tmp_path / "run")
    assert record["matrix"]["rows"][-1]["drift"] == [0.0, 0.0]


def test_a_sampler_that_cannot_follow_is_refused_before_anything_is_trained(
    base: Any, sd_preset: str, tmp_path: Path
) -> None:
    model = base(**DPM, algorithm_type="dpmsolver", final_sigmas_type="zero")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with pytest.raises(UserError, match=r"the sampler dpm does not take what base sets .*final_sigmas_type"):
            run_whole(resolve(sd_preset, "lora", [f"base.model={model}", "eval.scheduler=dpm"]), tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()
