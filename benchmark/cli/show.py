"""`dualcl show`."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import Any

from dualcl.benchmark.config.presets import Preset, load_preset
from dualcl.benchmark.config.resolve import help_text, own_values, resolve, resolve_shared
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.settings import Resolved
from dualcl.benchmark.core.text import align, printable
from dualcl.benchmark.domains import domain_class
from dualcl.benchmark.grids.sweep import axes_of, typed
from dualcl.datasets import dataset_class
from dualcl.methods import method_info


def _shown_value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""

    shared = args.method is None
    resolved = resolve_shared(args.preset, args.sets) if shared else resolve(args.preset, args.method, args.sets)
    loaded = load_preset(args.preset, args.method or "")
    rows = []
    for key, value in resolved.flat().items():
        if key in ("preset", "domain", "method_name") or (shared and key.startswith("method.")):
            continue
        rows.append([key, _shown_value(value), resolved.sources.get(key, "default"), help_text(resolved, key)])
    print(f"{loaded.name} ({loaded.domain}): {loaded.summary}")
    if not shared:
        plugin = resolved.plugins.get("method")
        print(f"method: {resolved.method}{'' if plugin is None else f' from {plugin.origin}'}")
        print(f"tuned by: {resolved.tuning}")
        print(f"search space: {_shown_space(loaded, resolved.method)}")
    print()
    print("\n".join(align([["key", "value", "from", "what it is"], *rows])))
    print()
    print("\n".join(_order(resolved, whole=args.order)))
    if shared:
        print()
        if loaded.compare:
            print(f"compared by default: {', '.join(loaded.compare)}")
        print("values of single methods, where they differ from the code's (all of them: dualcl show PRESET METHOD):")
        print("\n".join(align([["method", "values", "tuned by"], *_tuned_rows(args.preset, args.sets)])))
        if loaded.search:
            print()
            print(f"search spaces, {loaded.points} points each (dualcl sweep {args.preset} METHOD):")
            print("\n".join(align([[name, _shown_space(loaded, name)] for name in loaded.search])))
    return 0


def _order(resolved: Resolved, *, whole: bool) -> list[str]:
    """What is learnt in which order, a line for each task; `whole`: all of it, however long."""
    config = resolved.sections["data"]
    if hasattr(config, "names_alone"):
        config = config.names_alone()
    try:
        data = dataset_class(resolved.data_reference, resolved.domain).load(config)
    except UserError as error:
        return [f"order: not known without the data ({printable(str(error))})"]
    tasks = domain_class(resolved.domain).ordered(resolved, data)  # type: ignore[attr-defined]
    sizes = [len(names) for names in tasks]
    runs = [f"{n} of {size}" for size, group in itertools.groupby(sizes) if (n := len([*group]))]
    lines = [f"order with seed {resolved.general.seed}: {len(tasks)} tasks ({', '.join(runs)})"]
    most, shown = (None, tasks) if whole else (5, tasks[:20])
    for i, names in enumerate(shown, start=1):
        lines.append(
            f"  task {i} ({len(names)}): {printable(', '.join(names[:most]))}" + ", ..." * (names[:most] != names)
        )
    if len(shown) < len(tasks):
        lines.append(f"  ... and {len(tasks) - len(shown)} more tasks (--order shows all)")
    return lines


def _shown_space(preset: Preset, method: str) -> str:
    """`method.lr=1e-3,1e-2 x method.rank=4,8`."""

    axes = axes_of(preset, method)
    return " x ".join(f"{axis.key}={','.join(axis.values)}" for axis in axes) or "none, give --over"


def _tuned_rows(preset: str, sets: Sequence[str]) -> list[list[str]]:
    """Method, its values that differ from the code's, and who tuned it: of all that a preset compares or speaks of."""

    loaded = load_preset(preset)
    spoken_of = [key.split(".")[1] for key in loaded.values if key.startswith("methods.")]
    rows = []
    compared = [method_info(method).name for method in loaded.compare]
    for name in dict.fromkeys([*compared, *spoken_of, *loaded.tuning, *loaded.search]):
        method = loaded.methods.get(name, name)
        try:
            resolved = resolve(preset, method, sets)
        except UserError:  # a key of other methods
            resolved = resolve(preset, method, [text for text in sets if not text.startswith(("method.", "method="))])
        values = " ".join(f"{k}={typed(v)}" for k, v in own_values(resolved).items())
        rows.append([name, values or "-", resolved.tuning])
    return rows
