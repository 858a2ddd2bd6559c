"""Configuration: typed sections, presets in YAML, `--set key=value`, and where every value came from.

Precedence: code defaults < preset (and what it extends) < `--set`. Unknown keys are errors that name the nearest valid
one; values are coerced by the declared type (`1e-3` is a float). Nothing changes a resolved configuration afterwards.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from dualcl.benchmark.errors import UserError, nearest
from dualcl.benchmark.reading import TOO_LARGE, check_name, check_text
from dualcl.benchmark.safe_yaml import read_yaml

PRESET_DIR = Path(__file__).parent / "presets"
VOLATILE = {"volatile": True}  #: metadata of keys that cannot change a result and may differ on resume

C = TypeVar("C")


def positive(name: str, value: float | None, minimum: float = 1) -> None:
    """Raises UserError unless `value` is None or at least `minimum`."""
    if value is not None and value < minimum:
        raise UserError(f"{name} must be at least {minimum}, got {value}")


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
        positive("seed", self.seed, 0)
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
    schedule: Literal["cosine", "constant", "coda"] = field(
        default="cosine", metadata={"help": "per step; coda: per epoch e, cos(99 pi max(e-1, 0) / (200 (E-1)))"}
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
        return value
    if origin is Literal:
        for choice in args:
            if value == choice or str(value) == str(choice):
                return choice
        raise _Mismatch
    if origin in (Union, types.UnionType):
        if type(None) in args and isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        # the exact types first, so that `int | str` keeps 3 an int and `float | None` keeps null None
        for arg in sorted(args, key=lambda a: not (isinstance(a, type) and type(value) is a)):
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
        raise UserError(f"{key} must be {_describe(annotation)}, got {value!r}") from None


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` -> (dotted key, value parsed as YAML)."""
    key, sep, value = text.partition("=")
    key = key.strip()
    if not sep or not key:
        raise UserError(f"--set wants key=value, got {text!r}")
    check_text(text, f"--set {key!r}")
    try:
        return key, read_yaml(value, f"--set {key}")
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
class Preset:
    """A preset as written: flat keys with the file each came from."""

    name: str
    domain: str
    summary: str
    values: dict[str, tuple[Any, str]]
    #: methods that `dualcl compare` runs when it is given none
    compare: tuple[str, ...] = ()
    #: the preset in whose table its runs appear: its own, or that of which it is an ablation
    table: str = ""
    #: who tuned a method's values, and on what
    tuning: Mapping[str, str] = field(default_factory=dict)
    #: what `dualcl sweep` tries: values by key, per method; grids of `points` points each
    search: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    points: int = 0


@functools.lru_cache(maxsize=1)
def bundled_presets() -> dict[str, Path]:
    """Bundled presets by name."""
    return {p.stem: p for p in sorted(PRESET_DIR.glob("*.yaml"))}


#: a plan resolves the same files many times over, and parsing is most of that
_parsed = functools.lru_cache(maxsize=64)(read_yaml)


