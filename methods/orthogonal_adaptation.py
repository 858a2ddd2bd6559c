"""Orthogonal Adaptation: each concept moves the weights along input directions of its own, so that updates add up.

Source: Po et al., "Orthogonal Adaptation for Modular Customization of Diffusion Models", arXiv 2312.02432 (CVPR 2024).
Read: a machine copy of its text, and code of its authors' demo in enisimsar/LoRACLR, 93e34e0. W_init + A_i B_i is
learnt for each concept i on the pretrained weights; A_i (d_out, r) starts at zero, B_i (r, d_in) is r rows of one
orthogonal matrix O, the same for all sites of one d_in, and stays. In use:

    W = W_init + lambda * sum_i A_i B_i

On inputs in the row space of B_i the updates of others are 0 where B_j B_i' = 0.

Differs from the paper: the rows of B_i are blocks that no two concepts share while there are enough (`rows: random`
is the text: drawn anew for each, so that two share r^2 / d_in on average); K and V alone are adapted, with the
domain's token rows, not all linear layers with two layer-wise tokens. Rows of O have norm 1, those of a usual LoRA's B
1/sqrt(3) on average at the start, so that by Adam the same rate moves a weight sqrt(3) times as far here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import ParamGroup, check, check_quirks, register_method
from dualcl.methods.lora import LoRAConfig, SeparateLoRA, refuse_options


@dataclass(frozen=True)
class OrthogonalAdaptationConfig(LoRAConfig):
    """Hyper-parameters of Orthogonal Adaptation; the paper has rank 20."""

    merge_weight: float = field(
        default=0.6, metadata={"help": "lambda, weight of every concept's update in use; the paper's, for three"}
    )
    rows: Literal["disjoint", "random"] = field(
        default="disjoint",
        metadata={"help": "rows of O that a concept gets: a block of its own, or drawn anew (the paper's text)"},
    )
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of the public code, for parity only: half_basis"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "half_basis": "rows of B have norm 1/2, not 1",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "orthogonal_adaptation")
        check(self.merge_weight > 0, f"method.merge_weight must be positive, got {self.merge_weight}")
        known = self.rows in ("disjoint", "random")
        check(known, f"method.rows must be disjoint or random, got {self.rows!r}")
        check_quirks(self.reference_quirks, self.QUIRKS)


@register_method(
    "orthogonal_adaptation",
    domains=("customization",),
    summary="Orthogonal Adaptation: low-rank updates along fixed input directions of each concept's own, added up",
    source="arXiv 2312.02432",
)
class OrthogonalAdaptation(SeparateLoRA):
    """LoRA of each concept from the pretrained weights, with a B that is set, not learnt."""

    Config = OrthogonalAdaptationConfig

    def __init__(self, config: OrthogonalAdaptationConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.bases: dict[int, Tensor] = {}

    def basis(self, d: int) -> Tensor:
        """O (d, d), float64: orthogonal, uniformly drawn."""
        if d not in self.bases:
            drawn = torch.randn(d, d, generator=self.generator("basis", d), dtype=torch.float64)
            q, r = torch.linalg.qr(drawn)
            # signs fixed: qr alone is not uniform, and libraries choose differently
            self.bases[d] = q * r.diagonal().sign()
        return self.bases[d]

    def chosen(self, task: int, d: int) -> Tensor:
        """Which rows (r,) of O the task gets."""
        rank = self.config.rank
        if self.config.rows == "random":
            return torch.randperm(d, generator=self.generator("rows", task, d))[:rank]
        start = task % (d // rank) * rank
        return torch.randperm(d, generator=self.generator("rows", d))[start : start + rank]

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        """A at zero beside the pretrained weights, B set."""
        super().begin_task(task)
        scale = 0.5 if "half_basis" in self.config.reference_quirks else 1.0
        for update in self.updates.values():
            d = update.site.d_in
            update.B.copy_(self.basis(d)[self.chosen(task, d)] * scale)
            update.B.requires_grad_(False)

    def trained(self) -> list[ParamGroup]:
        """A of every site."""
        params = [u.A for u in self.updates.values()]
        return [ParamGroup("factors", params, self.config.lr, self.config.weight_decay)]

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Adds lambda A B to the sum that the weights hold."""
        for update in self.updates.values():
            update.A.mul_(self.config.merge_weight)
        super().end_task(task)

    def stored_parameters(self) -> int:
        """A of all finished tasks (B is drawn from the seed), or one delta per site where that is smaller."""
        n = max(self.finished, 1)
        return sum(u.site.d_out * min(u.site.d_in, n * u.rank) for u in self.updates.values())

    def shared_rows(self, task: int) -> int:
        """How many rows of O the task has in common with any earlier one, where that is most."""
        widths = {u.site.d_in for u in self.updates.values()}
        chosen = {d: [set(self.chosen(j, d).tolist()) for j in range(task + 1)] for d in widths}
        return max(len(sets[-1] & set().union(*sets[:-1])) for sets in chosen.values())

    def diagnostics(self) -> dict[str, Any]:
        """LoRA's, and rows of O that the last task shares with earlier ones."""
        return {**super().diagnostics(), "shared_rows": self.shared_rows(max(self.finished - 1, 0))}

    def caveats(self) -> list[str]:
        """How concepts are learnt and added, and where their directions are not their own."""
        config = self.config
        own = ["each concept is learnt on the pretrained weights; K and V alone, the paper adapts all linear layers"]
        if config.merge_weight != 1:
            own.append(f"in use an update counts {config.merge_weight:g} times, from its own evaluation on")
        blocks = min(u.site.d_in // config.rank for u in self.updates.values())
        if config.rows == "disjoint":
            own.append("rows of B are disjoint blocks, the paper draws them at random")
            if self.n_tasks > blocks:
                own.append(
                    f"there are {blocks} blocks of {config.rank} rows: later concepts share those of earlier ones"
                )
        return [*own, *super().caveats()]
