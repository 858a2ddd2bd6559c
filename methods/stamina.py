"""STAMINA: low-rank updates under learnt hard masks, folded into the weights. One file for both domains.

Source: Smith et al., "Continual Diffusion with STAMINA: STack-And-Mask INcremental Adapters", arXiv 2311.18763 (CVPR
workshops 2024). Only its abstract was readable and no code is public: what follows is a reconstruction, and no number
from here is one of that paper. At every site, in task t:

    W_t = W_init + S_{t-1} + M_t (.) (A_t B_t),    S_t = S_{t-1} + M_t (.) (A_t B_t)
    logits l = 2 + U relu(V): a low-rank MLP of one-hot inputs; U (d_out, k) starts at zero, V (k, d_in) is drawn
    in a step M = 1 where l + g > 0, g logistic noise drawn for the step; its gradient is that of sigmoid((l + g) / tau)
    after the task M = 1 where l > 0; U and V are dropped
    loss + sparsity * mean over all sites of the mean of sigmoid(l)

tau falls from 1 to 0.1, by the same factor each step, within `anneal_steps` steps of a task, and stays there: a method
does not know how many steps its task has.

Differs from the paper: not found in the abstract, and so ours, are the form of the MLP, its start, tau, the sparsity
term, all values, and that nothing of C-LoRA's penalty stays. Token embeddings are learnt as in all methods here, not
as the output of an MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import ParamGroup, check, register_method
from dualcl.methods.lora import LoRA, LoRAConfig, refuse_options
from dualcl.methods.shared.low_rank import LowRankUpdate

#: logits of a fresh mask: 88 % of the entries are on
START = 2.0
#: temperature of the first step of a task and of the last
WARM, COLD = 1.0, 0.1


@dataclass(frozen=True)
class StaminaConfig(LoRAConfig):
    """Hyper-parameters of STAMINA; none of them was found in the source."""

    mask_rank: int = field(default=4, metadata={"help": "k, hidden units of the MLP behind each mask"})
    mask_lr: float = field(default=1e-2, metadata={"help": "learning rate of the masks"})
    sparsity: float = field(default=1e-2, metadata={"help": "weight of the mean density of the masks"})
    anneal_steps: int = field(
        default=100, metadata={"help": "steps of a task within which the masks' temperature falls from 1 to 0.1"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "stamina")
        check(self.mask_rank >= 1, f"method.mask_rank must be at least 1, got {self.mask_rank}")
        check(self.mask_lr >= 0, f"method.mask_lr must not be negative, got {self.mask_lr}")
        check(self.sparsity >= 0, f"method.sparsity must not be negative, got {self.sparsity}")
        check(self.anneal_steps >= 1, f"method.anneal_steps must be at least 1, got {self.anneal_steps}")


class Mask(nn.Module):
    """Which entries of one site's update count, from a low-rank MLP."""

    def __init__(self, update: LowRankUpdate, rank: int) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": update.A.device, "dtype": update.A.dtype}
        self.U = nn.Parameter(torch.zeros(update.site.d_out, rank, **like), requires_grad=False)
        self.V = nn.Parameter(torch.zeros(rank, update.site.d_in, **like), requires_grad=False)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """A fresh mask for a new task, the same at every entry."""
        self.U.zero_()
        self.V.copy_(torch.randn(self.V.shape, generator=generator))
        self.requires_grad_(True)

    def logits(self) -> Tensor:
        """(d_out, d_in); an entry counts where it is positive."""
        return START + self.U @ self.V.relu()

    def sample(self, generator: torch.Generator, temperature: float) -> Tensor:
        """A draw of 0 and 1 (d_out, d_in), with the gradient of a sigmoid of that temperature."""
        logits = self.logits()
        # on the CPU, so that a seed means the same numbers on every device; away from 0, whose logit is infinite
        drawn = torch.rand(logits.shape, generator=generator).clamp_min(1e-12)
        noisy = logits + drawn.logit().to(logits)
        soft = (noisy / temperature).sigmoid()
        return (noisy > 0).to(soft) + (soft - soft.detach())  # 0 and 1 exactly

    @torch.no_grad()
    def hard(self) -> Tensor:
        """0 and 1 (d_out, d_in), without noise: what is kept."""
        return (self.logits() > 0).to(self.U)


