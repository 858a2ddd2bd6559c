"""The contract between a continual-learning method and the runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from dualcl.benchmark.core.domain import Domain, FeatureDomain, Images, Network
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.generators import torch_generator


def check(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds; for values that a user sets."""
    if not condition:
        raise UserError(message)


def check_quirks(quirks: tuple[str, ...], known: Mapping[str, str]) -> None:
    """Raises UserError unless `quirks` are distinct names among `known`."""
    for name in quirks:
        check(name in known, f"unknown name {name!r} in method.reference_quirks; {nearest(name, known, 'quirks')}")
    check(len(set(quirks)) == len(quirks), f"method.reference_quirks must not name a quirk twice, got {list(quirks)}")


def unless(works: object, mend: str, *options: str) -> dict[str, str]:
    """What `idle` says of `options` that do something only where `works`; `mend`: the setting that makes it so."""
    return {} if works else dict.fromkeys(options, mend)


@dataclass(frozen=True)
class MethodConfig:
    """Hyper-parameters every trained method has. Data, order, epochs, batch size and backbone are never a method's."""

    lr: float = field(default=1e-3, metadata={"help": "learning rate of the method's own parameters"})
    head_lr: float = field(
        default=1e-3, metadata={"help": "learning rate of what every method learns (classifier rows; token rows)"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "of the method's own parameters (decoupled with adamw)"})

    def __post_init__(self) -> None:
        check(self.lr >= 0, f"method.lr must not be negative, got {self.lr}")
        check(self.head_lr >= 0, f"method.head_lr must not be negative, got {self.head_lr}")
        check(self.weight_decay >= 0, f"method.weight_decay must not be negative, got {self.weight_decay}")

    def idle(self) -> dict[str, str]:
        """Options that do nothing at these values, each with what would give it something to do.

        They are refused where a user sets them. A subclass adds its own to `super().idle()`, by `unless`.
        """
        return {}


@dataclass
class ParamGroup:
    """Parameters that one optimiser group updates during one task."""

    name: str
    params: list[nn.Parameter]
    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Routed:
    """Updates that each prompt weighs anew, so that no one network holds them."""

    #: A (d_out, r) and B (r, d_in) of each site, for each finished task
    updates: list[dict[str, tuple[Tensor, Tensor]]]
    #: what prompts are compared with, the tasks first
    keys: Tensor
    #: how that makes weights, JSON-able
    rule: dict[str, Any]


#: caveat of methods that merge from the second task on
FIRST_UNMERGED = "the first concept is judged before any merge: its forgetting holds what the first merge takes"

#: what the contract was called before, and what it is called now
_RENAMED = {
    "set_prefix_provider": "features(self, images, network)",
}


