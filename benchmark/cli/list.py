"""`dualcl list`."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from dualcl.benchmark.cli.options import LISTS
from dualcl.benchmark.config.presets import bundled_presets, load_preset
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.registry import Plugin
from dualcl.benchmark.core.text import align
from dualcl.benchmark.models.bundled import UNLISTED, bundled_backbones, bundled_diffusion, read_card
from dualcl.datasets import available_datasets
from dualcl.methods import available_methods

_STORES = "; stores data"


def _published(module: str) -> Any:
    """What reads others' numbers: by name, as `dualcl list` alone has no need of results."""
    return importlib.import_module(f"dualcl.results.{module}")


def _bundled_backbones(every: bool) -> dict[str, str]:
    """Bundled backbones and what each was trained on, read without timm."""
    known = {name: path for name, path in bundled_backbones().items() if every or name not in UNLISTED}
    cards = {name: read_card(path) for name, path in known.items()}
    return {n: f"{c['timm_name']} at {c['input_size']} px, trained on {c['trained_on']}" for n, c in cards.items()}


def _bundled_models(every: bool) -> dict[str, str]:
    """Bundled text-to-image models and what each was trained on, read without diffusers."""
    cards = {
        name: folder / "card.json" for name, folder in bundled_diffusion().items() if every or name not in UNLISTED
    }
    trained = {name: read_card(card)["trained_on"] for name, card in cards.items()}
    return {name: f"a small Stable Diffusion, trained on {text}" for name, text in trained.items()}


def _origin(plugin: Plugin | None) -> str:
    """The column "from"."""
    return "built in" if plugin is None else plugin.origin


def _list_rows(what: str, every: bool) -> list[list[str]]:
    if what == "methods":
        methods = sorted(available_methods().values(), key=lambda m: m.name)
        return [
            [m.name, ", ".join(m.domains), _origin(m.plugin), f"{m.summary}{_STORES * m.stores_data} [{m.source}]"]
            for m in methods
        ]
    if what == "presets":
        presets = [load_preset(name) for name in bundled_presets()]
        return [[p.name, p.domain, p.summary] for p in presets if every or p.listed]
    if what == "datasets":
        return [
            [d.name, d.domain, _origin(d.plugin), d.summary + ("; needs `dualcl prepare`" if d.needs_prepare else "")]
            for d in sorted(available_datasets().values(), key=lambda d: d.name)
            if every or d.listed
        ]
    if what == "published":
        rows: list[list[str]] = _published("published.render").overview()
        return rows
    if what == "models":
        return [
            *([name, "bundled", text] for name, text in _bundled_models(every).items()),
            ["HUB_ID", "hub", "any Stable Diffusion 1.x or 2.x in diffusers layout: --set base.model=HUB_ID"],
            ["DIR", "local", "the same in a directory: --set base.model=DIR"],
        ]
    rows = [[name, "bundled", text] for name, text in _bundled_backbones(every).items()]
    return [
        *rows,
        ["TIMM_NAME.TAG", "timm", "any vision transformer of timm with its full tag: --set backbone.name=NAME.TAG"],
        ["FILE", "local", "weights from a file: --set backbone.name=NAME backbone.weights=FILE.safetensors"],
    ]


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""
    if args.what is not None and args.what not in LISTS:
        raise UserError(f"cannot list {args.what!r}; {nearest(args.what, LISTS, 'lists')}")
    if args.stream is not None:
        if args.what != "published":
            raise UserError(f"`dualcl list {args.what}` takes no further word, got {args.stream!r}; leave it out")
        print(_published("report").terminal_stream(args.stream).rstrip("\n"))
        return 0
    blocks = []
    # published numbers are others' and long: on demand only
    own = [what for what in LISTS if what != "published"]
    for what in own if args.what is None else (args.what,):
        rows = _list_rows(what, args.all)
        lines = align(rows) if rows else ["none"]
        blocks.append("\n".join(lines if args.what else [f"{what}:", *(f"  {line}" for line in lines)]))
    print("\n\n".join(blocks))
    return 0
