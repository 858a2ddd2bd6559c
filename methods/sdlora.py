"""SD-LoRA: directions of finished low-rank updates stay, magnitudes of all of them are learnt on.

Source: Wu et al., arXiv 2501.13198 (ICLR 2025); public code WuYichen-97/SD-Lora-CL, read at 8bacded. On Q and V of
every block, with ||.|| the Frobenius norm,

    W = W_0 + sum over tasks k <= t of a_k D_k,   D_k = A_k B_k / ||A_k B_k||

In task t A_t, B_t and all magnitudes a_0..a_t are learnt, by the cross entropy of the task's classes.

Differs from the paper: A_t = 0 at first, so the current term is a_t A_t B_t, a_t = 1 at first; when the task ends its
norm moves into a_t, and nothing that the model computes changes. Its variants RR and KD are not here. Habits of the
public code, of which paper, code and logs disagree, are `reference_quirks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain, Site
from dualcl.benchmark.core.errors import UserError
from dualcl.methods.base import Method, MethodConfig, ParamGroup, check, check_quirks, register_method
from dualcl.methods.shared.low_rank import adapt, fresh_factor

RESTART = 0.8


@dataclass(frozen=True)
class SDLoRAConfig(MethodConfig):
    """Options of SD-LoRA."""

    rank: int = field(default=10, metadata={"help": "r, rank of each task's update"})
    reference_quirks: tuple[str, ...] = field(
        default=(),
        metadata={"help": "habits of the public code, for parity only: product_norm, shared_alpha, restart_alpha"},
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "product_norm": "finished updates are divided by ||A|| ||B||, which is more than ||A B||",
        "shared_alpha": "one magnitude per task for all sites; an update's size jumps when the next task begins",
        "restart_alpha": "all magnitudes are 0.8 again when a task begins: what was learnt of them is lost, and the "
        "last update's size jumps",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rank >= 1, f"method.rank must be at least 1, got {self.rank}")
        check_quirks(self.reference_quirks, self.QUIRKS)


class Directions(nn.Module):
    """Updates of one site: factors of finished tasks side by side, the current pair, and the magnitudes of all.

    Read as one pair A (d_out, r (t + 1)), B (r (t + 1), d_in), whose product is the whole update.
    """

    left: Tensor
    right: Tensor
    sizes: Tensor

    def __init__(self, site: Site, rank: int, n_tasks: int, alpha: nn.Parameter) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": site.weight.device, "dtype": torch.float32}
        self.site, self.rank, self.finished, self.begun = site, rank, 0, 0
        self._alpha = [alpha]  # the method's, in whose state it is
        self.own_left = nn.Parameter(torch.zeros(site.d_out, rank, **like))
        self.own_right = nn.Parameter(torch.zeros(rank, site.d_in, **like))
        self.register_buffer("left", torch.zeros(site.d_out, rank * n_tasks, **like))
        self.register_buffer("right", torch.zeros(rank * n_tasks, site.d_in, **like))
        #: what the product of each pair is divided by
        self.register_buffer("sizes", torch.ones(n_tasks, **like))

    @property
    def alpha(self) -> nn.Parameter:
        """Magnitudes (n_tasks,)."""
        return self._alpha[0]

    @property
    def active(self) -> bool:
        """Whether there is an update."""
        return self.begun > 0

    @property
    def A(self) -> Tensor:
        """Left factors times their magnitudes, with gradient."""
        t = self.finished
        scale = (self.alpha[:t] / self.sizes[:t]).repeat_interleave(self.rank)
        own = [self.own_left * self.alpha[t]] if self.begun > t else []
        return torch.cat([self.left[:, : t * self.rank] * scale, *own], 1)

    @property
    def B(self) -> Tensor:
        """Right factors, with gradient of the current one."""
        own = [self.own_right] if self.begun > self.finished else []
        return torch.cat([self.right[: self.finished * self.rank], *own])

    @torch.no_grad()
    def start(self, task: int, generator: torch.Generator) -> None:
        """A fresh pair."""
        self.finished, self.begun = task, task + 1
        self.own_left.zero_()
        self.own_right.copy_(fresh_factor(self.rank, self.site.d_in, generator))

    @torch.no_grad()
    def norm(self, task: int, product: bool = False) -> Tensor:
        """||A B|| of a finished pair, or ||A|| ||B||; 1 of a pair that did not move."""
        at = slice(task * self.rank, (task + 1) * self.rank)
        a, b = self.left[:, at].double(), self.right[at].double()
        size = a.norm() * b.norm() if product else ((a.T @ a) * (b @ b.T)).sum().clamp_min(0).sqrt()
        return torch.where(size > 0, size, torch.ones_like(size)).float()

    @torch.no_grad()
    def finish(self) -> None:
        """The current pair is a finished one."""
        at = slice(self.finished * self.rank, (self.finished + 1) * self.rank)
        self.left[:, at], self.right[at] = self.own_left, self.own_right
        self.sizes[self.finished] = 1
        self.own_left.zero_()
        self.own_right.zero_()
        self.finished += 1


@register_method(
    "sdlora",
    domains=("classification",),
    summary="SD-LoRA: low-rank updates of Q and V, whose magnitudes are learnt on in every later task",
    source="arXiv 2501.13198",
)
class SDLoRA(Method):
    """One pair of factors per task and site, none of them folded, for their magnitudes go on learning."""

    Config = SDLoRAConfig

    def __init__(self, config: SDLoRAConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        sites = {name: site for name, site in domain.sites().items() if name.endswith((".q", ".v"))}
        widest = min(min(s.d_out, s.d_in) for s in sites.values())
        if config.rank > widest:
            raise UserError(f"method.rank={config.rank} is more than the smallest side of a site, {widest}; lower it")
        self.shared = "shared_alpha" in config.reference_quirks
        self.restart = "restart_alpha" in config.reference_quirks
        self.product = "product_norm" in config.reference_quirks
        start = RESTART if self.restart else 1.0
        alphas = [nn.Parameter(torch.full((n_tasks,), start)) for _ in range(1 if self.shared else len(sites))]
        each = alphas * len(sites) if self.shared else alphas
        made = [Directions(site, config.rank, n_tasks, a) for site, a in zip(sites.values(), each, strict=True)]
        self.alphas = nn.ParameterList(alphas)
        self.updates = dict(zip(sites, made, strict=True))
        self.stored = nn.ModuleList(made)
        adapt(domain.model, self.updates)

    def begin_task(self, task: int) -> None:
        """A fresh pair at every site."""
        for name, update in self.updates.items():
            update.start(task, self.generator("init", task, name))
            if task and (self.shared or self.restart):
                update.sizes[task - 1] = update.norm(task - 1, self.product)
        for alpha in self.alphas if self.restart else ():
            alpha.data.fill_(RESTART)

    def trained(self) -> list[ParamGroup]:
        """The current pairs and all magnitudes, the latter without decay."""
        pairs = [p for u in self.updates.values() for p in (u.own_left, u.own_right)]
        return [
            ParamGroup("factors", pairs, self.config.lr, self.config.weight_decay),
            ParamGroup("magnitudes", list(self.alphas), self.config.lr),
        ]

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """The pair stays as it is; its norm moves into its magnitude."""
        for update in self.updates.values():
            update.finish()
            if not (self.shared or self.restart):
                update.sizes[task] = update.norm(task, self.product)
                update.alpha[task] *= update.sizes[task]

    def restored(self, finished: int) -> None:
        """Counts the finished pairs."""
        for update in self.updates.values():
            update.finished = finished

    def stored_parameters(self) -> int:
        """All factors and magnitudes of finished tasks."""
        n = next(iter(self.updates.values())).finished
        pairs = sum(u.rank * (u.site.d_out + u.site.d_in) for u in self.updates.values())
        return n * (pairs + len(self.alphas))

    def caveats(self) -> list[str]:
        """What it costs."""
        return ["every step reads the factors of all tasks so far: its cost grows with them", *super().caveats()]

    def diagnostics(self) -> dict[str, Any]:
        """Mean magnitude, over sites, of each finished update: its norm, but for quirks."""
        n = next(iter(self.updates.values())).finished
        return {"magnitudes": torch.stack([a.detach()[:n].abs() for a in self.alphas]).mean(0).tolist()}
