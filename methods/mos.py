"""MOS: an adapter per task, drawn towards earlier ones; an image's adapter is found by asking the classifier again.

Source: Sun et al., arXiv 2412.09441 (AAAI 2025); public code sun-hailong/AAAI25-MOS, read at 8d5e07c, and LAMDA-PILOT.
Task t trains bottlenecks theta_t (`shared/adapters.py`), which start as theta_{t-1} ended, and linear rows of its
classes. After each step

    theta_t <- (1 - m) theta_t + m mean over i < t of theta_i,   m = 0.1

which takes back a tenth of the way from that mean each step: with a rate that falls to zero, as the presets' does, an
adapter ends where the mean is, and little is left of its own task (0.2 % of 160 even steps; with m = 0.01, 34 %).
When it has ended: Gaussians of its classes under theta_t; all rows are trained on draws from those of all classes
(`shared/alignment.py`, with the cross entropy of z = W x + b, means as they are); P_c: the mean of class c under
theta_0. Of an image, phi_i its feature under theta_i,

    i <- task of argmax cos(phi_0, P);  then three times i <- task of argmax z(phi_i)
    score = softmax z(phi_i) + softmax((t + 1) cos(phi_0, P))

Differs from the public code: there the mixture is also written into the weights in each block of each pass, at test
too, so that a stored adapter fades and answers depend on how many came before; that can be no option here. Its loss on
features (weight 0.1) is left out (`feature_loss`). Alignment draws 256 features of each class. Optimiser, schedule and
the rate of rows (there a tenth) are the preset's; no dropout, which there also acts on the class means of later tasks:
its network is still in training mode when they are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualcl.benchmark.core.domain import Domain, Images, Network
from dualcl.methods.base import check, check_quirks, register_method
from dualcl.methods.shared.adapters import AdapterConfig, AdapterMethod
from dualcl.methods.shared.alignment import AlignConfig, Aligner, caveat
from dualcl.methods.shared.class_statistics import cosine

#: times that the classifier is asked for an adapter
ASKED = 4
FEATURE_LOSS, TEMPERATURE = 0.1, 0.8


@dataclass(frozen=True)
class MOSConfig(AdapterConfig, AlignConfig):
    """Options of MOS, as on ImageNet-R in its public code."""

    bottleneck: int = field(default=16, metadata={"help": "width of the bottlenecks"})
    mixture: float = field(
        default=0.1, metadata={"help": "m, share of earlier adapters' mean after each step; 0: none"}
    )
    align_epochs: int = field(default=30, metadata={"help": "epochs of the classifier's alignment; 0: none"})
    align_lr: float = field(default=5e-3, metadata={"help": "its learning rate (SGD)"})
    reference_quirks: tuple[str, ...] = field(
        default=(), metadata={"help": "habits of the public code, for parity only: feature_loss"}
    )

    QUIRKS: ClassVar[Mapping[str, str]] = {
        "feature_loss": "features of a batch and means of earlier classes are told apart by a loss of weight 0.1",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.mixture <= 1, f"method.mixture must be between 0 and 1, got {self.mixture}")
        check_quirks(self.reference_quirks, self.QUIRKS)


def found(logits: Tensor, start: Tensor, tasks: Tensor) -> Tensor:
    """(B, C) of z (B, n, C) under the adapters: first under `start` (B,), then under that of the task answered."""
    at, rows = start, torch.arange(len(logits), device=logits.device)
    for _ in range(ASKED - 1):
        at = tasks[logits[rows, at].argmax(1)]
    return logits[rows, at]


def told_apart(features: Tensor, means: Tensor) -> Tensor:
    """The public code's loss: each feature (B, d) and mean (C, d) is most like itself, by products over 0.8."""
    whole = torch.cat([means, features])
    return F.cross_entropy(whole @ whole.T / TEMPERATURE, torch.arange(len(whole), device=whole.device))


