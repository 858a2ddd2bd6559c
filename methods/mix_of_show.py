"""Mix-of-Show's gradient fusion: concepts learnt apart, then one weight that gives each what its own gave its words.

Source: Gu et al., "Mix-of-Show: Decentralized Low-Rank Adaptation for Multi-Concept Customization of Diffusion
Models", arXiv 2305.18292 (NeurIPS 2023); public code TencentARC/Mix-of-Show, 51270fd. With the low-rank update D_i of
concept i, learnt on the pretrained weights, and the text features X_i (n_i, d_in) of its words:

    min over W of  sum_i || (W - W_init - D_i) X_i' ||^2,   nearest to W_init
    W = W_init + (sum_i D_i G_i) (sum_i G_i + mu I)^-1,     G_i = X_i' X_i, mu = 0: the pseudo-inverse

Only the two sums are kept, so storage does not grow. After the first concept there is nothing to merge.

Differs from the paper: it is solved in closed form; the code takes L-BFGS steps from W_init, which stay in the span of
the inputs and so tend to the same W. Directions whose singular value is below 1e-4 of the largest are left as they
were, which few such steps do not reach either. Words are those of the concept's first training prompt, from the
placeholder to the end token; the code takes concept tokens and end token of two prompts. K and V alone are adapted,
with the domain's token rows: no layer-wise tokens, no update of the text encoder or of other layers. The code's noise
offset and attention regularisation (0.01 each) and its stop at a token norm of 0.55 are left out. Prompts of other
words, those of evaluation too, are not fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import ConceptInputsDomain, Domain
from dualcl.methods.base import FIRST_UNMERGED, check, register_method
from dualcl.methods.lora import LoRAConfig, SeparateLoRA, refuse_options

#: eigenvalues of the sum of G below this share of the largest one count as zero: singular values below 1e-4
FLOOR = 1e-8


@dataclass(frozen=True)
class MixOfShowConfig(LoRAConfig):
    """Hyper-parameters of gradient fusion; the paper has rank 4."""

    rank: int = field(default=4, metadata={"help": "r, rank of each concept's update"})
    ridge: float = field(default=0.0, metadata={"help": "mu, on the diagonal of the sum of G; 0: as in the paper"})
    own_inputs: bool = field(
        default=True,
        metadata={"help": "fits from the placeholder on; false: from the first word, which all prompts share"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "mix_of_show")
        check(self.ridge >= 0, f"method.ridge must not be negative, got {self.ridge}")


def inverse(gram: Tensor, ridge: float) -> tuple[Tensor, float]:
    """((G + mu I)^-1 on the span of the inputs and 0 elsewhere, condition of G there), G (d, d) float64."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > FLOOR * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return vectors / (values + ridge) @ vectors.T, float(values[-1] / values[0])


@register_method(
    "mix_of_show",
    domains=("customization",),
    summary="Mix-of-Show: LoRA of each concept from the pretrained weights, merged by gradient fusion in closed form",
    source="arXiv 2305.18292",
)
class MixOfShow(SeparateLoRA):
    """LoRA of each concept from the pretrained weights; between tasks the model holds the least-squares merge."""

    Config = MixOfShowConfig
    requires = ("concept_inputs",)

    def __init__(self, config: MixOfShowConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.width = self.one_text()

    def begin_task(self, task: int) -> None:
        """Starts fresh factors beside the pretrained weights, and makes room for the sums."""
        super().begin_task(task)
        if not hasattr(self, "gram"):
            # float64 on the CPU, wherever the network is: only there all devices have it
            self.register_buffer("gram", torch.zeros(self.width, self.width, dtype=torch.float64))
            for i, u in enumerate(self.updates.values()):
                self.register_buffer(f"moved_{i}", torch.zeros(u.site.d_out, self.width, dtype=torch.float64))

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Adds the concept to the sums and sets the model to the merge."""
        x = cast(ConceptInputsDomain, self.domain).concept_inputs(task, own=self.config.own_inputs).cpu().double()
        gram = self.get_buffer("gram")
        gram += x.T @ x
        for i, u in enumerate(self.updates.values()):
            self.get_buffer(f"moved_{i}").add_((u.product().cpu().double() @ x.T) @ x)
        self.inverse, condition = inverse(gram, self.config.ridge)
        self.facts = {"condition": condition, "fitted_words": len(x)}
        super().end_task(task)

    def merged(self, name: str, task: int) -> Tensor | None:
        """(sum of D G) (sum of G + mu I)^-1; of the first concept its update as it is."""
        moved = self.get_buffer(f"moved_{[*self.updates].index(name)}")
        return None if self.finished == 0 else (moved @ self.inverse).to(self.updates[name].summed)

    def stored_parameters(self) -> int:
        """The two sums, or the factors of all concepts, which sums and merge are made of; whichever is smaller."""
        sums = sum(u.site.d_out * u.site.d_in for u in self.updates.values()) + self.get_buffer("gram").numel()
        factors = sum(u.rank * (u.site.d_out + u.site.d_in) for u in self.updates.values())
        return factors if self.finished <= 1 else min(sums, self.finished * factors)

    def diagnostics(self) -> dict[str, Any]:
        """LoRA's, the condition of the sum of G where it is not zero, and how many words the last concept fits."""
        return {**super().diagnostics(), **self.facts}

    def caveats(self) -> list[str]:
        """What the merge does not fit, and what it is not the paper's."""
        return [
            "each concept is learnt on the pretrained weights; K and V alone, the paper adapts all attention layers "
            "and the text encoder",
            "the merge fits the words of the first training prompt up to its end token, not the padding after it",
            FIRST_UNMERGED,
            *super().caveats(),
        ]
