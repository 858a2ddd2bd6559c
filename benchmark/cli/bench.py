"""`dualcl bench`: each kind is a module of `speed/`, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib

from dualcl.benchmark.core.errors import UserError

#: kinds: the module with `add_arguments(parser)` and `main(args) -> int`, and a line of help
KINDS = {
    "step": ("dualcl.benchmark.speed.common", "time and memory of one training step per method (classification)"),
    "concepts": (
        "dualcl.benchmark.speed.concepts",
        "the same for customization: at full size, or as concepts are added",
    ),
    "classification": ("dualcl.benchmark.speed.classification", "ours against public code, side by side"),
    "customization": (
        "dualcl.benchmark.speed.customization",
        "training steps and sampling of Stable Diffusion beside diffusers' own code",
    ),
    "input": ("dualcl.benchmark.speed.input", "batches out of JPEG files beside torchvision's ImageFolder"),
}


#: kinds that went, and where what they measured last is
GONE = {"growth": "SPEED.md", "page": "SPEED.md", "scale": "SCALE.md", "report": "SCALE.md", "grid": "SCALE.md"}


def add_arguments(command: argparse.ArgumentParser, only: str | None = None) -> None:
    """Adds the kinds, with the arguments of one of them; None: of all. UserError for one that went."""
    if only in GONE:
        raise UserError(f"bench {only} is gone; its last figures are in results/{GONE[only]}")
    kinds = command.add_subparsers(dest="kind", required=True, metavar="WHAT")
    for name, (module, summary) in KINDS.items():
        kind = kinds.add_parser(name, help=summary)
        if only in (None, name):
            importlib.import_module(module).add_arguments(kind)


def main(args: argparse.Namespace) -> int:
    """Measures; returns the exit code."""
    return int(importlib.import_module(KINDS[args.kind][0]).main(args))
