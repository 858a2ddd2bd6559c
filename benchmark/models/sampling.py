"""Images from a diffusion model: an image is a function of (weights, prompt, its own generator), not of its batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.processes import ALONE, Processes
from dualcl.benchmark.models.text_to_image import SchedulerName, Text, TextToImage

#: pixels that the VAE decodes at once: 4 images of 512 x 512
DECODED_PIXELS = 4 * 512 * 512


class SharedProjection(nn.Module):
    """A projection of the text applied once per prompt; its rows serve all images and denoising steps."""

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
def shared_text(network: nn.Module, text_only: Iterable[str]) -> Iterator[list[SharedProjection]]:
    """Puts a `SharedProjection` before every module of `network` that is named, whatever module stands there."""
    shared: list[tuple[nn.Module, str, SharedProjection]] = []
    for name in sorted(text_only):
        parent, _, leaf = name.rpartition(".")
        shared.append((network.get_submodule(parent), leaf, SharedProjection(network.get_submodule(name))))
    try:
        for parent_module, leaf, projection in shared:
            setattr(parent_module, leaf, projection)
        yield [projection for _, _, projection in shared]
    finally:
        for parent_module, leaf, projection in shared:
            setattr(parent_module, leaf, projection.base)


@torch.no_grad()
def sample(
    model: TextToImage,
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

    `prompts` hold expanded concept tokens; `generators` (CPU, one per image) draw all noise. `guidance` <= 1 leaves
    out the unconditional pass. Runs under the caller's autocast, which the passes alone notice. Raises UserError
    when latents are not finite.
    """
    if len(prompts) != len(generators):
        raise ValueError(f"{len(prompts)} prompts but {len(generators)} generators")
    model.sampler(scheduler, steps)
    info = model.info
    decoded: list[Tensor] = []
    kept: list[str] | None = None
    text: Text | None = None
    with processes.apart(), shared_text(model.network, model.text_only) as projections:
        for start in processes.mine(range(0, len(prompts), batch_size)):
            batch = list(prompts[start : start + batch_size])
            own = list(generators[start : start + batch_size])
            drawn = [torch.randn(info.latent_shape, generator=g) for g in own]
            rows = [negative_prompt] * len(batch) + batch if guidance > 1 else batch
            unique = list(dict.fromkeys(rows))
            keep = unique == kept
            if text is None or not keep:
                text, kept = model.encode_text(unique), unique
                if not bool(torch.isfinite(text.states).all()):
                    raise UserError(
                        f"what the text encoder makes of {batch[0]!r} is not finite: its words have diverged, or are "
                        "too large for this precision; lower method.lr, or set precision=fp32"
                    )
            first = torch.tensor([rows.index(p) for p in unique], device=model.device)
            index = torch.tensor([unique.index(p) for p in rows], device=model.device)
            for projection in projections:
                projection.share(first, index, keep)
            noise = torch.stack(drawn).to(model.device)
            latents = _denoise(model, noise, text[index], model.sampler(scheduler, steps), guidance, own)
            if not bool(torch.isfinite(latents).all()):
                raise UserError(
                    f"the images of {batch[0]!r} are not finite: the weights have diverged, or are too large for this "
                    "precision; lower method.lr or the penalty's weight, or set precision=fp32"
                )
            parts = latents.split(max(1, DECODED_PIXELS // info.image_size**2))
            decoded.append(torch.cat([model.decode(part) for part in parts]))
    decoded = processes.together(decoded)
    return torch.cat(decoded) if decoded else torch.empty(0, info.image_size, info.image_size, 3, dtype=torch.uint8)


def _denoise(
    model: TextToImage, noise: Tensor, text: Text, scheduler: Any, guidance: float, generators: list[torch.Generator]
) -> Tensor:
    """Latents (B, C, h, w) float32 from noise of that shape; text of B or 2 B rows, the unconditional half first.

    A scheduler that draws more noise on its way draws each image's from the image's own generator.
    """
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        doubled = torch.cat([latents, latents]) if guidance > 1 else latents
        predicted = model.predict(scheduler.scale_model_input(doubled, t), t.to(noise.device), text)
        if guidance > 1:
            unconditional, conditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(predicted, t, latents, generator=generators).prev_sample
    return latents