@register_method(
    "mos",
    domains=("classification",),
    summary="MOS: adapters drawn towards earlier ones, found by asking again; rows aligned on Gaussians",
    source="arXiv 2412.09441",
)
class MOS(AdapterMethod):
    """Keeps all bottlenecks, Gaussians and class means under the first adapter; the rows are the domain's, aligned."""

    Config = MOSConfig
    reads_rows = True
    trains_rows = True
    means: Tensor

    def __init__(self, config: MOSConfig, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__(config, domain, n_tasks, seed)
        self.aligner = Aligner(domain, n_tasks)
        self.register_buffer("means", torch.zeros(self.classes, self.width))

    def grow(self, task: int) -> None:
        """Bottlenecks as the last task's ended; the domain's rows are learnt with them."""
        super().grow(task)
        self.rows = nn.ModuleList()
        if task:
            self.adapters[-1].load_state_dict(self.adapters[-2].state_dict())

    def features(self, images: Images, network: Network) -> Tensor:
        """(B, n, d) under the finished adapters; in training (B, d) under the task's own."""
        if images.training:
            return self.read(images, network, self.task)
        return torch.stack([self.read(images, network, i) for i in self.asked or range(max(self.finished, 1))], 1)

    def loss(self, batch: Any) -> Tensor:
        """Cross entropy over the task's classes."""
        if "feature_loss" not in self.config.reference_quirks:
            return self.domain.loss(batch)
        outputs = self.classifier.outputs(self.task)
        features = self.features(self.classifier.images(batch), self.classifier.network)
        logits = self.classifier.rows(features)[:, outputs.start : outputs.stop]
        plain = F.cross_entropy(logits, self.classifier.targets(batch) - outputs.start)
        return plain + FEATURE_LOSS * told_apart(features, self.aligner.gaussians.means[: self.known])

    @torch.no_grad()
    def stepped(self, ended: bool) -> None:
        """Mixes the mean of earlier adapters in."""
        if self.task and self.config.mixture:
            own, *earlier = reversed([[*sides.parameters()] for sides in self.adapters])
            for parameter, *others in zip(own, *earlier, strict=True):
                parameter.lerp_(torch.stack(others).mean(0), self.config.mixture)

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        """Takes statistics, and aligns all rows."""
        self.finished = task + 1
        outputs, features = self.classifier.outputs(task), self.taken(task, 0, task)
        means = self.branch_means(task, 1, [(x[:, 0], y) for x, y in features])[:, 0]
        self.means[outputs.start : outputs.stop].copy_(means)
        own, generator = [(x[:, 1], y) for x, y in features], self.generator("align", task)
        self.aligner.end_task(task, self.config, generator, features=own, plain=True)

    def restored(self, finished: int) -> None:
        """Counts the finished tasks."""
        super().restored(finished)
        self.aligner.finished = finished

    def scores(self, features: Tensor) -> Tensor:
        """(B, outputs begun), those of tasks that did not end lowest."""
        if not self.finished:
            return self.with_lowest(features.new_zeros(len(features), 0))
        rows, sizes = self.aligner.rows[: self.known], [len(self.classifier.outputs(t)) for t in range(self.finished)]
        logits = F.linear(features, rows[:, :-1], rows[:, -1])
        cosines = cosine(features[:, 0], self.means[: self.known])
        tasks = torch.arange(self.finished).repeat_interleave(torch.tensor(sizes)).to(features.device)
        answer = found(logits, tasks[cosines.argmax(1)], tasks)
        return self.with_lowest(answer.softmax(1) + (self.finished * cosines).softmax(1))

    def stored_parameters(self) -> int:
        """The bottlenecks, the means and the Gaussians."""
        own_means = self.known * self.width if "feature_loss" in self.config.reference_quirks else 0
        gaussians = self.aligner.numbers() if self.config.align_epochs else own_means
        return super().stored_parameters() + self.known * self.width + gaussians

    def caveats(self) -> list[str]:
        """What is stored, and what an answer costs."""
        passes = "stores an adapter per task; a pass per image for each of them"
        return [passes, *([caveat(self.config)] if self.config.align_epochs else []), *super().caveats()]
