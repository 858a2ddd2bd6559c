"""Merging baselines: what the low-rank updates of all tasks become when each has ended. Both domains.

Source: Staniszewski et al., "Low-Rank Continual Personalization of Diffusion Models", arXiv 2410.04891; read: its
abstract and public code luk-st/continual-lora, eb586cd. The update that is merged after task t is D_t = A_t B_t:

    sum         S_t = S_{t-1} + D_t, which is `lora`
    magnitude   of each entry the larger in absolute value of S_{t-1} and D_t; of equal ones D_t's
    mean        the mean of D_1 ... D_t, each learnt on the pretrained weights
    ties        their TIES merge (arXiv 2306.01708; not of that paper), each learnt on the pretrained weights

Under `sum` and `magnitude` the next task trains on W_init + S_t, as there. With `orthogonal_init` B starts orthogonal
to the B of all earlier tasks. Trained on with one pair of factors, the paper's naive way, is `lora` with `one_adapter`.

Differs from the paper: sites and token rows are the domain's, not q, k, v and out of all attentions without a token;
float32 throughout, where 16 bits lose small entries. "Orthogonal" is between row spaces, in the code it is between
columns of r numbers (`unit_columns`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import check, check_quirks, register_method, unless
from dualcl.methods.lora import LoRAConfig, SeparateLoRA, refuse_options
from dualcl.methods.shared.ties import ties

RULES = ("sum", "magnitude", "mean", "ties")


@dataclass(frozen=True)
class LoRAMergeConfig(LoRAConfig):
    """Hyper-parameters of the merging baselines."""

    rule: Literal["sum", "magnitude", "mean", "ties"] = field(
        default="magnitude", metadata={"help": "what updates are merged by: sum (which is lora), magnitude, mean, ties"}
    )
    density: float = field(default=0.2, metadata={"help": "ties: share of an update's entries that is kept"})
    orthogonal_init: bool = field(
        default=False, metadata={"help": "B starts orthogonal to those of all earlier tasks, rank * tasks <= inputs"}
    )
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of public codes, for parity only: factor_sum, unit_columns, ties_zero"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "factor_sum": "factors of all tasks are added, not products: the model then is not the one that was trained",
        "unit_columns": "each column of B starts orthogonal to that of the last task alone, with norm 1",
        "ties_zero": "an entry whose updates add up to 0 takes the sign of most others",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "lora_merge")
        check(self.rule in RULES, f"method.rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        check(0 < self.density <= 1, f"method.density must be above 0 and at most 1, got {self.density}")
        check_quirks(self.reference_quirks, self.QUIRKS)
        for quirk, there, what in (
            ("factor_sum", self.rule == "sum", "method.rule=sum"),
            ("unit_columns", self.orthogonal_init, "method.orthogonal_init=true"),
            ("unit_columns", self.rank > 1, "a method.rank above 1"),
            ("ties_zero", self.rule == "ties", "method.rule=ties"),
        ):
            check(there or quirk not in self.reference_quirks, f"the quirk {quirk} is for {what}")

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.rule == "ties", "method.rule=ties", "density")


def orthogonal_rows(earlier: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """(rank, d) float64: orthogonal rows, also to `earlier` (n, d), of norm 1/sqrt(3) as a usual start's."""
    drawn = torch.randn(rank, earlier.shape[1], generator=generator, dtype=torch.float64)
    taken = torch.linalg.qr(earlier.double().T)[0]
    drawn -= drawn @ taken @ taken.T
    return torch.linalg.qr(drawn.T)[0].T / math.sqrt(3)


def orthogonal_columns(last: Tensor, generator: torch.Generator) -> Tensor:
    """(r, d) float64: columns of norm 1, each orthogonal to that of `last` (r, d)."""
    last = last.double()
    drawn = torch.randn(last.shape, generator=generator, dtype=torch.float64)
    drawn -= last * (last * drawn).sum(0) / last.square().sum(0).clamp_min(1e-30)
    return drawn / drawn.norm(dim=0)


