"""LoRA in sequence: a fresh low-rank adapter per task, folded into the weights after it. Both domains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain, Site
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.generators import torch_generator
from dualcl.methods.base import Method, ParamGroup, check, register_method, unless
from dualcl.methods.shared.alignment import AlignConfig, Aligner, caveat
from dualcl.methods.shared.low_rank import inject


@dataclass(frozen=True)
class LoRAConfig(AlignConfig):
    """Hyper-parameters of LoRA."""

    rank: int = field(default=16, metadata={"help": "r, rank of each task's update"})
    one_adapter: bool = field(
        default=False, metadata={"help": "one pair of factors, trained on through all tasks (an ablation of C-LoRA)"}
    )
    align: bool = field(
        default=False,
        metadata={"help": "classification: rows are aligned with Gaussians of all classes after each task, as SLCA's"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rank >= 1, f"method.rank must be at least 1, got {self.rank}")

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.align, "method.align=true", "align_lr", "align_epochs")


@register_method(
    "lora",
    domains=("classification", "customization"),
    summary="LoRA in sequence, folded after each task",
    source="arXiv 2106.09685",
)
class LoRA(Method):
    """Low-rank updates A_t B_t on all sites of the domain, one fresh pair per task (no scaling factor: alpha = r).

    With `one_adapter` the same pair is trained on instead, as one would with a stock trainer.
    """

    Config = LoRAConfig

    def __init__(self, config: LoRAConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        sites = self.adapted(domain.sites())
        widest = min(min(s.d_out, s.d_in) for s in sites.values())
        if config.rank > widest:
            raise UserError(f"method.rank={config.rank} is more than the smallest side of a site, {widest}; lower it")
        self.updates = inject(domain.model, sites, config.rank)
        self.stored = nn.ModuleList(self.updates.values())
        self.aligner = Aligner(domain, n_tasks) if config.align and config.align_epochs else None
        self.finished = 0
        self.norms: list[float] = []

    def adapted(self, sites: dict[str, Site]) -> dict[str, Site]:
        """Those of the domain's sites that are adapted."""
        return sites

    def one_text(self) -> int:
        """Width of the text that all sites read; UserError when they read several: no one text reaches them all."""
        widths = sorted({u.site.d_in for u in self.updates.values()})
        message = f"{self.name} needs sites that read one text, these read {widths}; choose another model"
        check(len(widths) == 1, message)
        return widths[0]

    def begin_task(self, task: int) -> None:
        """Starts fresh factors at every site."""
        if self.config.one_adapter and task > 0:
            for update in self.updates.values():
                update.go_on()
            return
        for name, update in self.updates.items():
            # "lora" for subclasses too: C-LoRA with lambda 0 is then LoRA bit for bit
            update.start(torch_generator(self.seed, "lora", "init", task, name))

    def trained(self) -> list[ParamGroup]:
        """A_t and B_t of every site."""
        params: list[nn.Parameter] = [p for u in self.updates.values() for p in (u.A, u.B)]
        return [ParamGroup("factors", params, self.config.lr, self.config.weight_decay)]

    def end_task(self, task: int) -> None:
        """Folds the task's update into the weights."""
        squares = [u.product().square().sum() for u in self.updates.values()]
        self.norms.append(float(sum(s.double() for s in squares)) ** 0.5)
        for update in self.updates.values():
            if self.config.one_adapter:
                update.pause()
            else:
                update.fold()
        self.finished = task + 1
        if self.aligner is not None:
            self.aligner.end_task(task, self.config, torch_generator(self.seed, "lora", "align", task))

    def restored(self, finished: int) -> None:
        """Brings the folded weights in line with the restored sums."""
        self.finished = finished
        if self.aligner is not None:
            self.aligner.finished = finished
        for update in self.updates.values():
            if self.config.one_adapter:
                # between tasks the sum holds A B; in the middle of one it is zero
                update.active = not bool(update.summed.any())
            update.refold()

    def scores(self, features: Tensor) -> Tensor:
        """By the classifier's rows, or by the aligned ones."""
        return super().scores(features) if self.aligner is None else self.aligner.scores(features)

    def stored_parameters(self) -> int:
        """One delta per site or the factors of all finished tasks, whichever is smaller; with `align` Gaussians."""
        pairs = 1 if self.config.one_adapter else max(self.finished, 1)
        gaussians = 0 if self.aligner is None else self.aligner.numbers()
        return gaussians + sum(
            min(u.site.d_out * u.site.d_in, u.rank * pairs * (u.site.d_out + u.site.d_in))
            for u in self.updates.values()
        )

    def caveats(self) -> list[str]:
        """What alignment keeps and does."""
        return [*([] if self.aligner is None else [caveat(self.config)]), *super().caveats()]

    def diagnostics(self) -> dict[str, Any]:
        """Frobenius norm of the last update (all of it with `one_adapter`) and of the sum of all updates."""
        total = sum(u.summed.double().square().sum() for u in self.updates.values())
        return {"update_norm": self.norms[-1] if self.norms else 0.0, "summed_norm": float(total) ** 0.5}


class SeparateLoRA(LoRA):
    """Each task is learnt on the pretrained weights; between tasks the model holds what is made of all updates."""

    #: False: on what the last task left, as LoRA
    apart = True

    def __init__(self, config: LoRAConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        #: of the last merge, for `diagnostics`
        self.facts: dict[str, Any] = {}

    def begin_task(self, task: int) -> None:
        """Starts fresh factors beside the pretrained weights."""
        if self.apart:
            for update in self.updates.values():
                update.unfold()
        super().begin_task(task)
        self.begun = task

    def merged(self, name: str, task: int) -> Tensor | None:
        """S of a site (d_out, d_in) after the task, whose A and B are still there; None: the sum of all updates."""
        return None

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Sets the weights to the merge of all updates so far."""
        merged = {name: self.merged(name, task) for name in self.updates}
        super().end_task(task)
        for name, value in merged.items():
            if value is not None:
                self.updates[name].set_summed(value)

    def restored(self, finished: int) -> None:
        """Between tasks the weights hold the merge; in the middle of one the pretrained ones."""
        super().restored(finished)
        inside = self.begun == finished
        for update in self.updates.values():
            update.active = inside
            if inside and self.apart:
                update.unfold()


def refuse_options(config: LoRAConfig, name: str) -> None:
    """UserError for `one_adapter` and `align`, which methods that merge the tasks' updates do not have."""
    check(not config.one_adapter, f"method.one_adapter is an ablation of lora and clora; {name} has none")
    check(not config.align, f"method.align is an option of lora, clora and inflora; {name} has none")
