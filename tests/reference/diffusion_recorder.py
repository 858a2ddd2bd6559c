"""Runs a training script of diffusers' examples, unchanged, and stores what it drew, computed and learnt.

    python diffusion_recorder.py SCRIPT OUT.safetensors ARGUMENTS OF THE SCRIPT...

Wraps library functions that the script calls; each wrapper passes arguments and results on as they are. Stored per
optimiser step: pixels, the VAE's latent distribution and its draw, noise, timesteps, token ids, the U-Net's prediction,
mask, loss, gradients of everything in the optimiser; and all of that before the first and after the last step.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from transformers import CLIPTextModel


class Recorder:
    """What one step after another did."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.now: dict[str, Tensor] = {}
        self.targets: list[Tensor] = []
        self.before: list[Tensor] = []
        self.params: list[Tensor] = []

    def keep(self, name: str, value: Tensor) -> None:
        self.now[name] = value.detach().clone()

    def install(self) -> None:
        self._after(AutoencoderKL, "encode", lambda out, _self, pixels, *a, **k: self.keep("pixels", pixels))
        self._after(DiagonalGaussianDistribution, "sample", self._sampled)
        self._after(CLIPTextModel, "forward", lambda out, _self, ids, *a, **k: self.keep("ids", ids))
        self._after(UNet2DConditionModel, "forward", self._predicted)
        self._after(F, "mse_loss", lambda out, _p, target, *a, **k: self.targets.append(target.detach().clone()))
        self._after(Accelerator, "backward", self._gradients)
        self._around_step()

    @staticmethod
    def _after(owner: Any, name: str, note: Any) -> None:
        real = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            out = real(*args, **kwargs)
            note(out, *args, **kwargs)
            return out

        setattr(owner, name, wrapper)

    def _sampled(self, drawn: Tensor, posterior: Any, *args: Any, **kwargs: Any) -> None:
        self.keep("mean", posterior.mean)
        self.keep("std", posterior.std)
        self.keep("draw", (drawn - posterior.mean) / posterior.std)

    def _predicted(self, out: Any, _self: Any, noisy: Tensor, timesteps: Tensor, *args: Any, **kwargs: Any) -> None:
        self.keep("noisy", noisy)
        self.keep("timesteps", timesteps)
        self.keep("predicted", out.sample)

    def _gradients(self, _: None, accelerator: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.keep("loss", loss)
        optimizer = accelerator._optimizers[0]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(params):
            self.keep(f"gradient.{i}", p.grad)

    def _around_step(self) -> None:
        real = torch.optim.AdamW.step

        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self.params = [p for group in optimizer.param_groups for p in group["params"]]
            if not self.before:
                self.before = [p.detach().clone() for p in self.params]
            out = real(optimizer, *args, **kwargs)
            self.now["noise"] = torch.cat(self.targets)
            self.steps.append(self.now)
            self.now, self.targets = {}, []
            return out

        torch.optim.AdamW.step = step  # type: ignore[method-assign]

    def store(self, path: str) -> None:
        kept = {f"step.{i}.{name}": value for i, step in enumerate(self.steps) for name, value in step.items()}
        kept |= {f"before.{i}": p for i, p in enumerate(self.before)}
        kept |= {f"after.{i}": p.detach() for i, p in enumerate(self.params)}
        save_file({k: v.contiguous() for k, v in kept.items()}, path)


def main() -> None:
    script, out, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    recorder = Recorder()
    recorder.install()
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if recorder.steps:
            recorder.store(out)


if __name__ == "__main__":
    main()
