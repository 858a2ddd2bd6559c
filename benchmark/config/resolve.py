"""From a preset, a method and `--set` arguments to the configuration of a run."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from dualcl.benchmark.config.presets import load_preset
from dualcl.benchmark.config.tuned import Tuned
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.settings import (
    GeneralConfig,
    Resolved,
    ResourcesConfig,
    TrainConfig,
    _hints,
    coerce,
    flatten,
    parse_assignment,
)
from dualcl.benchmark.domains import domain_sections
from dualcl.datasets import dataset_info
from dualcl.methods import available_methods, method_class, method_info


def _unknown(key: str, known: Iterable[str]) -> UserError:
    return UserError(f"unknown key {key!r}; {nearest(key, known, 'valid keys')}")


def section_classes(domain: str, data: str, method_config: type) -> dict[str, type]:
    """The config class of every section of a run, by name; `data`: a reference of the registry."""
    return {
        "general": GeneralConfig,
        "train": TrainConfig,
        "resources": ResourcesConfig,
        **domain_sections(domain, data),
        "method": method_config,
    }


def resolve(
    preset: str,
    method: str,
    sets: Iterable[str] = (),
    *,
    seed: int | None = None,
    method_config: type | None = None,
    tuned: Tuned | None = None,
) -> Resolved:
    """The configuration of `method`, a name or FILE.py, on `preset` with `--set` assignments on top.

    `tuned`: what a sweep found for the method, above the preset and below `--set`.
    All mistakes in keys and values are reported together, one UserError with one line.
    """
    loaded = load_preset(preset, method)
    info = method_info(method, loaded.domain)
    cls, method = method_class(info.reference), info.name
    plugins = {} if info.plugin is None else {"method": info.plugin}
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
    data = dataset_info(str(data_name), loaded.domain)
    if data.plugin is not None:
        plugins["data"] = data.plugin
    classes = section_classes(loaded.domain, data.reference, method_config or cls.Config)
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
        if name not in loaded.methods:
            errors.append(str(UserError(f"unknown method in {key!r}; {nearest(name, loaded.methods, 'methods')}")))
        elif name == method:
            if not rest and value in (None, {}):
                continue
            method_sources.append(("method." + ".".join(rest), value, f"{source} (methods.{name})"))
        elif source == "--set":
            known = {f.name for f in dataclasses.fields(method_class(loaded.methods[name]).Config)}
            if not rest or not {rest[0], f"{rest[0]}_"} & known:
                errors.append(str(_unknown(key, (f"methods.{name}.{k}" for k in known))))
    for key, value, source in method_sources:
        if given.get(key, (None, ""))[1] != "--set":
            given[key] = (value, source)
    if tuned is not None:
        for key, value in tuned.values.items():
            if not given.get(key, (None, ""))[1].startswith("--set"):
                given[key] = (value, f"sweep on {tuned.preset}")

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
            annotation = Any
        try:
            given_value = coerce(value, annotation, key)
            sources[key] = source
        except UserError as error:
            errors.append(str(error))
            continue
        if owner != key:
            values[section].setdefault(spec.name, {})[key[len(owner) + 1 :]] = given_value
        else:
            values[section][spec.name] = given_value
    sections: dict[str, Any] = {}
    for name, cls in classes.items():
        try:
            sections[name] = cls(**values[name])
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("; ".join(dict.fromkeys(errors)))
    _refuse_idle(sections["method"], sources)
    resolved = Resolved(
        preset=loaded.name,
        domain=loaded.domain,
        method=method,
        sections=sections,
        sources={},
        table=loaded.table,
        tuning=_tuning_line(tuned.tuning if tuned else loaded.tuning.get(method), sources),
        tuned_on=tuned.preset if tuned else "",
        check_stream=tuned.check if tuned else None,
        plugins=plugins,
        volatile=frozenset(k for k, (_, f) in known_keys.items() if f.metadata.get("volatile")),
    )
    resolved.sources.update({key: sources.get(key, "default") for key in flatten(resolved.tree())})
    for key in ("preset", "domain", "method_name"):
        resolved.sources[key] = "command line"
    resolved.sources["data.name"] = data_source
    return resolved


def _refuse_idle(method: Any, sources: Mapping[str, str]) -> None:
    """UserError for options of the method that were given, but do nothing beside the others.

    What a preset gives stays where `--set` or a sweep chose what makes it idle.
    """
    chosen = {key: source for key, source in sources.items() if key.startswith("method.")}
    told = any(source.startswith(("--set", "sweep on")) for source in chosen.values())
    for name, mend in method.idle().items():
        source = chosen.get(f"method.{name}")
        if source is not None and (source.startswith("--set") or not told):
            raise UserError(f"method.{name} does nothing without {mend}: set that too, or leave it out ({source})")


def resolve_shared(preset: str, sets: Iterable[str]) -> Resolved:
    """The preset resolved with some method of its domain: right for everything but the section `method`."""
    loaded = load_preset(preset)
    serving = [m.name for m in available_methods().values() if loaded.domain in m.domains]
    method = next(iter([*loaded.compare, *sorted(serving)]), None)
    if method is None:
        raise UserError(f"no method serves the domain {loaded.domain!r} of preset {preset}")
    return resolve(preset, method, sets)


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
