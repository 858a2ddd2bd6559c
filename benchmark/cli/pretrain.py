"""`dualcl pretrain`."""

from __future__ import annotations

import argparse

from dualcl.benchmark.core.text import say
from dualcl.benchmark.pretraining.recipes import pretrain


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""
    args.place = args.out

    pretrain(args.name, args.out, seed=args.seed)
    say(f"written to {args.out}")
    return 0
