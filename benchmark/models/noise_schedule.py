"""The noise schedule that a `scheduler_config.json` names, where a model is trained to predict noise or velocity."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
import diffusers
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

from dualcl.benchmark.core.errors import UserError

#: of a class that needs a package of its own: one with the same settings
ALIKE = {"DPMSolverSDEScheduler": "HeunDiscreteScheduler"}
#: of distilled models, which are trained on another loss; and those that shift the schedule
OTHERS = ("LCMScheduler", "TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
#: what makes a schedule; where the file is silent, the class that it names has a default of its own
SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
PREDICTIONS = ("epsilon", "v_prediction")
#: every sampler knows these; the others are handed on as a list of betas
COMMON = ("linear", "scaled_linear", "squaredcos_cap_v2")
DPM_ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis")


class NoiseSchedule:
    """Reads the scheduler of a model directory or of a hub's model."""

    @staticmethod
    def from_pretrained(source: Path | str, subfolder: str, **options: Any) -> Any:
        """The schedule, see `noise_schedule`."""
        config: Any = DDPMScheduler.load_config(source, subfolder=subfolder, **options)
        if not isinstance(config, dict):
            raise ValueError("its scheduler_config.json holds no settings")
        return noise_schedule(config, str(source))


def noise_schedule(config: Mapping[str, Any], model: str) -> Any:
    """The schedule of a config, for training; UserError for one under which noise and velocity are not what is learnt.

    Settings that only samplers know are kept in its `config`.
    """
    name = str(config.get("_class_name", DDPMScheduler.__name__)).removeprefix("Flax")
    cls: Any = getattr(diffusers, ALIKE.get(name, name), None)
    known = inspect.signature(cls).parameters if inspect.isclass(cls) else {}

    def refuse(what: str) -> UserError:
        return UserError(f"{model}: {what} is not supported; epsilon and v_prediction on a schedule of betas are")

    if name in OTHERS or "beta_start" not in known:
        raise refuse(f"the scheduler {name}")
    own = {key: config.get(key, known[key].default if key in known else None) for key in SETTINGS}
    own = {key: value for key, value in own.items() if key in config or key in known}
    if own.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise refuse(f"the prediction type {own['prediction_type']!r} of its {name}")
    if config.get("use_flow_sigmas"):
        raise refuse(f"use_flow_sigmas of its {name} (flow matching)")
    if config.get("timestep_type", "discrete") != "discrete":
        raise refuse(f"the timestep_type {config['timestep_type']!r} of its {name}")
    if str(config.get("variance_type")).startswith("learned"):
        raise refuse(f"the variance_type {config['variance_type']!r} of its {name}")
    kept = dict(config)
    if kept.get("algorithm_type") not in DPM_ALGORITHMS:  # SASolver's, which mean something else
        kept.pop("algorithm_type", None)
    try:
        if own["trained_betas"] is None and own["beta_schedule"] not in COMMON:
            own["trained_betas"] = _betas(own).tolist()
        schedule: Any = DDPMScheduler.from_config({**kept, **own})
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise refuse(
            f"the noise schedule of its {name} ({str(error).splitlines()[0].partition(' for <')[0]})"
        ) from None
    left = schedule.alphas_cumprod
    if len(left) != schedule.config.num_train_timesteps:
        raise refuse(f"a list of {len(left)} trained_betas for {schedule.config.num_train_timesteps} steps")
    if not len(left) or not bool(((schedule.betas >= 0) & (schedule.betas <= 1)).all()):
        raise refuse(f"the noise schedule of its {name} (betas are shares, between 0 and 1)")
    if schedule.config.prediction_type == "epsilon" and float(left[-1]) == 0:
        raise UserError(
            f"{model}: epsilon at zero terminal SNR is not supported, for the last step would hold nothing to predict "
            "from; in its scheduler_config.json set prediction_type or rescale_betas_zero_snr as it was trained"
        )
    return schedule


def _betas(own: Mapping[str, Any]) -> torch.Tensor:
    """The betas of a schedule that only some classes know."""
    if own["beta_schedule"] == "exp":  # HeunDiscreteScheduler alone
        return betas_for_alpha_bar(own["num_train_timesteps"], alpha_transform_type="exp")
    plain: Any = DDPMScheduler(**{**own, "rescale_betas_zero_snr": False})
    betas: torch.Tensor = plain.betas
    return betas
