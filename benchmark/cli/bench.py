"""`dualcl bench`: each kind is a module of its own, imported by name."""

from __future__ import annotations

import argparse
import importlib

from dualcl.benchmark.speed.pairs import KINDS


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the kinds and their arguments."""
    kinds = command.add_subparsers(dest="kind", required=True, metavar="WHAT")
    for name, (module, summary) in KINDS.items():
        importlib.import_module(module).add_arguments(kinds.add_parser(name, help=summary))


def main(args: argparse.Namespace) -> int:
    """Measures; returns the exit code."""
    return int(importlib.import_module(KINDS[args.kind][0]).main(args))
