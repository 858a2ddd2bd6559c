"""InfLoRA: low-rank updates that read only what earlier tasks' inputs do not use.

Source: Liang and Li, arXiv 2404.00228 (CVPR 2024); public code liangyanshuo/InfLoRA, read at e08b00e. On K and V of
every block W_t = W_{t-1} + A_t B_t; A_t (d, r) starts at zero and is learnt, B_t (r, d) is set before the task and
stays. x: what Q, K and V of a block read, all tokens, earlier tasks' updates on; M: orthonormal basis of what
those tasks need.

    S = mean of x x',   B_t = U_r' / sqrt(3),  U_r the first r left singular vectors of (I - M M') S
    after the task, S anew: M takes in singular vectors of (I - M M') S, the largest first, until the share of the sum
    of S's squared singular values that lies in M reaches e_t = e + (1 - e) t / T   (DualGPM)

Kept is M, or the basis of what it leaves out, whichever has fewer columns. Loss: cross entropy of the task's classes.

1 / sqrt(3) is the public code's, not the paper's.

Differs from the public code: in the first task M reaches e_0 as in every other (`first_below`: it stays below). S is of
the evaluation view, not of augmented images. Singular vectors come from `eigh` in float64 within the complement of M,
so that B_t M = 0 to rounding. As in that code the criterion is on S, whose singular values are squares of those of x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain, FeatureDomain, Site
from dualcl.methods.base import ParamGroup, check, check_quirks, register_method
from dualcl.methods.lora import LoRA, LoRAConfig


@dataclass(frozen=True)
class InfLoRAConfig(LoRAConfig):
    """Options of InfLoRA; rank and epsilon as on ImageNet-R in the public code."""

    rank: int = field(default=10, metadata={"help": "r, rank of each task's update"})
    epsilon: float = field(
        default=0.98, metadata={"help": "e, share of the squared spectrum that the first task's basis holds"}
    )
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of the public code, for parity only: first_below"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "first_below": "the first task's basis holds less than epsilon: its last direction is left out",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.epsilon <= 1, f"method.epsilon must be above 0 and at most 1, got {self.epsilon}")
        check(not self.one_adapter, "method.one_adapter is an ablation of lora and clora; inflora has none")
        check_quirks(self.reference_quirks, self.QUIRKS)


def rest_of(basis: Tensor) -> Tensor:
    """Orthonormal (d, d - k): what the orthonormal columns (d, k) leave out."""
    return torch.linalg.qr(basis, mode="complete")[0][:, basis.shape[1] :]


def spectrum(moment: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (d, m) of R R' S in the span of R (d, m), and squared singular values, largest first."""
    left = rest.T @ moment
    values, vectors = torch.linalg.eigh(left @ left.T)
    return rest @ vectors.flip(1), values.flip(0).clamp_min(0)


def designed(moment: Tensor, rest: Tensor, rank: int) -> Tensor:
    """B (rank, d) from S (d, d) and what M leaves out; rows of zeros where that has fewer directions."""
    out = moment.new_zeros(rank, len(moment))
    found = spectrum(moment, rest)[0][:, :rank].T / math.sqrt(3)
    out[: len(found)] = found
    return out


def directions_needed(values: Tensor, total: float, share: float, first_below: bool = False) -> int:
    """How many directions M takes in: squared singular values of what it left out, their sum over all of S."""
    held = torch.cat([values.new_zeros(1), values.cumsum(0)]) / total + (1 - float(values.sum()) / total)
    if first_below:
        return max(int((held[1:] < share).sum()), 1)
    return int((held[:-1] < share - 1e-12).sum())