class Method(nn.Module):
    """What to train for a task, which loss terms to add, how images are read, and what to keep afterwards.

    Life of a method: `__init__` (attach to the domain), then for each task `begin_task` -> `prepare` -> `trained` ->
    steps, each `loss(batch) + penalty()` -> `end_task`; all in float32, never under autocast, all on the clock of the
    task's training. All state that outlives a step must be in `state_dict` (parameters and buffers) or in
    `domain.state_dict`; `begin_task` runs before a mid-task `load_state_dict`, so shapes match.
    A method never asks which domain it serves: it uses `domain.sites()`, `domain.full_parameters()` or a capability
    that it lists in `requires` (the protocols of `dualcl.benchmark.core.domain`), and domains without that capability
    refuse it before any model is loaded.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    #: capabilities of the domain that the method needs beyond sites and a task loss, e.g. ("features", "prefixes");
    #: settings may ask for more, which an instance says before `super().__init__`
    requires: tuple[str, ...] = ()
    #: True: all tasks are learnt at once (an upper bound, not continual learning)
    joint: ClassVar[bool] = False
    #: which outputs compete in the task loss and are trained: the current task's, or all seen so far
    output_scope: ClassVar[Literal["task", "seen"]] = "task"
    #: a promise: the network as attached is never changed (weights, hooks, modules); prefixes and sides are arguments
    #: of a pass and fine. Only then may a domain keep plain features from task to task
    frozen: ClassVar[bool] = False
    #: False: `scores` does without the domain's rows, which then do not count as stored
    reads_rows: ClassVar[bool] = True
    #: False: `loss` does without the domain's rows (token rows), which then are not trained and do not count as such
    trains_rows: ClassVar[bool] = True
    #: True: finished rows may change
    rewrites_rows: ClassVar[bool] = False

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        for name, successor in _RENAMED.items():
            check(name not in vars(cls), f"{cls.__name__}.{name} is {successor} now (methods/README.md)")
        if not callable(vars(cls).get("takes_steps", cls.takes_steps)):
            raise UserError(f"{cls.__name__}.takes_steps is a method now: takes_steps(self, task) (methods/README.md)")
        if "prefix" in cls.requires:
            raise UserError(f'{cls.__name__}.requires: "prefix" is "prefixes" now (methods/README.md)')

    def __init__(self, config: Any, domain: Domain, n_tasks: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.domain = domain
        self.n_tasks = n_tasks
        self.seed = seed
        domain.attach(self)

    def generator(self, *key: int | str) -> torch.Generator:
        """A CPU generator that is a function of (run seed, method, key): the only source of a method's randomness."""
        return torch_generator(self.seed, type(self).name, *key)

    # --- once per task, in this order -------------------------------------------------------------------------------

    def begin_task(self, task: int) -> None:
        """Prepares for task `task` (0, 1, ...): new prompts, fresh adapters. Called once per task, in order."""

    def prepare(self, task: int) -> None:
        """Called after `begin_task` when a task really starts, with the model as the last task left it.

        Also when a killed run goes on in the middle of the task, then before its state is restored; not when finished
        tasks are begun again. For what the method makes with the model and does not keep, e.g. replayed images.
        """

    def takes_steps(self, task: int) -> bool:
        """Whether the task takes gradient steps; False: the record shows 0 steps and 0 trained."""
        return True

    def trained(self) -> list[ParamGroup]:
        """The method's own parameters for the current task; the domain's (classifier rows; token rows) come on top."""
        return []

    def loss(self, batch: Any) -> Tensor:
        """The task loss of a batch, a scalar float32: the domain's, unless the method learns from something else too.

        Of the method's state it may change counters (integer buffers) only: a step that ran out of memory is taken
        again from them. Every process of a run computes it on the whole batch; the domain alone shares out its passes.
        """
        return self.domain.loss(batch)

    @classmethod
    def asks_task_loss(cls) -> bool:
        """Whether `loss` is the domain's, or calls it, as far as its code shows."""
        code = getattr(cls.loss, "__code__", None)
        return cls.loss is Method.loss or (code is not None and "loss" in code.co_names)

    def penalty(self) -> Tensor | None:
        """Extra loss terms, a scalar, once per optimiser step after `loss`; None when there are none."""
        return None

    def stepped(self, ended: bool) -> None:
        """Called after each optimiser step (`ended`: the last of an epoch). May change `trained` and `averages`."""

    def averages(self) -> list[Tensor]:
        """State beside what is trained that `stepped` changes, e.g. a moving average; none by default."""
        return []

    def end_task(self, task: int) -> None:
        """Keeps what must outlive the task: folds adapters, sums Gram matrices, solves, aligns."""

    def restored(self, finished: int) -> None:
        """Called after `load_state_dict` with the number of finished tasks: brings folded weights in line."""

    # --- called by the domain for every image, in training and at evaluation alike (classification) ------------------

    def features(self, images: Images, network: Network) -> Tensor:
        """What is read of images: (B, d), or (B, n, d) of n branches, float32; by default one plain pass.

        Row i depends on image i alone; no random numbers; of the state only integer buffers (counters) may change. With
        gradient in a step, else without.
        """
        return network(images, key="plain" if self.frozen else None)

    def scores(self, features: Tensor) -> Tensor:
        """(B, C) float32 of all C outputs begun, from what `features` gave; the task is not known."""
        return cast(FeatureDomain, self.domain).rows(features)

    # --- for exports and the record -----------------------------------------------------------------------------------

    def routed(self) -> Routed | None:
        """What was learnt that each prompt weighs anew; None, nearly always: the network's weights hold all."""
        return None

    def stored_parameters(self) -> int:
        """Numbers that must be kept after the last finished task, without the domain's own (classifier rows).

        By default parameters and floating-point buffers of `state_dict`, each once; integer buffers are counters.
        """
        kept = {id(t): t for t in self.state_dict(keep_vars=True).values() if t.is_floating_point()}
        return sum(t.numel() for t in kept.values())

    @classmethod
    def least_kept(cls, config: Any) -> int:
        """Numbers that a checkpoint holds at least, as far as settings alone tell; what `dualcl compare` warns of."""
        return 0

    def diagnostics(self) -> dict[str, Any]:
        """JSON-able facts for the record after a task, e.g. update norms or prompt use; empty by default."""
        return {}

    def caveats(self) -> list[str]:
        """What a reader must know before comparing the run with others, e.g. that it stores data; marked in tables.

        By default each active quirk of the reference in words: of configurations with `reference_quirks` and `QUIRKS`.
        """
        quirks = getattr(self.config, "reference_quirks", ())
        return [f"{name}: {self.config.QUIRKS[name]}" for name in quirks]


T = TypeVar("T", bound=type[Method])


def register_method(
    name: str, *, domains: tuple[str, ...], summary: str, source: str, stores_data: bool = False
) -> Callable[[T], T]:
    """Registers a method class under `name`; arguments must be literals (the index is read without importing).

    Raises UserError for a class that is no Method, or whose Config is not a frozen dataclass of its own fields.
    """

    def apply(cls: T) -> T:
        check(isinstance(cls, type) and issubclass(cls, Method), f"{name}: {cls!r} is no dualcl.methods.base.Method")
        config = cls.Config
        # without the decorator further fields would be there, but unknown to presets and records
        own = "__dataclass_params__" in vars(config) and vars(config)["__dataclass_params__"].frozen
        what = f"{name}: Config must be a MethodConfig decorated with @dataclass(frozen=True)"
        check(own and issubclass(config, MethodConfig), what)
        cls.name = name
        return cls

    return apply