@register_method(
    "lora_merge",
    domains=("classification", "customization"),
    summary="LoRA merged after each task: by the larger entries, the mean or TIES, or with orthogonal starts",
    source="arXiv 2410.04891; ties: arXiv 2306.01708",
)
class LoRAMerge(SeparateLoRA):
    """LoRA whose updates are merged by a rule of `RULES`."""

    Config = LoRAMergeConfig

    def __init__(self, config: LoRAMergeConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.apart = config.rule in ("mean", "ties")
        quirks = config.reference_quirks
        self.keeps_factors = config.rule == "ties" or "factor_sum" in quirks or config.orthogonal_init
        if config.orthogonal_init and "unit_columns" not in quirks:
            narrow = min(u.site.d_in for u in self.updates.values())
            most = narrow // config.rank
            check(
                n_tasks <= most,
                f"method.orthogonal_init: {n_tasks} tasks of rank {config.rank} need {n_tasks * config.rank} inputs, a "
                f"site has {narrow}; lower method.rank, or take {most} tasks at most",
            )

    def factor(self, kind: str, name: str, task: int) -> Tensor:
        """A or B of a site that a finished task ended with."""
        return self.get_buffer(f"{kind}_{task}_{[*self.updates].index(name)}")

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        """Starts fresh factors, and makes room to keep them."""
        super().begin_task(task)
        for i, (name, update) in enumerate(self.updates.items() if self.keeps_factors else ()):
            for kind, like in (("A", update.A), ("B", update.B)):
                self.register_buffer(f"{kind}_{task}_{i}", torch.zeros_like(like, requires_grad=False))
            if task and self.config.orthogonal_init:
                generator = self.generator("init", task, name)
                earlier = [self.factor("B", name, j).cpu() for j in range(task)]
                if "unit_columns" in self.config.reference_quirks:
                    update.B.copy_(orthogonal_columns(earlier[-1], generator))
                else:
                    update.B.copy_(orthogonal_rows(torch.cat(earlier), self.config.rank, generator))

    def merged(self, name: str, task: int) -> Tensor | None:
        """S of a site after the task, by the rule."""
        update, rule = self.updates[name], self.config.rule
        if self.keeps_factors:
            self.factor("A", name, task).copy_(update.A)
            self.factor("B", name, task).copy_(update.B)
        kept = [(self.factor("A", name, j), self.factor("B", name, j)) for j in range(task + 1) if self.keeps_factors]
        if "factor_sum" in self.config.reference_quirks:
            return sum(a for a, _ in kept) @ sum(b for _, b in kept)  # type: ignore[operator]
        new, old = update.product(), update.summed
        if rule == "magnitude":
            return torch.where(new.abs() >= old.abs(), new, old)
        if rule == "mean":
            return (old * task + new) / (task + 1)
        if rule == "ties":
            follows = "ties_zero" in self.config.reference_quirks
            return ties(torch.stack([a @ b for a, b in kept]), self.config.density, follows)
        return None

    def stored_parameters(self) -> int:
        """Factors of all tasks, or one delta per site where that does, with the B that later starts must avoid."""
        n, total = max(self.finished, 1), 0
        need_all = self.config.rule == "ties" or "factor_sum" in self.config.reference_quirks
        avoided = (1 if "unit_columns" in self.config.reference_quirks else n) if self.config.orthogonal_init else 0
        for u in self.updates.values():
            pairs, delta = n * u.rank * (u.site.d_out + u.site.d_in), u.site.d_out * u.site.d_in
            total += pairs if need_all else min(pairs, delta + avoided * u.rank * u.site.d_in)
        return total

    def caveats(self) -> list[str]:
        """What a task is learnt on, and what the merge keeps."""
        own = ["each task is learnt on the pretrained weights"] if self.apart else []
        own += ["keeps the updates of all tasks"] if self.config.rule == "ties" else []
        return [f"updates are merged by {self.config.rule}", *own, *super().caveats()]
