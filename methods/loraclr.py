"""LoRACLR: concepts learnt apart, then steps towards one weight under which no concept's words come near another's.

Source: Simsar et al., "LoRACLR: Contrastive Adaptation for Customization of Diffusion Models", arXiv 2412.09622 (CVPR
2025); read: a machine copy of its text, and public code enisimsar/LoRACLR, 93e34e0. As in `mix_of_show`, D_i of concept
i is learnt on the pretrained weights, and X_i (n, d_in) are text features of its tokens and the end token. The merge of
a site is an offset D, by AdamW from 0:

    P_i = X_i (W_init + D)',  T_i = X_i (W_init + D_i)',  d_ij = ||T_i - P_j||, all rows of a concept at once
    mean_i [ ||P_i - T_i||^2 + max(0, margin - min_{j != i} d_ij)^2 ] + offset_weight ||D||

After the first concept there is nothing to merge. Real features lie farther apart than the paper's margin of 0.5, so
that the second term is 0 and what is left is a short least-squares descent, in which an entry moves about merge_lr *
merge_steps at most, 0.005 with the paper's. The record has the share of margins at work, and of squared error left.

Differs from the paper: features are of the concept's first training prompt; the code takes two prompts of its own. K
and V alone are adapted, with the domain's token rows: no layer-wise tokens, no update of the text encoder or of other
layers. The code's noise offset and attention regularisation (0.01 each) and its stop at a token norm of 0.55 are left
out. The merge is in float32, the code's under autocast. Prompts of other words than the first training prompt's, those
of evaluation too, are not fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import ConceptInputsDomain, Domain, TokenRowsDomain
from dualcl.methods.base import FIRST_UNMERGED, check, check_quirks, register_method
from dualcl.methods.lora import LoRAConfig, SeparateLoRA, refuse_options


@dataclass(frozen=True)
class LoRACLRConfig(LoRAConfig):
    """Hyper-parameters of LoRACLR."""

    rank: int = field(default=4, metadata={"help": "r, rank of each concept's update"})
    margin: float = field(default=0.5, metadata={"help": "least distance of a concept's targets to others' outputs"})
    merge_lr: float = field(default=1e-4, metadata={"help": "learning rate of the merge, by AdamW"})
    merge_steps: int = field(default=50, metadata={"help": "steps of the merge"})
    merge_decay: float = field(default=1e-4, metadata={"help": "decoupled weight decay of the merge"})
    offset_weight: float = field(default=1e-3, metadata={"help": "weight of the norm of D, which is not squared"})
    mse_weight: float = field(
        default=0.0,
        metadata={"help": "weight of a mean squared error of all outputs; 0.1 in the code, not in the text"},
    )
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of the public code, for parity only: best_seen, code_pairs"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "best_seen": "the merge ends with the offset of least loss among those before a step",
        "code_pairs": "d_ij is between P_i and T_j",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "loraclr")
        for name in ("margin", "merge_lr", "merge_decay", "offset_weight", "mse_weight"):
            check(getattr(self, name) >= 0, f"method.{name} must not be negative, got {getattr(self, name)}")
        check(self.merge_steps >= 1, f"method.merge_steps must be at least 1, got {self.merge_steps}")
        check_quirks(self.reference_quirks, self.QUIRKS)
        pairs = "code_pairs" in self.reference_quirks
        check(self.margin > 0 or not pairs, "the quirk code_pairs is for a method.margin above 0")


def contrast(said: Tensor, wanted: Tensor, margin: float, code_pairs: bool = False) -> tuple[Tensor, Tensor]:
    """(loss, share of concepts whose margin is at work) of outputs P and targets T of N concepts, each (N, n, d)."""
    p, t = said.flatten(1), wanted.flatten(1)
    one, other = (p, t) if code_pairs else (t, p)
    squares = (one[:, None] - other).square().sum(-1)
    own = torch.eye(len(p), dtype=torch.bool, device=p.device)
    nearest = squares.masked_fill(own, torch.inf).amin(1).clamp_min(1e-12).sqrt()
    short = (margin - nearest).clamp_min(0)
    return (squares.diagonal() + short.square()).mean(), (short > 0).float().mean()


@register_method(
    "loraclr",
    domains=("customization",),
    summary="LoRACLR: LoRA of each concept from the pretrained weights, merged by steps on a contrastive loss",
    source="arXiv 2412.09622",
)
class LoRACLR(SeparateLoRA):
    """LoRA of each concept from the pretrained weights; between tasks the model holds what the steps end with."""

    Config = LoRACLRConfig
    requires = ("concept_inputs", "token_rows")

    def __init__(self, config: LoRACLRConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.one_text()

    def begin_task(self, task: int) -> None:
        """Starts fresh factors beside the pretrained weights, and makes room for the concept's targets."""
        super().begin_task(task)
        self.tokens = len(cast(TokenRowsDomain, self.domain).token_rows(task)[0])
        for i, u in enumerate(self.updates.values()):
            self.register_buffer(f"moved_{task}_{i}", torch.zeros(self.tokens + 1, u.site.d_out).to(u.A))

    def inputs(self, task: int) -> Tensor:
        """X_i (n, d_in): features of the concept's tokens and of the end token."""
        own = cast(ConceptInputsDomain, self.domain).concept_inputs(task, own=True)
        return torch.cat([own[: self.tokens], own[-1:]])

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Keeps how the concept moves its own words, and sets the model to the merge of all."""
        self.texts = torch.stack([self.inputs(j) for j in range(task + 1)])
        self.told: list[tuple[float, float, float]] = []
        super().end_task(task)
        if task:
            working, left, moved = (sum(column) for column in zip(*self.told, strict=True))
            self.facts = {"margins_at_work": working / len(self.told), "error_left": left / moved if moved else 0.0}

    def merged(self, name: str, task: int) -> Tensor | None:
        """The offset D of a site; of the first concept its update as it is."""
        u, i = self.updates[name], [*self.updates].index(name)
        x = self.texts.to(u.summed)
        self.get_buffer(f"moved_{task}_{i}").copy_(x[task] @ u.product().T)
        if task == 0:
            return None
        moved = torch.stack([self.get_buffer(f"moved_{j}_{i}") for j in range(task + 1)])
        # the side path is still on, the weight below it is W_init
        before = x @ u.site.weight.to(u.summed).T
        with torch.enable_grad():
            offset = self.descended(x, before, before + moved)
        said = before + x @ offset.T
        working = contrast(said, before + moved, self.config.margin, "code_pairs" in self.config.reference_quirks)[1]
        left = float((said - before - moved).double().square().sum())
        self.told.append((float(working), left, float(moved.double().square().sum())))
        return offset

    def descended(self, x: Tensor, before: Tensor, wanted: Tensor) -> Tensor:
        """D (d_out, d_in) after the steps; x (N, n, d_in), its outputs under W_init and targets (N, n, d_out)."""
        config = self.config
        offset = torch.zeros(wanted.shape[-1], x.shape[-1]).to(x).requires_grad_()
        adam = torch.optim.AdamW([offset], config.merge_lr, weight_decay=config.merge_decay)
        best, least = offset.detach().clone(), torch.inf
        for _ in range(config.merge_steps):
            said = before + x @ offset.T
            loss = contrast(said, wanted, config.margin, "code_pairs" in config.reference_quirks)[0]
            if config.mse_weight:
                loss = loss + config.mse_weight * (said - wanted).square().mean()
            if config.offset_weight:
                loss = loss + config.offset_weight * offset.norm()
            if "best_seen" in config.reference_quirks and float(loss.detach()) < least:
                best, least = offset.detach().clone(), float(loss.detach())
            (offset.grad,) = torch.autograd.grad(loss, [offset])
            adam.step()
        return best if "best_seen" in config.reference_quirks else offset.detach()

    def stored_parameters(self) -> int:
        """A delta per site and how every concept moves its words, or all factors, which give both; the fewer."""
        delta = sum(u.site.d_out * u.site.d_in for u in self.updates.values())
        factors = sum(u.rank * (u.site.d_out + u.site.d_in) for u in self.updates.values())
        moved = (self.get_buffer(f"moved_{j}_{i}") for j in range(self.finished) for i in range(len(self.updates)))
        return min(delta + sum(t.numel() for t in moved), max(self.finished, 1) * factors)

    def diagnostics(self) -> dict[str, Any]:
        """LoRA's; the share of margins at work after the merge, and of the words' squared movement that it misses."""
        return {**super().diagnostics(), **self.facts}

    def caveats(self) -> list[str]:
        """What the merge does not fit, and what it is not the paper's."""
        config = self.config
        return [
            "each concept is learnt on the pretrained weights; K and V alone, the paper adapts the text encoder too",
            f"merged by {config.merge_steps} steps of {config.merge_lr:g}, from a copy of the text and the code",
            FIRST_UNMERGED,
            *super().caveats(),
        ]
