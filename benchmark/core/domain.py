"""The contract between a domain (pretrained model, data, loss, evaluation) and the runner and methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualcl.benchmark.core.processes import ALONE, Processes
from dualcl.benchmark.core.settings import Resolved

#: what is read from files -> its digest, made when asked for
Contents = dict[str, Callable[[], str]]


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


class Place(NamedTuple):
    """Which rows of which of the domain's own sets a batch of images is."""

    part: Literal["train", "test"]
    #: None: all tasks at once
    task: int | None
    #: (B,) int64
    rows: Tensor
    #: (B,) bool
    flipped: Tensor


class Images:
    """A batch of images on its way through a method's `features`."""

    def __init__(
        self, pixels: Tensor | Callable[[], Tensor], *, training: bool = False, place: Place | None = None
    ) -> None:
        self._pixels = pixels
        #: a training step, not an evaluation
        self.training = training
        #: None: put together by a method
        self.place = place

    @property
    def pixels(self) -> Tensor:
        """(B, 3, S, S), normalised, on the device; decoded when first asked for."""
        if not isinstance(self._pixels, Tensor):
            self._pixels = self._pixels()
        return self._pixels

    def __len__(self) -> int:
        return len(self.pixels if self.place is None else self.place.rows)


#: {block: (keys, values)}, each (B, L, width); L may be 0 and is the same for keys and values of a block
Prefixes = Mapping[int, tuple[Tensor, Tensor]]
#: {block: module (B, N, width) -> the same}
Sides = Mapping[int, Callable[[Tensor], Tensor]]


class Network(Protocol):
    """The pretrained network as methods see it: passes, and nothing else."""

    width: int
    blocks: int

    def __call__(
        self,
        images: Images,
        *,
        prefixes: Prefixes | None = None,
        sides: Sides | None = None,
        key: Hashable | None = None,
    ) -> Tensor:
        """One pass: features (B, width) float32 of the network as it stands now, with gradient where grad is on.

        The only place where autocast is on. `prefixes` are further keys and values of attention. A side module reads
        the residual stream after attention and is added to what the MLP adds; in the last block it sees the class token
        alone. Rows are shared out to processes and micro-batches. `key` promises that under it the same image gives the
        same bits until the run ends, so that they may be kept; None: nothing is kept. A pass with prefixes has none.
        """


