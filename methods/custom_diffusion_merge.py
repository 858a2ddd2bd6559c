"""Custom Diffusion, merged: every concept is learnt from the pretrained weights, then all are merged in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import ConceptInputsDomain, Domain
from dualcl.methods.base import FIRST_UNMERGED, check, register_method
from dualcl.methods.custom_diffusion import CustomDiffusionConfig, set_up
from dualcl.methods.shared.site_weights import SiteWeights

#: least eigenvalue of the common inputs' Gram matrix, relative to its largest one
FLOOR = 1e-8
#: singular values of the whitened concept inputs below this share of the largest one count as zero
RANK_TOLERANCE = 1e-4


def merging_map(inputs: Tensor, gram: Tensor) -> Tensor:
    """P (s, d) such that W = W_0 + (V - W_0 C^T) P is the constrained least-squares solution, float64.

    Source: arXiv 2212.04488, section 3.2: W minimises || (W - W_0) C_reg^T ||_F subject to W C^T = V, so that
    P = (C G^-1 C^T)^-1 C G^-1. C (s, d) is `inputs`, G = C_reg^T C_reg (d, d) is `gram`; V (d_out, s).
    With G = R^2 this is P = (C R^-1)^+T R^-1, the form that is computed: rows of C that are (nearly) linear
    combinations of others then get the least-squares compromise of their targets instead of an inverse that does not
    exist. Directions that hardly any common input has cost `FLOOR` of the largest instead of nothing.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp(min=FLOOR * float(values[-1]))
    whiten = vectors / values.sqrt() @ vectors.T
    return torch.linalg.pinv(inputs.double() @ whiten, rtol=RANK_TOLERANCE).T @ whiten


@dataclass(frozen=True)
class CustomDiffusionMergeConfig(CustomDiffusionConfig):
    """Hyper-parameters of merged Custom Diffusion."""

    captions: int = field(
        default=1000,
        metadata={"help": "ordinary captions that the merging should leave alone, or as many as there are words for"},
    )
    ridge: float = field(
        default=1e-3,
        metadata={"help": "least use of a direction by the captions, in shares of the mean one; 0: as in the paper"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.captions >= 1, f"method.captions must be at least 1, got {self.captions}")
        check(self.ridge >= 0, f"method.ridge must not be negative, got {self.ridge}")


@register_method(
    "custom_diffusion_merge",
    domains=("customization",),
    summary="Custom Diffusion of each concept from the pretrained weights, merged by constrained least squares",
    source="arXiv 2212.04488",
)
class CustomDiffusionMerge(SiteWeights):
    """Trains all sites' weights from the pretrained ones for every concept; between tasks the model holds the merge.

    After the first task there is nothing to merge. All concepts' weights are kept, so storage grows with the tasks.
    What is kept is what the first training prompt of a concept gives; other prompts, those of evaluation too, follow.
    Differs from the paper: a ridge on the captions' Gram matrix (`ridge`). Captions hardly use some directions, and
    without it the merged weights grow along those by far more than any concept's own.
    """

    Config = CustomDiffusionMergeConfig
    requires = ("prior", "concept_inputs")

    def __init__(self, config: CustomDiffusionMergeConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        set_up(config, domain)
        self.pretrained = self.flat().detach()
        self.gram: Tensor | None = None
        self.tasks = 0

    def begin_task(self, task: int) -> None:
        """Goes back to the pretrained weights and makes room for the concept's own."""
        self.set_flat(self.pretrained)
        # on the CPU: they are needed once per task, and there is one more each time
        self.register_buffer(f"learnt_{task}", torch.zeros(self.pretrained.shape))
        self.tasks = task + 1

    def learnt(self, task: int) -> Tensor:
        """The weights of all sites (n,) that a finished task ended with, on the CPU."""
        return self.get_buffer(f"learnt_{task}")

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Keeps the concept's weights and sets the model to the merge of all so far."""
        self.learnt(task).copy_(self.flat())
        if task > 0:
            self.set_flat(self.merged(task + 1))

    @torch.no_grad()
    def merged(self, tasks: int) -> Tensor:
        """The weights of all sites (n,) that map each of the first `tasks` concepts' inputs as its own weights do."""
        domain = cast(ConceptInputsDomain, self.domain)
        inputs = [domain.concept_inputs(j).to("cpu", torch.float64) for j in range(tasks)]
        if self.gram is None:
            common = domain.common_inputs(self.config.captions).to("cpu", torch.float64)
            self.gram = common.T @ common
            self.gram.diagonal().add_(float(self.config.ridge) * self.gram.diagonal().mean())
        project = merging_map(torch.cat(inputs), self.gram)
        sizes = [w.numel() for w in self.weights]
        learnt = [self.learnt(j).split(sizes) for j in range(tasks)]
        parts = []
        for i, start in enumerate(self.pretrained.cpu().split(sizes)):
            start = start.view(self.weights[i].shape).double()
            moved = [(own[i].view(start.shape).double() - start) @ c.T for own, c in zip(learnt, inputs, strict=True)]
            parts.append((start + torch.cat(moved, dim=1) @ project).float().reshape(-1))
        return torch.cat(parts)

    def stored_parameters(self) -> int:
        """Every concept's weights."""
        return self.tasks * self.pretrained.numel()

    def caveats(self) -> list[str]:
        """What it starts from, what it keeps, and what is not the paper's."""
        own = "each concept is learnt on the pretrained weights; keeps the weights of all concepts"
        ridge = f"a ridge of {self.config.ridge:g} on the captions, where the paper has none"
        return [own, *([ridge] if self.config.ridge else []), FIRST_UNMERGED, *super().caveats()]
