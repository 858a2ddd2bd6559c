"""Images from a diffusion model: an image is a function of (weights, prompt, its own generator), not of its batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import dualcl.benchmark.core.compat  # noqa: F401 - before diffusers

# isort: split
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.processes import ALONE, Processes

if TYPE_CHECKING:
    from dualcl.benchmark.models.stable_diffusion import Diffusion

SchedulerName = Literal["ddim", "dpm"]
#: pixels that the VAE decodes at once: 4 images of 512 x 512
DECODED_PIXELS = 4 * 512 * 512


class SharedProjection(nn.Module):
    """A cross-attention projection applied once per prompt; its rows serve all images and denoising steps."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self._first: Tensor | None = None
        self._index: Tensor | None = None
        self._rows: Tensor | None = None

    def share(self, first: Tensor, index: Tensor, keep: bool) -> None:
        """Sets the batch: `first` (P,) positions where each prompt first occurs, `index` (B,) prompt of each sample.

        `keep`: the prompts are those of the batch before, so its rows still hold.
        """
        self._first, self._index = first, index
        if not keep:
            self._rows = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, d_in), equal where the prompts are -> (B, L, d_out)."""
        if self._first is None or self._index is None:
            raise RuntimeError("share was not called")
        if self._rows is None:
            self._rows = self.base(x[self._first])
        return self._rows[self._index]


@contextlib.contextmanager
def shared_text(unet: nn.Module) -> Iterator[list[SharedProjection]]:
    """Puts a `SharedProjection` before every attn2.to_k and attn2.to_v of `unet`, whatever module stands there."""
    shared: list[tuple[nn.Module, str, SharedProjection]] = []
    for name, attention in unet.named_modules():
        if name.rpartition(".")[2] == "attn2" and getattr(attention, "is_cross_attention", True):
            shared += [(attention, leaf, SharedProjection(getattr(attention, leaf))) for leaf in ("to_k", "to_v")]
    try:
        for attention, leaf, projection in shared:
            setattr(attention, leaf, projection)
        yield [projection for _, _, projection in shared]
    finally:
        for attention, leaf, projection in shared:
            setattr(attention, leaf, projection.base)


def sampling_scheduler(config: Any, name: SchedulerName, steps: int) -> Any:
    """A diffusers scheduler for the model's noise schedule, its timesteps set; UserError for too many steps.

    As StableDiffusionPipeline: latents are never clipped, and timesteps are shifted by one.
    """
    if not 1 <= steps < config.num_train_timesteps:
        raise UserError(f"denoising steps must be from 1 to {config.num_train_timesteps - 1}, got {steps}")
    cls: Any = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler}[name]
    fixed: dict[str, Any] = {"ddim": {"clip_sample": False}, "dpm": {}}[name]
    scheduler = cls.from_config(config, steps_offset=1, **fixed)
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    scheduler: SchedulerName,
    steps: int,
    guidance: float,
    batch_size: int,
    negative_prompt: str = "",
    processes: Processes = ALONE,
) -> Tensor:
    """One image per prompt, uint8 (N, S, S, 3) on the CPU; batches are shared out to `processes`, which all get all.

    `prompts` hold expanded concept tokens; `generators` (CPU, one per image) draw the first latents. `guidance` <= 1
    leaves out the unconditional pass. Runs under the caller's autocast. Raises UserError when latents are not finite.
    """
    if len(prompts) != len(generators):
        raise ValueError(f"{len(prompts)} prompts but {len(generators)} generators")
    sampling_scheduler(diffusion.scheduler.config, scheduler, steps)
    unet: Any = diffusion.unet
    size = diffusion.info.latent_size
    shape = (unet.config.in_channels, size, size)
    decoded: list[Tensor] = []
    kept: list[str] | None = None
    text = None
    with processes.apart(), shared_text(unet) as projections:
        for start in processes.mine(range(0, len(prompts), batch_size)):
            batch = list(prompts[start : start + batch_size])
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators[start : start + batch_size]])
            rows = [negative_prompt] * len(batch) + batch if guidance > 1 else batch
            unique = list(dict.fromkeys(rows))
            keep = unique == kept
            if text is None or not keep:
                text, kept = diffusion.encode_text(diffusion.token_ids(unique)), unique
            first = torch.tensor([rows.index(p) for p in unique], device=text.device)
            index = torch.tensor([unique.index(p) for p in rows], device=text.device)
            for projection in projections:
                projection.share(first, index, keep)
            latents = _denoise(
                unet,
                noise.to(text.device),
                text[index],
                sampling_scheduler(diffusion.scheduler.config, scheduler, steps),
                guidance,
            )
            if not bool(torch.isfinite(latents).all()):
                raise UserError(
                    f"the images of {batch[0]!r} are not finite: the weights have diverged, or are too large for this "
                    "precision; lower method.lr or the penalty's weight, or set precision=fp32"
                )
            parts = latents.split(_decoded_at_once(diffusion.info.image_size))
            decoded.append(torch.cat([diffusion.decode(part) for part in parts]))
    decoded = processes.together(decoded)
    image_size = diffusion.info.image_size
    return torch.cat(decoded) if decoded else torch.empty(0, image_size, image_size, 3, dtype=torch.uint8)


def _decoded_at_once(image_size: int) -> int:
    return max(1, DECODED_PIXELS // image_size**2)


def _denoise(unet: Any, noise: Tensor, text: Tensor, scheduler: Any, guidance: float) -> Tensor:
    """Latents (B, C, h, w) float32 from noise of that shape; text (B or 2 B, L, D), the unconditional half first."""
    latents = noise * scheduler.init_noise_sigma
    dtype = unet.conv_in.weight.dtype
    text = text.to(dtype)
    for t in scheduler.timesteps:
        doubled = torch.cat([latents, latents]) if guidance > 1 else latents
        model_input = scheduler.scale_model_input(doubled, t).to(dtype)
        predicted = unet(model_input, t.to(noise.device), encoder_hidden_states=text).sample.float()
        if guidance > 1:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(predicted, t, latents).prev_sample
    return latents