class ReadOut(Protocol):
    """The half of a method that the domain calls for every image (`dualcl.methods.base.Method`)."""

    requires: tuple[str, ...]
    reads_rows: ClassVar[bool]

    def features(self, images: Images, network: Network) -> Tensor:
        """(B, d) or (B, n, d) float32."""

    def scores(self, features: Tensor) -> Tensor:
        """(B, C) float32."""

    def buffers(self) -> Iterator[Tensor]:
        """Integer ones are counters, which `features` may raise."""


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
    #: of the network's own passes; all else is float32
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    #: the run whose exported model this one goes on from, for the record
    extends: Mapping[str, Any] | None = None
    #: the method built on the domain last, which reads its images
    method: ReadOut | None = None

    def attach(self, method: ReadOut) -> None:
        """Called by each method that is built on the domain."""
        self.method = method

    def check_new(self) -> list[str]:
        """Raises UserError for what only a run from before the check may have; what a user must know, in lines."""
        return []

    def autocast(self) -> torch.autocast:
        """The precision of the network's own passes, which a domain alone switches on."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32")

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

    def before_tasks(self) -> None:  # noqa: B027 - few domains measure anything then
        """Called when a run begins or goes on, with the model as pretrained: for what is measured then, on no clock."""

    def check_loss(self, task: int | None, scope: Literal["task", "seen"]) -> None:  # noqa: B027 - few domains refuse
        """UserError for a task whose loss can teach nothing; called before anything is trained."""

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

    @classmethod
    def contents(cls, resolved: Resolved, data: Any = None, known: Iterable[str] = ()) -> Contents:
        """What a run reads from files, and of what is configured is there now: its name -> how to get its digest.

        `data` is loaded when it is needed and not given. `known`: names that a record has.
        """
        return {}

    def content(self) -> dict[str, str]:
        """The digests of what this run read from files."""
        return {}

    def pictures(self) -> Sequence[tuple[str, str, str, str]]:
        """Of every picture that this run reads from files: its part, its class or concept, its id, its hash."""
        return ()

    def repeated(self) -> list[str]:
        """Pictures of the data that are there more than once, a line for each kind."""
        return []

    def adapted_parameters(self) -> int:
        """Size of the adapted network: the 100 % of N_train and N_store."""
        return sum(p.numel() for p in self.model.parameters())


class FeatureDomain(Protocol):
    """Capability `features`: the network, the images of a batch, and the linear rows that every method has."""

    network: Network
    device: torch.device

    def images(self, batch: Any) -> Images:
        """The images of a training batch."""

    def targets(self, batch: Any) -> Tensor:
        """The right output (B,) of each sample, int64, on the domain's device."""

    def outputs(self, task: int) -> range:
        """Output indices (stream positions of the classes) that belong to the task."""

    def training_features(self, task: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """(what `Method.features` gives, output indices (B,)) of the task's training images in the evaluation view.

        Each image once, without gradient, by the model as it stands now.
        """

    def rows(self, features: Tensor) -> Tensor:
        """(B, C) = features W' + b over all C outputs begun, float32, with gradient."""

    def output_rows(self, task: int) -> tuple[Tensor, Tensor]:
        """Copies of the task's rows: weight (n, width), bias (n,)."""

    def set_output_rows(self, task: int, weight: Tensor, bias: Tensor) -> None:
        """Sets the task's rows. Those of finished tasks only by methods with `rewrites_rows`."""


class LogitsDomain(Protocol):
    """Capability `logits`: the rows are trained, and a method may teach their outputs itself."""

    def logits(self, batch: Any) -> Tensor:
        """`rows` (B, outputs begun) of the batch's features, float32, with gradient."""

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
    """Capability `concept_inputs`: what reaches the sites is known without images, and the same for all of them.

    Refused, before anything is trained, for models with an adapted site that reads more than the text.
    """

    #: the prompt of guidance's other half, when images are drawn for evaluation
    unconditional: str

    def concept_inputs(self, task: int, own: bool = False) -> Tensor:
        """Inputs (n, d_in) of the sites' Linears for the words of the task's prompt, float32, without gradient.

        `own`: from the placeholder to the end token only. What comes before is the same in all prompts, bit for bit.
        """

    def texts(self, task: int) -> tuple[str, ...]:
        """All that a task's images are paired with, tokens expanded: its prompts, and captions of its photographs."""

    def prompt_inputs(self, prompts: Sequence[str]) -> Tensor:
        """Inputs (n, d_in) of the sites' Linears for all that any of the prompts gives them, float32, no gradient.

        Start token and padding included: the sites read these too.
        """

    def common_inputs(self, n: int, whole: bool = False) -> Tensor:
        """Inputs (m, d_in) of the sites' Linears for `n` ordinary captions, float32, without gradient.

        As many as the vocabulary has words for, if these are fewer. `whole`: with start token and padding.
        """


class ErrorsDomain(Protocol):
    """Capability `errors`: what the model predicts for a batch's noised images under any prompts.

    B samples, P prompts, C x h x w latents; each sample has one noise and one time for all prompts. Any string is a
    prompt, "" included.
    """

    def prompts(self, task: int) -> tuple[str, ...]:
        """Training prompts of a task, tokens expanded."""

    def check_prompt(self, prompt: str) -> None:
        """UserError for a prompt that the text encoder would not read whole."""

    def predictions(self, batch: Any, prompts: Sequence[str]) -> Tensor:
        """(B, P, C, h, w) float32, with gradient where grad is on. Costs P passes."""

    def paired_predictions(self, batch: Any, prompts: Sequence[str]) -> Tensor:
        """(B, C, h, w) float32 of B prompts, one for each sample. Costs one pass."""

    def noise_weights(self, batch: Any) -> Tensor:
        """(B,) float32: what turns squared distances between predictions into those between the noises they amount to.

        1 for a model that predicts noise; for one that predicts velocity the share of the signal at the sample's time.
        """

    def errors(self, batch: Any, prompts: Sequence[str]) -> Tensor:
        """(B, P) float32: mean squared error of the noise that `predictions` amount to."""

    def frozen(self) -> Callable[[Any, Sequence[str]], Tensor]:
        """`predictions` of a copy of the model as it stands now, without gradient. Costs a network's memory.

        For full training; low-rank methods switch their updates off instead (`without_updates`).
        """


class RequestsDomain(Protocol):
    """Capability `requests`: tasks are things to be unlearnt, with no photographs of their own.

    Training batches are pictures of the request's anchor prompts, made by the pretrained model, kept and hashed as
    prior images are.
    """

    def request(self, task: int) -> Any:
        """The task's `dualcl.datasets.concepts.Request`: target, anchor, kind."""

    def targets_of(self, prompts: Sequence[str]) -> tuple[str, ...]:
        """Each anchor prompt of the begun task with the target in the anchor's place."""

    def target_prompts(self, task: int) -> tuple[str, ...]:
        """The training prompts of any task with its target."""

    def picture_targets(self) -> None:
        """The begun task's batches hold pictures of its target prompts, made by the model as it stands now.

        As many as there were of the anchor's; `prompts` of a batch stay the anchor's. Until the next `begin_task`.
        """

    #: whole prompts of what may be kept as it is; none of it is measured
    kept: tuple[str, ...]

    def word_inputs(self, prompts: Sequence[str]) -> Tensor:
        """(P, d_in) float32: for each prompt the mean input of the sites over the words that the anchor's lacks.

        These are the words from the first that is not that of the begun task's first anchor prompt.
        """

    def start_input(self) -> Tensor:
        """(1, d_in) float32: the input of the sites for the start token, the same in all prompts."""


class TokenRowsDomain(Protocol):
    """Capability `token_rows`: embedding rows of a concept's words may be read and set, e.g. by an encoder.

    An encoder may also give tokens that stand for a concept's pictures, and keys and values that are made of them.
    """

    device: torch.device

    def concept_images(self, task: int) -> Tensor:
        """The task's photographs, uint8 (n, S, S, 3)."""

    def token_rows(self, task: int) -> tuple[Tensor, ...]:
        """Copies of the task's rows, (n_tokens, D) for each of the model's vocabularies."""

    def set_token_rows(self, task: int, rows: Sequence[Tensor]) -> None:
        """Sets the begun task's rows."""

    def row_encoder(self, weights: str, generator: torch.Generator) -> Any:
        """A frozen `dualcl.benchmark.models.row_encoder.RowEncoder`; its `card` says what it saw.

        Of a bundled name or a folder, or "untrained": drawn by `generator`, with an empty card. Refused where it was
        trained for another model or number of tokens.
        """

    def read_images(self, branch: Any, scale: float) -> None:
        """From now on the network reads tokens of an encoder's `branch` beside the text, with a weight.

        Which are those of the concepts that a prompt names. Refused where the model has no place for them.
        """

    def set_image_embedding(self, task: int, embedding: Tensor) -> None:
        """Sets what a concept's tokens are made of, (E,); it is the method's to keep."""
