"""C-LoRA in the null space of what earlier prompts feed to K and V: ours, after no paper.

C-LoRA's promise is kept: no image is stored, updates are folded after each task, a task's cost does not grow. What its
penalty guards, entries of a weight, is not what a picture depends on: that is what the weight makes of a prompt's
features x, and these are known without any image, since the text encoder and the finished tokens do not change. So

    G = sum x x' over all positions of the training prompts of all finished tasks, and of the empty and negative prompt,
    V: the eigenvectors of G, the largest first, until they hold the share e of its trace,
    B_t V = 0 from the task's start to its end, so that A_t B_t x is next to nothing for an earlier x.

After each optimiser step B_t <- B_t (I - V V'). At a task's start B_t is made larger, so that what it reads of the
task's own prompts is as large as without V. The empty prompt, or a negative one (`eval.negative_prompt`), is one half
of guidance: both are held too, or all pictures would drift. What no task's prompts use is free to move, and ordinary
captions with it; so what the weights make of these, n captions of a common word each, is held by a penalty in their
features, over all sites with pretrained weights W:

    L_common = gamma * mean over sites of  tr (S + A_t B_t) C (S + A_t B_t)' / tr W C W',   C = sum x x' of the captions

`lambda_` is C-LoRA's; 0 is plain LoRA, so that a table can say what the penalty adds.

Whose ideas: updates in the null space of earlier inputs, OWM (arXiv 1810.01256), GPM (2103.09762), Adam-NSCL
(2103.07113), and for low-rank factors InfLoRA (2404.00228); there inputs are images' and have to be seen. Captions of
common words: Custom Diffusion's merge (2212.04488).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from dualcl.benchmark.core.domain import ConceptInputsDomain, Domain
from dualcl.methods.base import check, register_method, unless
from dualcl.methods.clora import CLoRA, CLoRAConfig
from dualcl.methods.shared.symmetric import pack, packed_size, unpack


@dataclass(frozen=True)
class CLoRANullConfig(CLoRAConfig):
    """Hyper-parameters: C-LoRA's, and how much of the earlier inputs is held."""

    lambda_: float = field(default=0.0, metadata={"help": "lambda of C-LoRA's penalty; 0: plain LoRA"})
    epsilon: float = field(
        default=0.99999, metadata={"help": "e, share of the earlier inputs' energy that updates may not read"}
    )
    common: float = field(
        default=10.0, metadata={"help": "gamma, weight of the drift under ordinary captions; 0: none"}
    )
    captions: int = field(default=400, metadata={"help": "n, ordinary captions, or as many as there are words for"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not self.one_adapter, "method.one_adapter is an ablation of C-LoRA alone; leave it out")
        check(not self.align, "method.align trains rows of a classifier; leave it out")
        check(0 <= self.epsilon <= 1, f"method.epsilon must be from 0 to 1, got {self.epsilon}")
        check(self.common >= 0, f"method.common must not be negative, got {self.common}")
        check(self.captions >= 1, f"method.captions must be at least 1, got {self.captions}")

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.common, "method.common above 0", "captions")