@register_method(
    "inflora",
    domains=("classification",),
    summary="InfLoRA: low-rank updates of K and V in directions that earlier tasks' inputs do not use",
    source="arXiv 2404.00228",
)
class InfLoRA(LoRA):
    """LoRA on K and V whose B is set, not learnt."""

    Config = InfLoRAConfig
    requires = ("features",)
    bases: Tensor
    columns: Tensor
    complements: Tensor

    def __init__(self, config: InfLoRAConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        #: Linears whose inputs are looked at, one to a block, and the updates that read them
        self.readers = [(k, self.updates[k], self.updates[f"{k[:-1]}v"]) for k in self.updates if k.endswith(".k")]
        d = max(k.site.d_in for _, k, _ in self.readers)
        self.register_buffer("bases", torch.zeros(len(self.readers), d, d // 2))
        self.register_buffer("columns", torch.zeros(len(self.readers), dtype=torch.int64))
        #: 1: kept is what M leaves out
        self.register_buffer("complements", torch.zeros(len(self.readers), dtype=torch.int64))

    def adapted(self, sites: dict[str, Site]) -> dict[str, Site]:
        """K and V."""
        return {name: site for name, site in sites.items() if name.endswith((".k", ".v"))}

    def begin_task(self, task: int) -> None:
        """A at zero; B is set by `prepare`."""
        super().begin_task(task)
        for update in self.updates.values():
            update.B.requires_grad_(False).zero_()

    def prepare(self, task: int) -> None:
        """Sets B from the task's inputs."""
        for i, (moment, (_, *updates)) in enumerate(zip(self.moments(task), self.readers, strict=True)):
            b = designed(moment, self.rest(i), self.config.rank)
            for update in updates:
                update.B.copy_(b)

    def trained(self) -> list[ParamGroup]:
        """A of every site."""
        params = [u.A for u in self.updates.values()]
        return [ParamGroup("factors", params, self.config.lr, self.config.weight_decay)]

    def end_task(self, task: int) -> None:
        """Folds the update, and takes into M what the task needs."""
        super().end_task(task)
        share = self.config.epsilon + (1 - self.config.epsilon) * task / self.n_tasks
        below = task == 0 and "first_below" in self.config.reference_quirks
        for i, moment in enumerate(self.moments(task)):
            rest = self.rest(i)
            vectors, values = spectrum(moment, rest)
            n = directions_needed(values, float(moment.square().sum()), share, below)
            self.keep(i, vectors[:, n:])

    def rest(self, i: int) -> Tensor:
        """What M of a block leaves out, (d, d - k) float64 on the CPU."""
        kept, _ = torch.linalg.qr(self.bases[i, :, : int(self.columns[i])].cpu().double())  # they are kept in float32
        return kept if bool(self.complements[i]) else rest_of(kept)

    def keep(self, i: int, rest: Tensor) -> None:
        """Keeps M, or what it leaves out."""
        d, left = rest.shape
        own = rest if 2 * left < d else rest_of(rest)
        self.bases[i].zero_()
        self.bases[i, :, : own.shape[1]] = own.to(self.bases)
        self.columns[i], self.complements[i] = own.shape[1], int(2 * left < d)

    @torch.no_grad()
    def moments(self, task: int) -> list[Tensor]:
        """S of every block, (d, d) float64 on the CPU, by the model as it stands, over all training images' tokens."""
        device = self.domain.device
        sums = [torch.zeros(k.site.d_in, k.site.d_in, device=device) for _, k, _ in self.readers]
        counts = torch.zeros(len(sums), device=device)

        def look(i: int) -> Any:
            def hook(module: Any, args: tuple[Tensor, ...]) -> None:
                x = args[0].flatten(0, -2)
                with torch.autocast(device.type, enabled=False):
                    sums[i].add_(x.float().T @ x.float())
                counts[i] += len(x)

            return self.domain.model.get_submodule(self.readers[i][1].site.module_name).register_forward_pre_hook(hook)

        hooks = [look(i) for i in range(len(sums))]
        try:
            for _ in cast(FeatureDomain, self.domain).training_features(task):
                pass
        finally:
            for handle in hooks:
                handle.remove()
        processes = self.domain.processes  # each saw images of its own
        found = zip([processes.total(s) for s in sums], processes.total(counts), strict=True)
        return [s.cpu().double() / float(n) for s, n in found]

    def stored_parameters(self) -> int:
        """LoRA's, and the bases."""
        return super().stored_parameters() + int(self.columns.sum()) * self.bases.shape[1]

    def diagnostics(self) -> dict[str, Any]:
        """LoRA's, and the mean number of directions that earlier tasks need."""
        d = self.bases.shape[1]
        needed = torch.where(self.complements.bool(), d - self.columns, self.columns)
        return {**super().diagnostics(), "directions_needed": float(needed.double().mean())}

    def caveats(self) -> list[str]:
        """What it knows and keeps, and what passes it takes beside its steps."""
        own = "knows the number of tasks in advance; stores bases of inputs; two more passes over each task's images"
        return [own, *super().caveats()]
