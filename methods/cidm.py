"""CIDM: each concept has a low-rank update of its own; a prompt weighs them by how near its words are to the concepts'.

Source: Dong et al., "How to Continually Adapt Text-to-Image Diffusion Models for Flexible Customization?", arXiv
2410.17594 (NeurIPS 2024); read: a machine copy of its text, and public code JiahuaDong/CIFC, 9819aa8. The update D_i =
A_i B_i of concept i is learnt on the pretrained weights. In use, with a prompt's text features c_l at all positions l,
and the mean e_i of those of concept i's tokens in its first training prompt:

    W = W_init + sum_i psi_i D_i,     M_i = max_l cos(c_l, e_i),     psi = M^2 / ||M^2||_2

The task's loss grows by gamma_1 R_1 + gamma_2 R_2; R_1 is the sum of |A_i A_g'|, all entries, over earlier i and sites.
It is zero at A_g = 0 alone: it shrinks, and keeps no subspaces apart, as `subspace: inner`, A_i' A_g, would.

Differs from the paper: R_2 is left out (how its H_i and W_* start is not said; in the code, where nothing calls them,
they start at zero and would stay there), and R_1 is off by default (its own ablation gains most by the weights). A
negative M_i counts as 0, not by its square. K and V alone are adapted, by the domain's tokens; no layer-wise tokens,
noise offset, attention penalty or early stop, as in the code. The empty prompt is weighed by itself.

Text features may all point nearly one way; then, as own_weight and all_weights in the record say, every prompt weighs
all concepts alike, unless a `threshold` tells them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dualcl.benchmark.core.domain import ConceptInputsDomain, Domain, TokenRowsDomain
from dualcl.methods.base import Routed, check, check_quirks, register_method, unless
from dualcl.methods.lora import LoRAConfig, SeparateLoRA, refuse_options
from dualcl.methods.shared.low_rank import SidedLinear, replace_module


@dataclass(frozen=True)
class CIDMConfig(LoRAConfig):
    """Hyper-parameters of CIDM; the paper has rank 4."""

    rank: int = field(default=4, metadata={"help": "r, rank of each concept's update"})
    gamma_1: float = field(default=0.0, metadata={"help": "weight of R_1; the paper's is 0.1, of a sum that is large"})
    subspace: Literal["outer", "inner"] = field(
        default="outer", metadata={"help": "what R_1 adds up: A_i A_g' (the paper's text) or A_i' A_g"}
    )
    threshold: float = field(
        default=0.0, metadata={"help": "cosines below it count as 0, so that plain prompts are left alone; paper: none"}
    )
    alpha: float = field(default=1.0, metadata={"help": "weight of the weighed sum in use; the code's is 0.8"})
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of the public code, for parity only: code_weights, means, pull_to_one"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "code_weights": "psi is M^4 over its sum, M_i a mean over the concept's words, negative ones count as positive",
        "means": "R_1 is a mean over entries, sites and earlier concepts",
        "pull_to_one": "gamma_1 times the mean square of A - 1 is added, in the place of R_2",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "cidm")
        check(self.gamma_1 >= 0, f"method.gamma_1 must not be negative, got {self.gamma_1}")
        check(self.subspace in ("outer", "inner"), f"method.subspace must be outer or inner, got {self.subspace!r}")
        check(0 <= self.threshold < 1, f"method.threshold must be from 0 to below 1, got {self.threshold}")
        check(self.alpha > 0, f"method.alpha must be positive, got {self.alpha}")
        check_quirks(self.reference_quirks, self.QUIRKS)
        for quirk in {"means", "pull_to_one"} & {*self.reference_quirks}:
            check(self.gamma_1 > 0, f"the quirk {quirk} is for a method.gamma_1 above 0")

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.gamma_1, "method.gamma_1 above 0", "subspace")

    @property
    def code(self) -> bool:
        """Whether weights are the public code's."""
        return "code_weights" in self.reference_quirks


def route(x: Tensor, keys: Tensor, config: CIDMConfig) -> Tensor:
    """psi (B, N), float32, of text features x (B, L, d) for unit keys (N, W, d) of N concepts; no key: W counts."""
    with torch.autocast(x.device.type, enabled=False):
        found = torch.einsum("bld,nwd->bnwl", F.normalize(x.float(), dim=-1), keys).amax(-1).mean(-1)
        if config.threshold or not config.code:
            found = found * (found >= config.threshold)
        powers = found**4 if config.code else found**2
        return config.alpha * powers / powers.norm(p=1 if config.code else 2, dim=-1, keepdim=True).clamp_min(1e-30)


