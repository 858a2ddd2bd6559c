"""The contract between a domain (pretrained model, data, loss, evaluation) and the runner and methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualcl.benchmark.core.processes import ALONE, Processes


@dataclass(frozen=True)
class Site:
    """A named linear map that a weight-space method may adapt: all rows of an `nn.Linear`, or a slice of them.

    timm fuses Q, K and V in one Linear; each is then its own site on the same module with its own rows.
    """

    name: str
    module_name: str
    module: nn.Linear
    start: int
    stop: int

    @property
    def d_out(self) -> int:
        """Number of output features of the site."""
        return self.stop - self.start

    @property
    def d_in(self) -> int:
        """Number of input features."""
        return self.module.in_features

    @property
    def weight(self) -> Tensor:
        """The site's rows of the frozen weight, shape (d_out, d_in), a view without gradient."""
        # not .data: a change through that is not counted in the weight's _version
        return self.module.weight.detach()[self.start : self.stop]


@dataclass
class Task:
    """What the runner knows of a task."""

    index: int
    name: str
    size: int
    facts: dict[str, Any]


class PrefixProvider(Protocol):
    """What a prompt method gives a domain with the `prefix` capability."""

    def __call__(self, query: Tensor, training: bool) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Prefixes per block index from queries.

        `query` (B, D): the final feature of the frozen model without prompts. Returns {block: (keys, values)}, each
        (B, L, D), L >= 0 and possibly different for keys and values is not allowed: attention needs equal lengths.
        A row of the result may depend on its own query row only.
        """


class Domain(ABC):
    """A pretrained model with a stream of tasks. Never knows which method is running."""

    name: ClassVar[str]
    #: what a method may ask for in `requires`
    capabilities: ClassVar[tuple[str, ...]] = ()
    #: what the recorded matrix holds (`dualcl.results.metrics.KINDS`)
    matrix_kind: ClassVar[str] = "accuracy"

    model: nn.Module
    tasks: list[Task]
    device: torch.device
    #: the run's folder, where a domain may leave pictures; None outside a run
    folder: Path | None = None
    #: those that share the passes through the network
    processes: Processes = ALONE
    #: most samples in the network at once; None: a whole batch
    micro_batch_size: int | None = None

    @abstractmethod
    def sites(self) -> dict[str, Site]:
        """The linear maps that weight-space methods adapt, in a fixed order."""

    @abstractmethod
    def full_parameters(self) -> dict[str, nn.Parameter]:
        """What full fine-tuning trains in this domain."""

    @abstractmethod
    def begin_task(self, task: int | None, scope: Literal["task", "seen"] = "task") -> list[nn.Parameter]:
        """Makes what every method learns for a new task (classifier rows; a token row), for the optimiser.

        `task=None` begins all tasks at once (joint training). Older tasks' parameters are left out under scope "task".
        """

    @abstractmethod
    def steps_per_epoch(self, task: int | None) -> int:
        """Optimiser steps in one epoch of the task."""

    @abstractmethod
    def batches(self, task: int | None, start_step: int) -> Iterator[Any]:
        """Training batches from optimiser step `start_step` of the task on; a function of (seed, task, step)."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The task loss of a batch, a scalar."""

    @abstractmethod
    def samples(self, batch: Any) -> Iterator[Any]:
        """The samples of a batch, each a batch of one whose `loss` is its own; for gradients of single samples."""

    def own_samples(self, batch: Any) -> Iterator[Any]:
        """This process's share of `samples`; while one is out, passes are this process's own."""
        with self.processes.apart():
            yield from self.processes.mine(self.samples(batch))

    def passed(self, n: int, run: Callable[[slice], Tensor]) -> Tensor:
        """`run(rows)` for all `n` rows of a batch: in shares over processes, and in micro-batches where it learns.

        `run` must draw no random numbers, and a row's result may depend on that row only. Micro-batches are run again
        in the backward, so that the activations of one are in memory at a time.
        """
        processes = self.processes
        rows = slice(0, n) if processes.alone else processes.rows(n)
        own = rows.stop - rows.start
        if own == 0:  # one sample all the same: every process needs the graph
            rows = slice(0, 1)
        size = self.micro_batch_size
        if size is None or rows.stop - rows.start <= size or not torch.is_grad_enabled():
            out = run(rows)
        else:
            starts = range(rows.start, rows.stop, size)
            parts = [slice(i, min(i + size, rows.stop)) for i in starts]
            out = torch.cat([checkpoint(run, p, use_reentrant=False, preserve_rng_state=False) for p in parts])
        return out if processes.alone else processes.gathered(out[:own], n)

    @abstractmethod
    def evaluate(self, seen: Sequence[int]) -> dict[str, Any]:
        """Evaluates all seen tasks without telling the model which is which; JSON-able, one list entry per task."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to share a table: split, order, weights, preprocessing, each with a hash."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The domain's own learnt state (classifier rows; token rows)."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`; begins the tasks it holds."""

    @abstractmethod
    def stored_parameters(self) -> int:
        """Numbers the domain keeps for the tasks begun so far (classifier rows; token rows)."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """JSON-able facts for the record beyond the identity."""

    @abstractmethod
    def summary(self, row: Mapping[str, Any]) -> str:
        """An evaluation in a few words, for the progress line."""

    def adapted_parameters(self) -> int:
        """Size of the adapted network: the 100 % of N_train and N_store."""
        return sum(p.numel() for p in self.model.parameters())


class PrefixDomain(Protocol):
    """Capability `prefix`: attention blocks that take extra keys and values."""

    n_blocks: int
    feature_dim: int

    def set_prefix_provider(self, provider: PrefixProvider | None) -> None:
        """Every later forward pass asks `provider` for the prefixes of its batch."""


class FeatureDomain(Protocol):
    """Capability `features`: frozen features of a task's training data, and a linear read-out that can be set."""

    feature_dim: int

    def training_features(self, task: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(features (B, D), output indices (B,)) of the task's training data, each sample once, no augmentation."""

    def outputs(self, task: int) -> range:
        """Output indices (stream positions of the classes) that belong to the task."""

    def set_output_rows(self, task: int, weight: Tensor, bias: Tensor) -> None:
        """Sets the task's read-out: weight (n_outputs, D), bias (n_outputs,)."""


class LogitsDomain(Protocol):
    """Capability `logits`: the model is a classifier whose outputs on a batch a method may teach itself."""

    def logits(self, batch: Any) -> Tensor:
        """Outputs (B, number of outputs begun) of the batch, float32, with gradient."""

    def targets(self, batch: Any) -> Tensor:
        """The right output (B,) of each sample, int64, on the domain's device."""

    def outputs(self, task: int) -> range:
        """Output indices that belong to the task; those of earlier tasks come before it."""

    def frozen_logits(self) -> Callable[[Any], Tensor]:
        """`logits` as they are now, without gradient: a copy of the model, which nothing trains or saves."""


class ExemplarDomain(Protocol):
    """Capability `exemplars`: training samples of the begun task may be copied, and copies trained on later."""

    exemplar_shape: tuple[int, ...]

    def exemplars(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(uint8 (n, *exemplar_shape), targets (n,) int64) of the begun task's training samples, not augmented.

        `positions` count from 0 to the task's size.
        """

    def targets(self, batch: Any) -> Tensor:
        """The right output (B,) of each sample, int64, on the domain's device."""

    def with_exemplars(self, batch: Any, exemplars: Tensor, targets: Tensor) -> Any:
        """The batch and the exemplars as one batch, which is on the domain's device.

        They are augmented as far as copies can be, with torch's global generator, which the runner seeds for each step.
        """


class NetworkDomain(Protocol):
    """Capability `network`: the whole network, not only its adapted projections, may be trained."""

    def network_parameters(self) -> dict[str, nn.Parameter]:
        """All weights of the network that the sites belong to, by name."""


class PriorDomain(Protocol):
    """Capability `prior`: images of the pretrained model keep its idea of the concepts' classes."""

    def use_prior(self, weight: float) -> None:
        """From now on every training batch also holds prior images; the loss adds `weight` times their error."""


class ReplayDomain(Protocol):
    """Capability `replay`: the model can make training data of tasks that it has learnt."""

    def replay(self, tasks: Sequence[int], per_task: int) -> None:
        """Adds `per_task` samples of each of `tasks`, made by the model as it stands now, to the begun task's data.

        The next `begin_task` drops them.
        """


class ConceptInputsDomain(Protocol):
    """Capability `concept_inputs`: what reaches the sites is known without images, and the same for all of them."""

    def concept_inputs(self, task: int) -> Tensor:
        """Inputs (n, d_in) of the sites' Linears for the words of the task's prompt, float32, without gradient."""

    def common_inputs(self, n: int) -> Tensor:
        """Inputs (m, d_in) of the sites' Linears for `n` ordinary captions, float32, without gradient."""
