"""DSC: one adapter is trained on, and taught after each task what earlier ones say a picture shows.

Source: Jha et al., arXiv 2410.00700 (ICLR 2025), see `ewc_dc.py`: reconstructed, as there, with its p(c | x).

After each task but the first the student takes steps on the task's pictures. Its teachers are its own start and the
adapter that an earlier concept c_k ended with, drawn for each step. The candidates are c_0 of the pretrained model, c_k
and the task's own c_n:

    score_weight * (H(p_1, p) + H(p_2, p)) + distill_weight * (mean (e_1(c_n) - e(c_n))^2 + mean (e_2(c_k) - e(c_k))^2)

with teachers 1 and 2, cross entropy H and predictions e of one noised picture. What comes out joins the teachers.

Differs from the paper: weights, steps and rate were not found; K and V alone are adapted. The picture is drawn by the
last adapter, whichever concept is asked for; the earlier ones only teach.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualcl.methods.base import check, register_method, unless
from dualcl.methods.ewc_dc import EWCDC, EWCDCConfig, entropy

#: losses are scaled by it, for small gradients vanish in float16; a power of two changes nothing else
SCALE = 2.0**6


@dataclass(frozen=True)
class DSCConfig(EWCDCConfig):
    """Hyper-parameters of diffusion classifier scores in function space; none of them was found in the source."""

    lambda_: float = field(default=0.0, metadata={"help": "lambda of ewc_dc's penalty, which may be added"})
    consolidation_steps: int = field(
        default=100, metadata={"help": "steps after a task, 9 passes each, at most as many as the task has"}
    )
    consolidation_lr: float = field(default=1e-4, metadata={"help": "learning rate of these steps, by Adam"})
    score_weight: float = field(default=1.0, metadata={"help": "weight of the cross entropies to the teachers"})
    distill_weight: float = field(default=1.0, metadata={"help": "weight of the distances to their predictions"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("consolidation_steps", "consolidation_lr", "score_weight", "distill_weight"):
            check(getattr(self, name) >= 0, f"method.{name} must not be negative, got {getattr(self, name)}")
        idle = self.consolidation_steps and not self.score_weight + self.distill_weight
        check(
            not idle,
            "method.score_weight and method.distill_weight are both 0, which leaves nothing to take steps for; "
            "raise one, or set method.consolidation_steps=0",
        )

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        found, read = super().idle(), ("temperature", "pretrained_prompt")
        if self.consolidation_steps and self.score_weight:  # by the cross entropies, whatever lambda is
            found = {option: mend for option, mend in found.items() if option not in read}
        of_steps = ("consolidation_lr", "score_weight", "distill_weight")
        return found | unless(self.consolidation_steps, "method.consolidation_steps above 0", *of_steps)


@register_method(
    "dsc",
    domains=("customization",),
    summary="DSC: one LoRA, consolidated by the diffusion classifier scores of earlier ones (reconstructed)",
    source="arXiv 2410.00700 (its figures)",
)
class DSC(EWCDC):
    """LoRA trained on, with steps after each task under two teachers."""

    Config = DSCConfig
    requires = ("errors",)

    def begin_task(self, task: int) -> None:
        """Goes on with the factors, and makes room to keep them."""
        super().begin_task(task)
        if self.config.consolidation_steps:
            self.register_buffer(f"teacher_{task}", torch.zeros_like(self.flat().detach()))

    def end_task(self, task: int) -> None:
        """Consolidates and keeps the factors; Fisher information, if any, is that of the outcome."""
        if self.config.consolidation_steps:
            self.facts = self.consolidate(task) if task else {}
            self.get_buffer(f"teacher_{task}").copy_(self.flat().detach())
        super().end_task(task)

    @torch.no_grad()
    def set_factors(self, flat: Tensor) -> None:
        """Sets all factors."""
        for p, part in zip(self.factors, flat.split([p.numel() for p in self.factors]), strict=True):
            p.copy_(part.view_as(p))

    @contextlib.contextmanager
    def holding(self, flat: Tensor) -> Iterator[None]:
        """The model with other factors, without gradient, until the end."""
        own = self.flat().detach()
        try:
            self.set_factors(flat)
            with torch.no_grad():
                yield
        finally:
            self.set_factors(own)

    def consolidate(self, task: int) -> dict[str, Any]:
        """Teaches the model on the task's pictures; facts of it."""
        config, first, losses, entropies = self.config, self.flat().detach(), [], []
        adam = torch.optim.Adam(self.factors, lr=config.consolidation_lr)
        for step, batch in enumerate(itertools.islice(self.domain.batches(task, 0), config.consolidation_steps)):
            k = int(torch.randint(task, (1,), generator=self.generator("teacher", task, step)))
            prompts = [config.pretrained_prompt, self.scored.prompts(k)[0], self.scored.prompts(task)[0]]
            taught = []
            for flat in (first, self.get_buffer(f"teacher_{k}")):
                with self.holding(flat):
                    taught.append(self.scored.predictions(batch, prompts))
            with torch.enable_grad():
                student = self.scored.predictions(batch, prompts)
                loss = self.distance(student, taught[0], taught[1], batch)
                grads = torch.autograd.grad(loss * SCALE, self.factors)
            for p, grad in zip(self.factors, grads, strict=True):
                p.grad = grad / SCALE
            self.domain.processes.average(self.factors)
            adam.step()
            losses.append(loss.detach())
            entropies.append(entropy(self.logits(student.detach(), batch)).mean())
        adam.zero_grad(set_to_none=True)
        moved = float((self.flat().detach() - first).double().norm())
        steps = f"the {len(losses)} steps of consolidation after task {task + 1} end in factors that are not finite"
        check(math.isfinite(moved), f"{steps}; lower method.consolidation_lr, or set precision=bf16 or fp32")
        mean, unsure = (float(torch.stack(each).mean()) for each in (losses, entropies))
        facts = {"consolidations": len(losses), "consolidation_loss": mean, "moved": moved}
        return {**facts, "score_entropy_consolidating": unsure}

    def distance(self, student: Tensor, one: Tensor, two: Tensor, batch: Any) -> Tensor:
        """What the student pays; predictions (B, 3, C, h, w) under the pretrained, the earlier and the own concept."""
        said = self.logits(student, batch)
        entropy = torch.stack([F.cross_entropy(said, self.logits(x, batch).softmax(1)) for x in (one, two)]).sum()
        far = ((student[:, 2] - one[:, 2]).square() + (student[:, 1] - two[:, 1]).square()).mean((1, 2, 3))
        away = (far * self.scored.noise_weights(batch)).mean()
        return float(self.config.score_weight) * entropy + float(self.config.distill_weight) * away

    def stored_parameters(self) -> int:
        """The factors after each task, of which the last are the model's, and Fisher information if any."""
        one = sum(p.numel() for p in self.factors)
        pool = max(self.finished, 1) if self.config.consolidation_steps else 1
        return super().stored_parameters() + (pool - 1) * one

    def caveats(self) -> list[str]:
        """EWC-DC's, what it costs beside the steps, and what draws."""
        n = self.config.consolidation_steps
        further = f"takes up to {n} further steps after each task but the first, of 9 passes each; keeps all adapters"
        draws = "the last adapter draws all concepts, earlier ones only teach"
        return [*super().caveats(), *([further, draws] if n else [])]