def leading(gram: Tensor, share: float) -> Tensor:
    """The fewest eigenvectors (d, k) of a Gram matrix (d, d) float64 that hold the share of its trace."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    left_out = 1 - values.cumsum(0) / values.sum()
    # rounding: a share of 1 is reached where nothing is left that float32 inputs could have put there
    needed = int((torch.cat([left_out.new_ones(1), left_out[:-1]]) > max(1 - share, 1e-13)).sum())
    return vectors[:, : 0 if share == 0 else needed]


@register_method(
    "clora_null",
    domains=("customization",),
    summary="LoRA or C-LoRA whose updates do not read what earlier concepts' prompts feed to K and V",
    source="ours",
)
class CLoRANull(CLoRA):
    """Low-rank updates as in C-LoRA, whose B stays in the null space of earlier prompts' features."""

    Config = CLoRANullConfig
    requires = ("concept_inputs",)
    gram: Tensor

    def __init__(self, config: CLoRANullConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.offered = cast(ConceptInputsDomain, domain)
        self.width = self.one_text()
        # float64 on the CPU, wherever the network is: only there all devices have it
        self.register_buffer("gram", torch.zeros(packed_size(self.width), dtype=torch.float64))
        #: V (d_in, k), made of `gram` when it is needed
        self.held: Tensor | None = None
        #: C (d_in, d_in); and of each site S C, tr S C S', tr W C W'
        self.captions: Tensor | None = None
        self.moved: list[tuple[Tensor, Tensor, Tensor]] = []
        self.facts: dict[str, Any] = {}

    @torch.no_grad()
    def directions(self) -> Tensor:
        """V (d_in, k) of the finished tasks and of what guidance sets against a prompt."""
        if self.held is None:
            empty = self.offered.prompt_inputs([*dict.fromkeys(("", self.offered.unconditional))]).cpu().double()
            gram = unpack(self.gram.cpu(), self.width) + empty.T @ empty
            self.held = leading(gram, self.config.epsilon).to(next(iter(self.updates.values())).B)
        return self.held

    @torch.no_grad()
    def prepare(self, task: int) -> None:
        """Takes V out of the fresh B, and scales it by what that takes from the task's own prompts."""
        own, v = self.offered.prompt_inputs(self.offered.texts(task)), self.directions()
        outside = (own - own @ v @ v.T).norm()
        check(
            bool(outside > 1e-6 * own.norm()),
            f"task {task + 1}: earlier prompts use all that this one feeds to K and V; lower method.epsilon",
        )
        gain = own.norm() / outside
        self._project()
        for update in self.updates.values():
            update.B.mul_(gain)
        self.facts = {"held_directions": v.shape[1], "gain": float(gain)}

    @torch.no_grad()
    def _drift(self) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """C, and what of L_common the begun task does not change."""
        if self.captions is None:
            x = self.offered.common_inputs(self.config.captions, whole=True)
            self.captions = (x.T @ x) / len(x)
        if not self.moved:
            for u in self.updates.values():
                start = u.site.weight.to(u.A) - u.summed
                pulled = u.summed @ self.captions
                self.moved.append((pulled, (pulled * u.summed).sum(), (start @ self.captions * start).sum()))
        return self.captions, self.moved

    def penalty(self) -> Tensor | None:
        """C-LoRA's, and L_common."""
        own = super().penalty()
        if self.config.common == 0:
            return own
        c, moved = self._drift()
        terms = []
        for u, (pulled, before, size) in zip(self.updates.values(), moved, strict=True):
            new = ((u.A.T @ u.A) * (u.B @ c @ u.B.T)).sum() + 2 * ((u.A.T @ pulled) * u.B).sum()
            terms.append((before + new) / size)
        held = float(self.config.common) * torch.stack(terms).mean()
        return held if own is None else own + held

    @torch.no_grad()
    def _project(self) -> None:
        """B_t <- B_t (I - V V')."""
        v = self.directions()
        for update in self.updates.values():
            update.B.sub_(update.B @ v @ v.T)

    def stepped(self, ended: bool) -> None:
        """Takes out of B_t what the optimiser's step brought back."""
        self._project()

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Folds the update, and adds the task's prompts to what is held."""
        super().end_task(task)
        x = self.offered.prompt_inputs(self.offered.texts(task)).cpu().double()
        self.gram += pack(x.T @ x).to(self.gram)
        self.held, self.moved = None, []

    def restored(self, finished: int) -> None:
        """Forgets what was made of another state."""
        super().restored(finished)
        self.held, self.moved = None, []

    def stored_parameters(self) -> int:
        """LoRA's, and G."""
        return super().stored_parameters() + self.gram.numel()

    def diagnostics(self) -> dict[str, Any]:
        """LoRA's, how many directions were held in the last task, and how much larger B started."""
        return {**super().diagnostics(), **self.facts}

    def caveats(self) -> list[str]:
        """What is held."""
        own = "ours, not a published method; stores products of prompts' features; holds training prompts, not others"
        return [own, *super().caveats()]
