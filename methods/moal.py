"""MoAL: RanPAC's ridge regression on features of one adapter that goes on moving, slowly.

Source: Gao et al., CVPR 2025; public code Zi-Jian-Gao/Moal, read at d83d3d6. Bottlenecks (`shared/adapters.py`) and
rows by cosine of all classes seen are trained in every task by cross entropy; at the end of later tasks theta is
replaced by its moving average, theta_a <- 0.999 theta_a + 0.001 theta. With h = ReLU(f P), P (d, H) fixed, lambda by
RanPAC's rule in the first task, over all tasks' images:

    G = sum h h',  Q = sum h y',  W = (G + lambda I)^-1 Q,  scores = W' h

The h of old images stay as they were. In later tasks ("rumination") means mu_o of old classes move by a linear map of
features before the task to those after it, fitted on its images. To an old class o the new class k with the nearest
mean (cosine) gives features x - mu_k + mu_o. Of those, and of new images, what W gets wrong is added to G and Q.

Differs from the public code: G and Q are kept and solved, where it updates (G + lambda I)^-1 batch by batch: the same
but for rounding. The average is taken after each step (`epoch_average`), which in 160 steps at a rate that falls to 0
keeps a tenth of a task's movement (at momentum 0.99 two thirds); the first W whole (`shrunk_start`). The map is a ridge
regression (there SGD), features are of the evaluation view; new rows are random; nothing drops out; epochs: there 80.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain, Images, Network
from dualcl.methods.base import check, check_quirks, register_method, unless
from dualcl.methods.shared.adapters import AdapterConfig, AdapterMethod, CosineRows
from dualcl.methods.shared.class_statistics import carried, cosine
from dualcl.methods.shared.ridge import Ridge, choose_strength, held_out
from dualcl.methods.shared.symmetric import packed_size


@dataclass(frozen=True)
class MoALConfig(AdapterConfig):
    """Options of MoAL."""

    width: int = field(default=10_000, metadata={"help": "H random features (code: ImageNet-R 20000, CIFAR-100 5000)"})
    lambda_: float | None = field(default=None, metadata={"help": "ridge; null: chosen on a fifth of the first task"})
    momentum: float = field(default=0.999, metadata={"help": "of the adapter's moving average; 1: it stays"})
    ruminate: bool = field(default=True, metadata={"help": "old classes are made up from new images' features"})
    map_ridge: float = field(default=1.0, metadata={"help": "ridge of the means' map, in mean squares of a feature"})
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of the public code, for parity only: epoch_average, shrunk_start"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "epoch_average": "the adapter's average is taken after each epoch, so that it hardly moves",
        "shrunk_start": "the first task's solution is scaled by 0.9",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width >= 1, f"method.width must be at least 1, got {self.width}")
        check(self.lambda_ is None or self.lambda_ > 0, f"method.lambda_ must be positive, got {self.lambda_}")
        check(0 <= self.momentum <= 1, f"method.momentum must be between 0 and 1, got {self.momentum}")
        check(self.map_ridge > 0, f"method.map_ridge must be positive, got {self.map_ridge}")
        check_quirks(self.reference_quirks, self.QUIRKS)

    def idle(self) -> dict[str, str]:
        """Adds its own."""
        return super().idle() | unless(self.ruminate, "method.ruminate=true", "map_ridge")


@register_method(
    "moal",
    domains=("classification",),
    summary="MoAL: ridge regression on random features of one adapter that moves on slowly",
    source="CVPR 2025 (Zi-Jian-Gao/Moal)",
)
class MoAL(AdapterMethod):
    """Keeps one set of bottlenecks, rows, means, and the sums; W follows from them."""

    Config = MoALConfig
    output_scope = "seen"
    layer: Tensor
    means: Tensor
    solved: Tensor
    chosen: Tensor

    def __init__(self, config: MoALConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        d, drawn = self.width, self.generator("layer")
        layer = torch.empty(d, config.width).uniform_(-(d**-0.5), d**-0.5, generator=drawn)
        self.register_buffer("layer", layer, persistent=False)
        self.ridge = Ridge(config.width, self.classes, domain.device)
        self.register_buffer("solved", torch.zeros(config.width, self.classes))
        self.register_buffer("means", torch.zeros(self.classes, d))
        self.register_buffer("chosen", torch.zeros(()))
        self.average = nn.ModuleList()  # of the bottlenecks, in later tasks
        self.before: Tensor | None = None  # features of the task's images before its steps

    def grow(self, task: int) -> None:
        """The bottlenecks go on, with rows of more classes."""
        adapters, earlier, self.adapters = self.adapters, self.rows, nn.ModuleList()
        super().grow(task)
        new = cast(CosineRows, self.rows[-1])
        if task:
            self.average, self.adapters = cast(nn.ModuleList, self.adapters[0]), adapters.requires_grad_(True)
            self.average.requires_grad_(False).load_state_dict(adapters[0].state_dict())
            old = cast(CosineRows, earlier[-1])
            new.rows, new.scale = nn.Parameter(torch.cat([old.rows.detach(), new.rows.detach()])), old.scale
            new.scale.requires_grad_(True)

    def prepare(self, task: int) -> None:
        """Keeps features of the task's images as the last task left them."""
        asked = task > 0 and self.config.ruminate
        self.before = torch.cat([x for x, _ in self.classifier.training_features(task)]) if asked else None

    def features(self, images: Images, network: Network) -> Tensor:
        """(B, d); nothing is kept, as the adapter moves."""
        return network(images, sides=dict(enumerate(cast(Any, self.adapters[0]))))

    def loss(self, batch: Any) -> Tensor:
        """Cross entropy of rows by cosine over all classes seen."""
        features = self.features(self.classifier.images(batch), self.classifier.network)
        return cast(CosineRows, self.rows[-1]).loss(features, self.classifier.targets(batch))

    @torch.no_grad()
    def stepped(self, ended: bool) -> None:
        """Moves the average."""
        if self.task and (ended or "epoch_average" not in self.config.reference_quirks):
            for average, own in zip(self.average.parameters(), self.adapters[0].parameters(), strict=True):
                average.lerp_(own, 1 - self.config.momentum)

    def averages(self) -> list[Tensor]:
        """The bottlenecks' one."""
        return list(self.average.parameters())

    def random(self, features: Tensor) -> Tensor:
        """h (B, H) of features (B, d)."""
        return torch.relu(features @ self.layer)

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Takes the average, adds the task's features to the sums, solves, and ruminates."""
        if task:
            self.adapters[0].load_state_dict(self.average.state_dict())
        outputs = self.classifier.outputs(task)
        features, labels = (torch.cat(part) for part in zip(*self.classifier.training_features(task), strict=True))
        h = self.random(features)
        if task == 0:
            held = held_out(labels, self.generator("ridge"))
            self.chosen.fill_(self.config.lambda_ or choose_strength(h, labels, outputs, held))
        self.ridge.add(h, labels)
        if task == 0 and "shrunk_start" in self.config.reference_quirks:
            self.ridge.cross.mul_(0.9)
        self.means[outputs.start : outputs.stop].copy_(self.branch_means(task, 1, [(features, labels)])[:, 0])
        self.restored(task + 1)
        self.solve()
        if self.before is not None:
            self.ruminate(outputs, self.before, features, labels)
            self.solve()

    def solve(self) -> None:
        """W from the sums; a ridge that was chosen is raised where they cannot be solved with it."""
        strength, given = float(self.chosen), self.config.lambda_
        solved, strength = self.ridge.solve_from(strength) if given is None else (self.ridge.solve(given), given)
        self.solved.copy_(solved)
        self.chosen.fill_(strength)

    def ruminate(self, outputs: range, before: Tensor, features: Tensor, labels: Tensor) -> None:
        """Moves old means, and adds what W gets wrong of new features and of old classes made up from them."""
        old = self.means[: outputs.start]
        old.copy_(carried(old, before, features, self.config.map_ridge))
        nearest = cosine(old, self.means[outputs.start : outputs.stop]).argmax(1) + outputs.start
        wrong, said = [features[:0]], [labels[:0]]
        for output, source in enumerate([*nearest.tolist(), *outputs]):
            x = features[labels == source] - self.means[source] + self.means[output]
            wrong.append(x[(self.random(x) @ self.solved[:, : outputs.stop]).argmax(1) != output])
            said.append(labels.new_full((len(wrong[-1]),), output))
        for x, y in zip(torch.cat(wrong).split(1024), torch.cat(said).split(1024), strict=True):
            self.ridge.add(self.random(x), y)

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun), those of unfinished tasks lowest."""
        return self.with_lowest(self.random(features) @ self.solved[:, : self.known])

    @classmethod
    def least_kept(cls, config: MoALConfig) -> int:
        """G."""
        return packed_size(config.width)

    def stored_parameters(self) -> int:
        """The bottlenecks, rows and means, G as a triangle, and Q of the outputs known."""
        return super().stored_parameters() + self.known * (2 * self.width + self.config.width) + self.ridge.gram.numel()

    def caveats(self) -> list[str]:
        """What is stored and done beside the steps."""
        own = "stores sums of products of random features, and a mean of every class"
        made = "two more passes over each task's images, of which features of every class so far are made up"
        return [f"{own}; {made if self.config.ruminate else 'another pass over each image'}", *super().caveats()]

    def diagnostics(self) -> dict[str, Any]:
        """The ridge, and the largest entry of the solution."""
        return {"lambda": float(self.chosen), "largest_weight": float(self.solved.abs().max())}
