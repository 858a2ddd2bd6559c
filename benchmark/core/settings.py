"""Configuration: typed sections, presets in YAML, `--set key=value`, and where every value came from.

Precedence: code defaults < preset (and what it extends) < `--set`. Unknown keys are errors that name the nearest valid
one; values are coerced by the declared type (`1e-3` is a float). Nothing changes a resolved configuration afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import MOST_SEED, SEEDS, TOO_LARGE, check_name, check_text
from dualcl.benchmark.core.registry import Plugin
from dualcl.benchmark.core.safe_yaml import MissingValueError, WrittenFloat, WrittenInt, read_yaml

VOLATILE = {"volatile": True}  #: metadata of keys that cannot change a result and may differ on resume

C = TypeVar("C")


def positive(name: str, value: float | None, minimum: float = 1) -> None:
    """Raises UserError unless `value` is None or at least `minimum`."""
    if value is not None and value < minimum:
        raise UserError(f"{name} must be at least {minimum}, got {value}")


#: keys that came when runs had been recorded, with their defaults: left unsaid, so that older runs go on
LATER: Mapping[str, Any] = {
    "train.milestones": [],
    "stream.sizes": [],
    "stream.first": None,
    "stream.increment": None,
    "input.mean": None,
    "input.std": None,
    "data.use_captions": True,
    "method.align": False,
    "method.align_epochs": 5,
    "method.align_lr": 1e-2,
    "method.adapt": "none",
    "method.bottleneck": 64,
}
#: a later default that stands for an older one where that was right
SAID_AS: Mapping[str, tuple[Any, Any]] = {"input.interpolation": ("auto", "bicubic")}


@dataclass(frozen=True)
class GeneralConfig:
    """Top-level keys."""

    seed: int = field(default=0, metadata={"help": "initialisation, batch order, augmentation"})
    label: str | None = field(default=None, metadata={"help": "what tables call the run; default: the method"})
    precision: Literal["fp32", "bf16", "fp16"] = field(
        default="fp32", metadata={"help": "bf16, fp16: autocast; fp16 with loss scaling"}
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, mps", **VOLATILE})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; default: all cores", **VOLATILE})
    tracker: tuple[Literal["none", "tensorboard", "wandb"], ...] = field(
        default=(), metadata={"help": "what follows the run beside its record; never recorded", **VOLATILE}
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "tracker", tuple(dict.fromkeys(name for name in self.tracker if name != "none")))
        if not 0 <= self.seed <= MOST_SEED:
            raise UserError(f"seed must be a whole number {SEEDS}, got {self.seed}")
        check_name(self.label or "", "label")
        positive("threads", self.threads)


@dataclass(frozen=True)
class TrainConfig:
    """The training budget: one for all methods of a comparison."""

    epochs: int = field(default=5, metadata={"help": "passes over each task's training data"})
    steps: int | None = field(
        default=None, metadata={"help": "optimiser steps per task (customization), with train.epochs=1"}
    )
    batch_size: int = 32
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    schedule: Literal["cosine", "constant", "coda", "milestones"] = field(
        default="cosine", metadata={"help": "per step; coda: per epoch e, cos(99 pi max(e-1, 0) / (200 (E-1)))"}
    )
    milestones: tuple[int, ...] = field(
        default=(), metadata={"help": "schedule milestones: after each of these epochs the rates are a tenth"}
    )
    drop_last: bool = field(default=False, metadata={"help": "drop a last, short batch"})
    grad_clip: float | None = field(default=None, metadata={"help": "largest norm of all gradients together"})
    checkpoint_seconds: float = field(default=60.0, metadata={"help": "time between mid-task checkpoints", **VOLATILE})
    log_every: int = field(default=10, metadata={"help": "steps between lines of log.jsonl"})
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "most samples in the network at once: less memory, the same step, one more forward pass",
            **VOLATILE,
        },
    )
    on_oom: Literal["stop", "split"] = field(
        default="stop",
        metadata={"help": "split: a step out of memory is taken again with half the micro-batch", **VOLATILE},
    )

    def __post_init__(self) -> None:
        positive("train.epochs", self.epochs)
        positive("train.micro_batch_size", self.micro_batch_size)
        positive("train.steps", self.steps)
        positive("train.batch_size", self.batch_size)
        positive("train.log_every", self.log_every)
        positive("train.checkpoint_seconds", self.checkpoint_seconds, 0)
        if bool(self.milestones) != (self.schedule == "milestones"):
            raise UserError(
                f"train.schedule=milestones and train.milestones=EPOCH,... go together, got {self.schedule} and "
                f"{list(self.milestones)}"
            )
        for epoch in self.milestones:
            positive("train.milestones", epoch)
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise UserError(f"train.grad_clip must be positive, got {self.grad_clip}")


@dataclass(frozen=True)
class ResourcesConfig:
    """What a run asks of a cluster's scheduler (`--engine ray`, `--print-slurm`); nothing here changes a result."""

    cpus: int | None = field(default=None, metadata={"help": "CPU cores; default: threads, or 1", **VOLATILE})
    gpus: float | None = field(
        default=None, metadata={"help": "GPUs; default: 1 where device is or may become cuda, else 0", **VOLATILE}
    )
    memory_gib: float | None = field(
        default=None, metadata={"help": "main memory in GiB; default: not asked for", **VOLATILE}
    )

    def __post_init__(self) -> None:
        positive("resources.cpus", self.cpus)
        positive("resources.gpus", self.gpus, 0)
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise UserError(f"resources.memory_gib must be positive, got {self.memory_gib}")


