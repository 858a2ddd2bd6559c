"""Presets: YAML files that extend one another and override the code's defaults."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import check_name
from dualcl.benchmark.core.registry import absolute, check_free, is_file
from dualcl.benchmark.core.safe_yaml import read_yaml
from dualcl.benchmark.core.settings import flatten
from dualcl.methods import available_methods, method_info

PRESET_DIR = Path(__file__).parents[1] / "presets"


@dataclass(frozen=True)
class Preset:
    """A preset as written: flat keys with the file each came from."""

    name: str
    domain: str
    summary: str
    values: dict[str, tuple[Any, str]]
    #: methods that `dualcl compare` runs when it is given none: names, or files by their absolute paths
    compare: tuple[str, ...] = ()
    #: the preset in whose table its runs appear: its own, or that of which it is an ablation
    table: str = ""
    #: who tuned a method's values, and on what
    tuning: Mapping[str, str] = field(default_factory=dict)
    #: what `dualcl sweep` tries: values by key, per method; grids of `points` points each
    search: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    points: int = 0
    #: the metric it chooses by, unless told otherwise; empty: the domain's measure of quality
    select: str = ""
    #: the methods that it may speak of, and what the registry finds each by
    methods: Mapping[str, str] = field(default_factory=dict)
    #: False: shown by `dualcl list --all` alone
    listed: bool = True


@functools.lru_cache(maxsize=1)
def bundled_presets() -> dict[str, Path]:
    """Bundled presets by name."""
    return {p.stem: p for p in sorted(PRESET_DIR.glob("*.yaml"))}


def _listed_presets() -> list[str]:
    """Names of the bundled presets that `dualcl list` shows."""
    return [name for name in bundled_presets() if load_preset(name).listed]


#: a plan resolves the same files many times over, and parsing is most of that
_parsed = functools.lru_cache(maxsize=64)(read_yaml)


def _copied(tree: Any) -> Any:
    """Mappings and lists anew, the values themselves, which nothing can change (`copy.deepcopy`: ten times slower)."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def load_preset(name_or_path: str, method: str = "", _chain: tuple[str, ...] = ()) -> Preset:
    """A bundled preset by name, or a YAML file by path; `extends: NAME` takes another one as its base.

    It may speak of registered methods, of those of the files that it compares, and of `method`, a reference.
    """
    path = bundled_presets().get(name_or_path)
    if path is None:
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            hint = nearest(name_or_path, bundled_presets(), "presets", _listed_presets())
            raise UserError(f"unknown preset {name_or_path!r}; {hint}; or give a .yaml file")
        if not path.is_file():
            raise UserError(f"preset file {name_or_path} does not exist")
    label = path.stem
    check_name(label, "the name of the preset")
    if str(path) in _chain:
        raise UserError(f"preset {label} extends itself")
    try:
        tree = _copied(_parsed(path.read_text(encoding="utf-8"), f"preset {path}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read preset {path}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"preset {path} must be a mapping of sections")
    base: dict[str, tuple[Any, str]] = {}
    domain, summary = tree.pop("domain", None), tree.pop("summary", "")
    compare, table = tree.pop("compare", None), tree.pop("table", None) or label
    if not isinstance(compare, (list, type(None))) or not all(isinstance(m, str) for m in compare or ()):
        raise UserError(f"preset {path}: compare must be a list of method names, got {compare!r}")
    compare = None if compare is None else [absolute(m, path.parent) for m in compare]
    parent, listed = None, tree.pop("listed", None)
    if not isinstance(listed, (bool, type(None))):
        raise UserError(f"preset {path}: listed must be true or false, got {listed!r}")
    if parent_name := tree.pop("extends", None):
        parent = load_preset(str(parent_name), method, (*_chain, str(path)))
        base, domain = dict(parent.values), domain or parent.domain
        compare = list(parent.compare) if compare is None else compare
        listed = parent.listed if listed is None else listed
    methods = _methods([*(parent.compare if parent else ()), *(compare or ()), method])
    tuning, (search, points, select) = _tuning(tree, path, methods), _search(tree, path, methods)
    if parent is not None:
        tuning = _inherited_tuning(parent, tuning, tree.get("methods"), label)
        search, points, select = {**parent.search, **search}, points or parent.points, select or parent.select
    _check_sizes(search, points, path)
    check_name(str(table), f"preset {path}: table")
    if domain is None:
        raise UserError(f"preset {path} must say `domain: classification` (or extend a preset that does)")
    base.update({key: (value, f"preset {label}") for key, value in flatten(tree).items()})
    data = flatten(tree).get("data.name")
    if isinstance(data, str):
        base["data.name"] = (absolute(data, path.parent), f"preset {label}")
    chosen = tuple(compare or ())
    own_table, shown = str(table), listed is not False
    return Preset(
        label, str(domain), str(summary), base, chosen, own_table, tuning, search, points, select, methods, shown
    )


def _methods(references: Iterable[str]) -> dict[str, str]:
    """Registered methods and those of files, by name, and what the registry finds each by."""
    known = dict(available_methods())
    for reference in filter(is_file, references):
        info = method_info(reference)
        check_free(known, info)
        known[info.name] = info
    return {name: info.reference for name, info in known.items()}


def _of_methods(value: Any, key: str, path: Path, known: Mapping[str, str]) -> dict[str, Any]:
    """A mapping of known methods; UserError that names `key` otherwise."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"preset {path}: {key} must be a mapping of methods, got {value!r}")
    for name in value:
        if name not in known:
            raise UserError(f"preset {path}: unknown method in {key}.{name}; {nearest(str(name), known, 'methods')}")
    return value


def _tuning(tree: dict[str, Any], path: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Takes `tuning:` out of a preset: a line per method."""
    lines = _of_methods(tree.pop("tuning", None), "tuning", path, known)
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


def _search(
    tree: dict[str, Any], path: Path, known: Mapping[str, str]
) -> tuple[dict[str, Mapping[str, tuple[Any, ...]]], int, str]:
    """Takes `search:` out of a preset: values by key for each method, the size of every grid, what is chosen by."""
    given = tree.pop("search", None)
    if given is None:
        return {}, 0, ""
    if not isinstance(given, dict) or not set(given) <= {"points", "methods", "select"}:
        raise UserError(f"preset {path}: search must hold points, methods and select, got {given!r}")
    points = given.get("points", 0)
    if not isinstance(points, int) or isinstance(points, bool) or ("points" in given and points < 1):
        raise UserError(f"preset {path}: search.points must be at least 1, got {points!r}")
    select = given.get("select", "")
    if not isinstance(select, str):
        raise UserError(f"preset {path}: search.select must be the name of a metric, got {select!r}")
    spaces: dict[str, Mapping[str, tuple[Any, ...]]] = {}
    for name, axes in _of_methods(given.get("methods"), "search.methods", path, known).items():
        if not isinstance(axes, dict) or not axes:
            raise UserError(f"preset {path}: search.methods.{name} must map keys to lists of values, got {axes!r}")
        for key, values in axes.items():
            if not isinstance(values, list) or not values or any(v in values[:i] for i, v in enumerate(values)):
                raise UserError(
                    f"preset {path}: search.methods.{name}.{key} must be a list of different values, got {values!r}"
                )
        spaces[name] = {str(key): tuple(values) for key, values in axes.items()}
    return spaces, points, select


def _check_sizes(search: Mapping[str, Mapping[str, tuple[Any, ...]]], points: int, path: Path) -> None:
    """UserError unless every method has as many points to try as the others."""
    for name, axes in search.items():
        size = math.prod(len(values) for values in axes.values())
        if size != points:
            raise UserError(
                f"preset {path}: search.methods.{name} has {size} points and search.points is {points}; every method "
                "gets as many as the others"
            )