@register_method(
    "stamina",
    domains=("classification", "customization"),
    summary="STAMINA: low-rank updates under learnt hard masks, folded after each task (reconstructed)",
    source="arXiv 2311.18763 (its abstract)",
)
class Stamina(LoRA):
    """LoRA in sequence, each update under a mask that is learnt with it."""

    Config = StaminaConfig
    steps: Tensor

    def __init__(self, config: StaminaConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.masks = nn.ModuleList(Mask(u, config.mask_rank) for u in self.updates.values())
        #: taken in this task
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.task = 0
        self.facts: dict[str, Any] = {}

    def masked(self) -> list[tuple[str, LowRankUpdate, Mask]]:
        """Every site's name, update and mask."""
        return [(n, u, m) for (n, u), m in zip(self.updates.items(), self.masks, strict=True)]  # type: ignore[misc]

    def begin_task(self, task: int) -> None:
        """Starts fresh factors and masks at every site."""
        super().begin_task(task)
        self.task = task
        self.steps.zero_()
        for name, _, mask in self.masked():
            mask.start(self.generator("mask", task, name))

    def trained(self) -> list[ParamGroup]:
        """The factors and the masks of every site."""
        return [*super().trained(), ParamGroup("masks", list(self.masks.parameters()), self.config.mask_lr)]

    def temperature(self) -> float:
        """Of the step that is about to be taken."""
        share = min(int(self.steps) / self.config.anneal_steps, 1.0)
        return WARM * (COLD / WARM) ** share

    def loss(self, batch: Any) -> Tensor:
        """The domain's, with masks drawn for the step."""
        temperature = self.temperature()
        for name, update, mask in self.masked():
            drawn = mask.sample(self.generator("noise", self.task, int(self.steps), name), temperature)
            update.instead = drawn * (update.A @ update.B)
        self.steps += 1
        return self.domain.loss(batch)

    def penalty(self) -> Tensor | None:
        """sparsity * mean density of the masks."""
        if self.config.sparsity == 0:
            return None
        densities = [mask.logits().sigmoid().mean() for _, _, mask in self.masked()]
        return float(self.config.sparsity) * torch.stack(densities).mean()

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Folds the masked updates into the weights."""
        squares, on, again, every = 0.0, 0, 0, 0
        for _, update, mask in self.masked():
            hard = mask.hard()
            moved = hard * update.product()
            squares += float(moved.double().square().sum())
            on, every = on + int(hard.sum()), every + hard.numel()
            again += int((hard.bool() & (update.summed != 0)).sum())
            update.set_summed(update.summed + moved)
            update.instead = None
            mask.requires_grad_(False)
        self.norms.append(math.sqrt(squares))
        self.facts = {"density": on / every, "used_before": again / max(on, 1)}
        self.finished = task + 1

    def restored(self, finished: int) -> None:
        """Nothing of a step that was cut short stays."""
        super().restored(finished)
        for update in self.updates.values():
            update.instead = None

    def stored_parameters(self) -> int:
        """One delta per site, or factors and masks' MLPs of all finished tasks, whichever is smaller."""
        n = max(self.finished, 1) * (self.config.rank + self.config.mask_rank)
        sites = [u.site for u in self.updates.values()]
        return sum(min(s.d_out * s.d_in, n * (s.d_out + s.d_in)) for s in sites)

    def diagnostics(self) -> dict[str, Any]:
        """LoRA's, the share of entries that the last masks let through, and of these that an earlier task used."""
        return {**super().diagnostics(), **self.facts}

    def caveats(self) -> list[str]:
        """That it is a reconstruction."""
        own = "reconstructed from the paper's abstract, no MLP behind the tokens: not a reproduction of STAMINA"
        return [own, *super().caveats()]