def _describe(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    if origin is not None:
        inner = [_describe(a) for a in typing.get_args(annotation) if a is not Ellipsis]
        return f"{origin.__name__} of {inner[-1]}" if inner else origin.__name__
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


class _Mismatch(Exception):
    pass


def _coerce(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        try:
            json.dumps(value, allow_nan=False)  # what no record can hold: dates, sets, bytes
        except (TypeError, ValueError):
            raise _Mismatch from None
        return _plain(value)
    if origin is Literal:
        for choice in args:
            if value == choice or str(value) == str(choice):
                return choice
        raise _Mismatch
    if origin in (Union, types.UnionType):
        if type(None) in args and isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        lists = [a for a in args if typing.get_origin(a) is list]
        if len(lists) > 1 and isinstance(value, list):  # numbers are not names, nor names numbers: no guess
            args = tuple(a for a in lists if all(type(v) is typing.get_args(a)[0] for v in value))
        # the exact types first, so that `int | str` keeps 3 an int and `float | None` keeps null None
        for arg in sorted(args, key=lambda a: not (isinstance(a, type) and type(_plain(value)) is a)):
            try:
                return _coerce(value, arg)
            except _Mismatch:
                continue
        raise _Mismatch
    if annotation is type(None):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        raise _Mismatch
    if annotation is bool:
        if isinstance(value, bool):
            return value
        raise _Mismatch
    if annotation is int:
        if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            raise _Mismatch
        if abs(value) >= TOO_LARGE:
            raise _Mismatch
        return int(value)
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise _Mismatch
        return float(value)
    if annotation is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise _Mismatch
    if origin in (tuple, list):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            items = [items]
        parsed = [read_yaml(i, "list") if isinstance(i, str) and args[0] is not str else i for i in items]
        return origin(_coerce(i, args[0]) for i in parsed)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _Mismatch
        return {str(k): _coerce(v, args[1]) for k, v in value.items()}
    raise TypeError(f"a config field of type {annotation} is not supported")


def coerce(value: Any, annotation: Any, key: str) -> Any:
    """`value` as the declared type of `key`; UserError that names key, wanted type and value otherwise."""
    try:
        return _coerce(value, annotation)
    except _Mismatch:
        wanted = _describe(annotation)
        hint = "; text that YAML takes for something else wants quotes" if "text" in wanted else ""
        if "integer" in wanted and re.fullmatch(r"[+-]?[0-9]{20,}", f"{value}"[:40]):
            hint = "; integers are smaller than 2^64"
        raise UserError(f"{key} must be {wanted}, got {value!r}{hint}") from None


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` -> (dotted key, value parsed as YAML)."""
    key, sep, value = text.partition("=")
    key = key.strip()
    if not sep or not key:
        raise UserError(f"--set wants key=value, got {text!r}")
    check_text(text, f"--set {key!r}")
    try:
        return key, read_yaml(value, f"--set {key}", strict=True)
    except MissingValueError:
        raise
    except UserError:
        return key, value.strip()  # text that is no YAML (a Windows path, a prompt); the declared type decides


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, path + "."))
        else:
            out[path] = value
    return out


@dataclass(frozen=True)
class Resolved:
    """The configuration of one run, with the source of every value."""

    preset: str
    domain: str
    method: str
    sections: dict[str, Any]
    sources: dict[str, str]
    volatile: frozenset[str]
    #: the preset in whose table the run appears
    table: str = ""
    #: who tuned the method's values, and on what
    tuning: str = ""
    #: the preset on which a sweep chose them, and what says so of a stream (data set, names of its items, pictures)
    #: that is no other
    tuned_on: str = ""
    check_stream: Callable[[str, Iterable[str], Iterable[Sequence[str]]], str] | None = None
    #: "method" and "data", where they are not built in
    plugins: Mapping[str, Plugin] = field(default_factory=dict)
    #: the record of the run that goes on
    earlier: Mapping[str, Any] | None = None

    def section(self, name: str, cls: type[C]) -> C:
        """The section `name`, checked to be a `cls`."""
        value = self.sections[name]
        if not isinstance(value, cls):
            raise TypeError(f"section {name} is a {type(value).__name__}, not a {cls.__name__}")
        return value

    @property
    def general(self) -> GeneralConfig:
        """Top-level keys."""
        return self.section("general", GeneralConfig)

    @property
    def train(self) -> TrainConfig:
        """The training budget."""
        return self.section("train", TrainConfig)

    @property
    def resources(self) -> ResourcesConfig:
        """What the run asks of a cluster."""
        return self.section("resources", ResourcesConfig)

    def tree(self) -> dict[str, Any]:
        """Plain nested values, for config.yaml and the record."""
        out: dict[str, Any] = {"preset": self.preset, "domain": self.domain, "method_name": self.method}
        out.update(_plain(dataclasses.asdict(self.general)))
        for name, value in self.sections.items():
            if name != "general":
                out[name] = _plain(dataclasses.asdict(value))
                if name == "data":
                    out[name]["name"] = self.data_name
        return out

    @property
    def data_name(self) -> str:
        """Registered name of the data set."""
        return str(getattr(type(self.sections["data"]), "dataset_name", ""))

    @property
    def method_reference(self) -> str:
        """What the registry, in any process, finds the method by."""
        return self.plugins["method"].reference if "method" in self.plugins else self.method

    @property
    def data_reference(self) -> str:
        """What the registry, in any process, finds the data set by."""
        return self.plugins["data"].reference if "data" in self.plugins else self.data_name

    def plugin_sources(self) -> dict[str, dict[str, str]]:
        """`method_source` and `data_source` of a record, of what is not built in."""
        return {f"{part}_source": plugin.record() for part, plugin in self.plugins.items()}

    def flat(self, *, volatile: bool = True) -> dict[str, Any]:
        """Dotted keys and values; without the keys that cannot change a result when `volatile` is False."""
        flat = flatten(self.tree())
        return flat if volatile else self.telling(flat)

    def telling(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """What of dotted keys and values can change a result, and was not left unsaid by older records."""
        told = {k: v for k, v in flat.items() if k not in self.volatile and not (k in LATER and v == LATER[k])}
        return {**told, **{k: old for k, (new, old) in SAID_AS.items() if told.get(k) == new}}

    def hash(self) -> str:
        """Hash of everything that can change a result."""
        plugins = {f"{part}.sha256": plugin.sha256 for part, plugin in self.plugins.items()}
        text = json.dumps({**self.flat(volatile=False), **plugins}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (WrittenInt, WrittenFloat)):
        return int(value) if isinstance(value, int) else float(value)
    return value


@functools.lru_cache(maxsize=256)
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


Checker = Callable[[Any], None]