@register_method(
    "cidm",
    domains=("customization",),
    summary="CIDM: a LoRA of each concept from the pretrained weights, weighed by each prompt's words (no R_2)",
    source="arXiv 2410.17594",
)
class CIDM(SeparateLoRA):
    """LoRA of each concept from the pretrained weights; between tasks the text at a site weighs all of them."""

    Config = CIDMConfig
    requires = ("concept_inputs", "token_rows")

    def __init__(self, config: CIDMConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.one_text()
        for i, site in enumerate(u.site for u in self.updates.values()):
            whole = site.d_out == site.module.out_features
            check(whole, f"cidm needs sites that are whole projections, {site.name} is a part; choose another model")
            now = domain.model.get_submodule(site.module_name)
            replace_module(domain.model, site.module_name, SidedLinear(now, functools.partial(self.sides, i)))

    def factor(self, kind: str, task: int, site: int) -> Tensor:
        """A or B of a site that a finished task ended with."""
        return self.get_buffer(f"{kind}_{task}_{site}")

    def keys(self) -> Tensor:
        """(N, W, d) of the finished tasks, of norm 1; W is 1 but for the code's weights."""
        return torch.stack([self.get_buffer(f"key_{j}") for j in range(self.finished)])

    def sides(self, site: int, x: Tensor) -> Tensor | None:
        """The weighed updates of a site at text features x (B, L, d_in); None while a task is learnt by itself."""
        if self.finished == 0 or next(iter(self.updates.values())).active:
            return None
        done = range(self.finished)
        hidden = F.linear(x, torch.cat([self.factor("B", j, site) for j in done]))
        weights = route(x, self.keys(), self.config).repeat_interleave(self.config.rank, dim=1)
        weighed = hidden * weights[:, None].to(hidden.dtype)
        return F.linear(weighed, torch.cat([self.factor("A", j, site) for j in done], dim=1))

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        """Starts fresh factors beside the pretrained weights, and makes room to keep them and the concept's key."""
        super().begin_task(task)
        for i, u in enumerate(self.updates.values()):
            self.register_buffer(f"A_{task}_{i}", torch.zeros_like(u.A, requires_grad=False))
            self.register_buffer(f"B_{task}_{i}", torch.zeros_like(u.B, requires_grad=False))
        self.words = len(cast(TokenRowsDomain, self.domain).token_rows(task)[0])
        self.register_buffer(f"key_{task}", torch.zeros(self.words if self.config.code else 1, *u.B.shape[1:]).to(u.B))

    def penalty(self) -> Tensor | None:
        """gamma_1 R_1; None for the first task."""
        gamma_1, inner, quirks = self.config.gamma_1, self.config.subspace == "inner", self.config.reference_quirks
        if not gamma_1 or not self.begun:
            return None
        add: Callable[[Tensor], Tensor] = torch.mean if "means" in quirks else torch.sum
        terms = []
        for i, u in enumerate(self.updates.values()):
            earlier = [self.factor("A", j, i) for j in range(self.begun)]
            overlap = torch.cat([a.T for a in earlier]) @ u.A if inner else torch.cat(earlier) @ u.A.T
            terms.append(add(overlap.abs()))
        total = add(torch.stack(terms))
        if "pull_to_one" in quirks:
            total = total + torch.stack([(u.A - 1).square().mean() for u in self.updates.values()]).mean()
        return float(gamma_1) * total

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Keeps the concept's update and the mean of its tokens' features."""
        domain = cast(ConceptInputsDomain, self.domain)
        words = F.normalize(domain.concept_inputs(task, own=True)[: self.words], dim=1)
        self.get_buffer(f"key_{task}").copy_(words if self.config.code else F.normalize(words.mean(0), dim=0))
        super().end_task(task)
        psi = torch.cat([route(domain.concept_inputs(j)[None], self.keys(), self.config) for j in range(task + 1)])
        self.facts = {"own_weight": float(psi.diagonal().mean()), "all_weights": float(psi.sum(1).mean())}

    def merged(self, name: str, task: int) -> Tensor | None:
        """Nothing is merged: the factors are kept, the weight stays the pretrained one."""
        u, i = self.updates[name], [*self.updates].index(name)
        self.factor("A", task, i).copy_(u.A)
        self.factor("B", task, i).copy_(u.B)
        return torch.zeros_like(u.summed)

    def routed(self) -> Routed | None:
        """Every concept's update, and what a prompt weighs them by."""
        config, names = self.config, [*self.updates]
        every = [
            [(self.factor("A", j, i), self.factor("B", j, i)) for i in range(len(names))] for j in range(self.finished)
        ]
        rule = {"power": 4, "norm": 1, "clamped": False} if config.code else {"power": 2, "norm": 2, "clamped": True}
        updates = [dict(zip(names, one, strict=True)) for one in every]
        return Routed(updates, self.keys(), {**rule, "threshold": config.threshold, "alpha": config.alpha})

    def stored_parameters(self) -> int:
        """Factors and key of every concept."""
        factors = sum(u.rank * (u.site.d_out + u.site.d_in) for u in self.updates.values())
        return max(self.finished, 1) * factors + sum(self.get_buffer(f"key_{j}").numel() for j in range(self.finished))

    def diagnostics(self) -> dict[str, Any]:
        """Norm of the last update; what concepts' own prompts give to their own update and to all, on average."""
        return {"update_norm": self.norms[-1] if self.norms else 0.0, **self.facts}

    def caveats(self) -> list[str]:
        """What is kept of each concept, and what is not the paper's."""
        left_out = "R_2 of its loss is" if self.config.gamma_1 else "R_1 and R_2 of its loss are"
        kept = "keeps the updates of all concepts, each learnt on the pretrained weights; a prompt weighs them: the "
        kept += "cost of a picture grows with their number"
        own = f"reconstructed: {left_out} left out, no layer-wise tokens, K and V alone"
        return [kept, own, *super().caveats()]