def load_preset(name_or_path: str, _chain: tuple[str, ...] = ()) -> Preset:
    """A bundled preset by name, or a YAML file by path; `extends: NAME` takes another one as its base."""
    path = bundled_presets().get(name_or_path)
    if path is None:
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(
                f"unknown preset {name_or_path!r}; {nearest(name_or_path, bundled_presets(), 'presets')}, "
                "or give a .yaml file"
            )
        if not path.is_file():
            raise UserError(f"preset file {name_or_path} does not exist")
    label = path.stem
    check_name(label, "the name of the preset")
    if str(path) in _chain:
        raise UserError(f"preset {label} extends itself")
    try:
        tree = copy.deepcopy(_parsed(path.read_text(encoding="utf-8"), f"preset {path}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read preset {path}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"preset {path} must be a mapping of sections")
    base: dict[str, tuple[Any, str]] = {}
    domain, summary = tree.pop("domain", None), tree.pop("summary", "")
    compare, table = tree.pop("compare", None), tree.pop("table", None) or label
    tuning, (search, points) = _tuning(tree, path), _search(tree, path)
    if parent_name := tree.pop("extends", None):
        parent = load_preset(str(parent_name), (*_chain, str(path)))
        base, domain = dict(parent.values), domain or parent.domain
        compare = list(parent.compare) if compare is None else compare
        tuning = _inherited_tuning(parent, tuning, tree.get("methods"), label)
        search, points = {**parent.search, **search}, points or parent.points
    _check_sizes(search, points, path)
    check_name(str(table), f"preset {path}: table")
    if domain is None:
        raise UserError(f"preset {path} must say `domain: classification` (or extend a preset that does)")
    base.update({key: (value, f"preset {label}") for key, value in flatten(tree).items()})
    if not isinstance(compare, (list, type(None))) or not all(isinstance(m, str) for m in compare or ()):
        raise UserError(f"preset {path}: compare must be a list of method names, got {compare!r}")
    return Preset(label, str(domain), str(summary), base, tuple(compare or ()), str(table), tuning, search, points)


def _of_methods(value: Any, key: str, path: Path) -> dict[str, Any]:
    """A mapping of registered methods; UserError that names `key` otherwise."""
    from dualcl.methods import available_methods

    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"preset {path}: {key} must be a mapping of methods, got {value!r}")
    for name in value:
        if name not in available_methods():
            raise UserError(
                f"preset {path}: unknown method in {key}.{name}; {nearest(str(name), available_methods(), 'methods')}"
            )
    return value


def _tuning(tree: dict[str, Any], path: Path) -> dict[str, str]:
    """Takes `tuning:` out of a preset: a line per method."""
    lines = _of_methods(tree.pop("tuning", None), "tuning", path)
    for name, line in lines.items():
        if not isinstance(line, str) or not line.strip() or "\n" in line.strip():
            raise UserError(f"preset {path}: tuning.{name} must be one line of text, got {line!r}")
    return {name: line.strip() for name, line in lines.items()}


def _inherited_tuning(parent: Preset, own: Mapping[str, str], methods: Any, label: str) -> dict[str, str]:
    """The parent's lines and the preset's own; one that is inherited does not cover values that the preset changes."""
    out = dict(parent.tuning)
    for name, values in methods.items() if isinstance(methods, Mapping) else ():
        if name in out and isinstance(values, Mapping) and values:
            out[name] = f"{', '.join(map(str, values))} by preset {label}, not tuned; the rest: {out[name]}"
    return {**out, **own}


def _search(tree: dict[str, Any], path: Path) -> tuple[dict[str, Mapping[str, tuple[Any, ...]]], int]:
    """Takes `search:` out of a preset: values by key for each method, and the size of every grid."""
    given = tree.pop("search", None)
    if given is None:
        return {}, 0
    if not isinstance(given, dict) or not set(given) <= {"points", "methods"}:
        raise UserError(f"preset {path}: search must hold points and methods, got {given!r}")
    points = given.get("points", 0)
    if not isinstance(points, int) or isinstance(points, bool) or ("points" in given and points < 1):
        raise UserError(f"preset {path}: search.points must be at least 1, got {points!r}")
    spaces: dict[str, Mapping[str, tuple[Any, ...]]] = {}
    for name, axes in _of_methods(given.get("methods"), "search.methods", path).items():
        if not isinstance(axes, dict) or not axes:
            raise UserError(f"preset {path}: search.methods.{name} must map keys to lists of values, got {axes!r}")
        for key, values in axes.items():
            if not isinstance(values, list) or not values or any(v in values[:i] for i, v in enumerate(values)):
                raise UserError(
                    f"preset {path}: search.methods.{name}.{key} must be a list of different values, got {values!r}"
                )
        spaces[name] = {str(key): tuple(values) for key, values in axes.items()}
    return spaces, points


def _check_sizes(search: Mapping[str, Mapping[str, tuple[Any, ...]]], points: int, path: Path) -> None:
    """UserError unless every method has as many points to try as the others."""
    for name, axes in search.items():
        size = math.prod(len(values) for values in axes.values())
        if size != points:
            raise UserError(
                f"preset {path}: search.methods.{name} has {size} points and search.points is {points}; every method "
                "gets as many as the others"
            )


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

    def flat(self, *, volatile: bool = True) -> dict[str, Any]:
        """Dotted keys and values; without the keys that cannot change a result when `volatile` is False."""
        return {k: v for k, v in flatten(self.tree()).items() if volatile or k not in self.volatile}

    def hash(self) -> str:
        """Hash of everything that can change a result."""
        text = json.dumps(self.flat(volatile=False), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _unknown(key: str, known: Iterable[str]) -> UserError:
    return UserError(f"unknown key {key!r}; {nearest(key, known, 'valid keys')}")


def section_classes(domain: str, data_name: str, method_config: type) -> dict[str, type]:
    """The config class of every section of a run, by name."""
    from dualcl.benchmark.domains import domain_sections

    return {
        "general": GeneralConfig,
        "train": TrainConfig,
        "resources": ResourcesConfig,
        **domain_sections(domain, data_name),
        "method": method_config,
    }


def resolve(
    preset: str,
    method: str,
    sets: Iterable[str] = (),
    *,
    seed: int | None = None,
    method_config: type | None = None,
) -> Resolved:
    """The configuration of `method` on `preset` with `--set` assignments on top.

    All mistakes in keys and values are reported together, one UserError with one line.
    """
    from dualcl.methods import available_methods, method_class, method_info

    loaded = load_preset(preset)
    method_info(method, loaded.domain)
    given = dict(loaded.values)
    method_sources: list[tuple[str, Any, str]] = []
    assignments = [parse_assignment(text) for text in sets]
    for key, value in assignments:
        for path, leaf in (flatten({key: value}) if isinstance(value, Mapping) else {key: value}).items():
            given[path] = (leaf, "--set")
    if seed is not None:
        given["seed"] = (seed, "--seed")

    data_name, data_source = given.pop("data.name", (None, ""))
    if data_name is None:
        raise UserError(f"preset {loaded.name} must name its data set: data.name")
    classes = section_classes(loaded.domain, str(data_name), method_config or method_class(method).Config)
    known_keys = {
        (f.name if section == "general" else f"{section}.{f.name}"): (section, f)
        for section, cls in classes.items()
        for f in dataclasses.fields(cls)
    }
    # `lambda` is a word of Python's, so its field is `lambda_`; both are taken
    method_fields = {f.name for f in dataclasses.fields(classes["method"])}
    given = {
        f"{key}_"
        if key.rpartition(".")[0] in ("method", f"methods.{method}") and key.rpartition(".")[2] + "_" in method_fields
        else key: value
        for key, value in given.items()
    }
    errors: list[str] = []
    for key in list(given):
        if not key.startswith("methods."):
            continue
        value, source = given.pop(key)
        _, name, *rest = key.split(".")
        if name not in available_methods():
            errors.append(str(UserError(f"unknown method in {key!r}; {nearest(name, available_methods(), 'methods')}")))
        elif name == method:
            if not rest and value in (None, {}):
                continue
            method_sources.append(("method." + ".".join(rest), value, f"{source} (methods.{name})"))
        elif source == "--set":
            known = {f.name for f in dataclasses.fields(method_class(name).Config)}
            if not rest or not {rest[0], f"{rest[0]}_"} & known:
                errors.append(str(_unknown(key, (f"methods.{name}.{k}" for k in known))))
    for key, value, source in method_sources:
        if given.get(key, (None, ""))[1] != "--set":
            given[key] = (value, source)

    values: dict[str, dict[str, Any]] = {name: {} for name in classes}
    sources: dict[str, str] = {}
    for key, (value, source) in given.items():
        owner = key if key in known_keys else ".".join(key.split(".")[:2])
        if owner not in known_keys:
            errors.append(str(_unknown(key, [*known_keys, "data.name"])))
            continue
        section, spec = known_keys[owner]
        annotation = _hints(classes[section])[spec.name]
        if owner != key:  # a key inside a free mapping, such as backbone.kwargs.img_size
            if typing.get_origin(annotation) is not dict:
                errors.append(str(_unknown(key, [*known_keys, "data.name"])))
                continue
            values[section].setdefault(spec.name, {})[key[len(owner) + 1 :]] = value
            sources[key] = source
            continue
        try:
            values[section][spec.name] = coerce(value, annotation, key)
            sources[key] = source
        except UserError as error:
            errors.append(str(error))
    sections: dict[str, Any] = {}
    for name, cls in classes.items():
        try:
            sections[name] = cls(**values[name])
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("; ".join(dict.fromkeys(errors)))
    resolved = Resolved(
        preset=loaded.name,
        domain=loaded.domain,
        method=method,
        sections=sections,
        sources={},
        table=loaded.table,
        tuning=_tuning_line(loaded.tuning.get(method), sources),
        volatile=frozenset(k for k, (_, f) in known_keys.items() if f.metadata.get("volatile")),
    )
    resolved.sources.update({key: sources.get(key, "default") for key in flatten(resolved.tree())})
    for key in ("preset", "domain", "method_name"):
        resolved.sources[key] = "command line"
    resolved.sources["data.name"] = data_source
    return resolved


def _tuning_line(line: str | None, sources: Mapping[str, str]) -> str:
    """Who tuned the method: the preset's line, after the keys that `--set` gave."""
    own = {key: source for key, source in sources.items() if key.startswith("method.")}
    by_hand = [key for key, source in own.items() if source.startswith("--set")]
    if line is None:
        presets = sorted({source for key, source in own.items() if key not in by_hand})
        line = f"not tuned: values of {', '.join(presets)}" if presets else "not tuned: code defaults"
    return f"--set {', '.join(by_hand)}; the rest: {line}" if by_hand else line


def own_values(resolved: Resolved) -> dict[str, Any]:
    """The method's values that differ from the code's defaults, by name."""
    config = resolved.sections["method"]
    default = type(config)()
    return {
        f.name: value
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != getattr(default, f.name)
    }


def help_text(resolved: Resolved, key: str) -> str:
    """The one-line help of a dotted key, empty when its field has none."""
    section, _, name = key.rpartition(".") if "." in key else ("general", "", key)
    config = resolved.sections.get(section)
    for spec in dataclasses.fields(config) if config is not None else ():
        if spec.name == name:
            return str(spec.metadata.get("help", ""))
    return ""


Checker = Callable[[Any], None]
