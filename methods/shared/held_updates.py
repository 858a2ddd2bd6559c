"""Updates of the sites' weights in full, held back in five ways: by size, mask, subspace, or merging.

With D = W - W_{t-1} = (Z (.) M) P a task's update, Z the parameter, over all of its numbers:

    l1, l2    + l1 mean |D| + l2 mean D^2 (`reference: pretrained`: of W - W_init)
    select    M holds the given share of entries, those of largest |W_{t-1} (.) g|, g the summed gradient of the loss
    project   P takes out the inputs of things to keep, of all earlier targets and of the start token
    merge     every task starts from the pretrained weights; the network is these plus the TIES merge of all D
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain
from dualcl.methods.base import Method, MethodConfig, ParamGroup, check, check_quirks, unless
from dualcl.methods.shared.low_rank import replace_module
from dualcl.methods.shared.site_delta import SiteDelta, directions, most_important
from dualcl.methods.shared.site_weights import whole_weights
from dualcl.methods.shared.ties import ties

#: the loss behind a choice is scaled by it, for small gradients vanish in float16; a power of two changes nothing else
SCALE = 2.0**12


@dataclass(frozen=True)
class HeldConfig(MethodConfig):
    """Hyper-parameters of what holds an update back; published are those of styles and objects."""

    lr: float = field(default=8e-6, metadata={"help": "learning rate of K and V"})
    l1: float = field(default=0.0, metadata={"help": "weight of mean |D|; published: 50, persons 0.1"})
    l2: float = field(default=0.0, metadata={"help": "weight of mean D^2; published: 25,000, persons 100"})
    reference: Literal["previous", "pretrained"] = field(
        default="previous", metadata={"help": "of l1 and l2: D is what has moved since the last request, or since ever"}
    )
    select: float = field(
        default=1.0, metadata={"help": "share of the entries that a request may move; published: 0.05"}
    )
    select_batches: int = field(default=16, metadata={"help": "batches behind the choice, at most all of the task"})
    project: int = field(default=0, metadata={"help": "so many things to keep, the nearest; 0: nothing is projected"})
    keep_start: bool = field(default=True, metadata={"help": "project: the start token's input is held too"})
    merge: bool = field(
        default=False, metadata={"help": "each request from the pretrained weights, TIES of all of them"}
    )
    density: float = field(
        default=0.2, metadata={"help": "merge: share of an update's entries that is kept, by weight"}
    )
    merge_weight: float = field(default=1.0, metadata={"help": "merge: factor on the merged update"})
    reference_quirks: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "habits of public code, for parity: project_gradients, ties_zero, one_more, hold_start_token"
        },
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "project_gradients": "gradients are projected, and the optimiser's steps leave the subspace",
        "ties_zero": "an entry whose updates add up to 0 takes the sign of most others",
        "one_more": "one entry more than the share may move",
        "hold_start_token": "nothing is learnt through the start token's keys and values, which move all the same",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l1", "l2", "project", "merge_weight"):
            check(getattr(self, name) >= 0, f"method.{name} must not be negative, got {getattr(self, name)}")
        check(
            self.reference in ("previous", "pretrained"),
            f"method.reference: previous or pretrained, got {self.reference!r}",
        )
        for name in ("select", "density"):
            check(
                0 < getattr(self, name) <= 1, f"method.{name} must be above 0 and at most 1, got {getattr(self, name)}"
            )
        check(self.select_batches >= 1, f"method.select_batches must be at least 1, got {self.select_batches}")
        check_quirks(self.reference_quirks, self.QUIRKS)
        for quirk, there, what in (
            ("project_gradients", self.project > 0, "a method.project above 0"),
            ("ties_zero", self.merge, "method.merge=true"),
            ("one_more", self.select < 1, "a method.select below 1"),
        ):
            check(there or quirk not in self.reference_quirks, f"the quirk {quirk} is for {what}")

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return {
            **super().idle(),
            **unless(self.l1 or self.l2, "method.l1 or method.l2 above 0", "reference"),
            **unless(not self.merge, "method.merge=false", "reference"),
            **unless(self.select < 1, "method.select below 1", "select_batches"),
            **unless(self.project, "method.project above 0", "keep_start"),
            **unless(self.merge, "method.merge=true", "density", "merge_weight"),
        }


class HeldUpdates(Method):
    """Trains the weights of all sites in full, each task's update held back as its configuration says."""

    config: Any

    def __init__(self, config: Any, domain: Domain, n_tasks: int, seed: int) -> None:
        if config.project:
            self.requires = (*type(self).requires, "concept_inputs")  # the text alone reaches the sites
        super().__init__(config, domain, n_tasks, seed)
        self.deltas = nn.ModuleList()
        for name in whole_weights(domain.sites()):
            base: Any = domain.model.get_submodule(name)
            self.deltas.append(SiteDelta(base))
            replace_module(domain.model, name, self.deltas[-1])
        for delta in self.each():
            delta.gradients_alone = "project_gradients" in config.reference_quirks
            delta.holds_start = "hold_start_token" in config.reference_quirks
        self.offered: Any = cast(Any, domain)
        # they come with the model
        self.pretrained = [d.base.weight.detach().clone() for d in self.each()] if self.needs_pretrained() else []
        self.tasks, self.norm = 0, 0.0
        self.facts: dict[str, Any] = {}

    def needs_pretrained(self) -> bool:
        """Whether the pretrained weights are read later."""
        return bool(self.config.merge or self.config.reference == "pretrained")

    def each(self) -> list[SiteDelta]:
        """The updates of all sites."""
        return list(self.deltas)  # type: ignore[arg-type]

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        """Starts an update of zeros, of the pretrained weights when all are merged, and makes room to keep it then."""
        self.tasks = task + 1
        for delta in self.each():
            delta.start()
        if self.config.merge:
            self.set_weights(None)
            # on the CPU: they are needed once per task, and there is one more each time
            self.register_buffer(f"learnt_{task}", torch.zeros(sum(w.numel() for w in self.pretrained)))

    @torch.no_grad()
    def set_weights(self, merged: list[Tensor] | None) -> None:
        """The pretrained weights, and what is merged."""
        for i, (delta, start) in enumerate(zip(self.each(), self.pretrained, strict=True)):
            delta.base.weight.copy_(start if merged is None else start + self.config.merge_weight * merged[i].to(start))

    def prepare(self, task: int) -> None:
        """Chooses the entries that may move, and the directions that may not."""
        config, self.facts = self.config, {}
        check(
            not config.project or bool(self.offered.kept),
            f"method.project={config.project} needs things to keep, and the data set names none; name some, or set "
            "method.project=0",
        )
        if config.select < 1:
            chosen = self.choose(task)
            sizes = [d.Z.numel() for d in self.each()]
            for delta, part in zip(self.each(), chosen.split(sizes), strict=True):
                delta.mask = part.view_as(delta.Z).to(delta.Z)
            self.facts["selected"] = int(chosen.sum())
        if config.project:
            held = directions(self.to_hold(task), self.each()[0].in_features // 2)
            for delta in self.each():
                delta.held = held.to(delta.Z)
            self.facts["held_directions"] = held.shape[1]

    def choose(self, task: int) -> Tensor:
        """Which of all entries (n,) matter most for the base loss."""
        params, share = [d.Z for d in self.each()], self.domain.processes
        total = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
        for batch in itertools.islice(self.domain.batches(task, 0), self.config.select_batches):
            for sample in self.domain.own_samples(batch):
                with torch.enable_grad():
                    grads = torch.autograd.grad(self.loss(sample) * SCALE, params)
                total += torch.cat([g.reshape(-1) for g in grads]) / SCALE
        weights = torch.cat([d.base.weight.detach().float().reshape(-1) for d in self.each()])
        one_more = "one_more" in self.config.reference_quirks
        return most_important(weights, share.total(total), self.config.select, one_more)

    def to_hold(self, task: int) -> Tensor:
        """Inputs (n, d_in): of the start token, of all earlier targets, of the things to keep that are nearest."""
        offered = self.offered
        prompts = [offered.target_prompts(j)[0] for j in range(task)]
        kept, (own,) = offered.word_inputs(offered.kept), offered.word_inputs(offered.target_prompts(task)[:1])
        nearest = F.cosine_similarity(kept, own[None]).argsort(descending=True, stable=True)[: self.config.project]
        rows = [offered.start_input()] if self.config.keep_start else []
        rows += [offered.word_inputs(prompts)] if prompts else []
        return torch.cat([*rows, kept[nearest]])

    def trained(self) -> list[ParamGroup]:
        """Z of all sites."""
        return [ParamGroup("updates", [d.Z for d in self.each()], self.config.lr, self.config.weight_decay)]

    def penalty(self) -> Tensor | None:
        """l1 mean |D| + l2 mean D^2 over all numbers; None without weights."""
        if not (self.config.l1 or self.config.l2):
            return None
        parts = [d.update() for d in self.each()]
        if self.config.reference == "pretrained":
            parts = [p + (d.base.weight - w) for p, d, w in zip(parts, self.each(), self.pretrained, strict=True)]
        moved = torch.cat([p.reshape(-1) for p in parts])
        return float(self.config.l1) * moved.abs().mean() + float(self.config.l2) * moved.square().mean()

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Adds the update to the weights; or keeps it, and merges all so far."""
        updates = [delta.fold() for delta in self.each()]
        self.norm = float(sum(u.double().square().sum() for u in updates)) ** 0.5
        if self.config.merge:
            self.get_buffer(f"learnt_{task}").copy_(torch.cat([u.reshape(-1) for u in updates]))
            self.set_weights(self.merged(task + 1))

    def merged(self, tasks: int) -> list[Tensor]:
        """TIES of the first updates, weight by weight, on the CPU."""
        sizes, zero = [w.numel() for w in self.pretrained], "ties_zero" in self.config.reference_quirks
        learnt = [self.get_buffer(f"learnt_{j}").cpu().split(sizes) for j in range(tasks)]
        return [
            ties(torch.stack([one[i].view_as(w) for one in learnt]), self.config.density, zero)
            for i, w in enumerate(self.pretrained)
        ]

    def stored_parameters(self) -> int:
        """K and V; when all updates are merged, these."""
        return sum(d.Z.numel() for d in self.each()) * (max(self.tasks, 1) if self.config.merge else 1)

    def diagnostics(self) -> dict[str, Any]:
        """Norm of the last update; how many entries could move, and how many directions were held."""
        return {"update_norm": self.norm, **self.facts}

    def caveats(self) -> list[str]:
        """Where a task starts, if all are merged; what N_train does not show."""
        own = ["each task is learnt on the pretrained weights, then all are merged"] if self.config.merge else []
        part = [f"{100 * self.config.select:g} % of what counts as trained may move"] if self.config.select < 1 else []
        return [*own, *part, *super().caveats()]
