"""`dualcl generate`."""

from __future__ import annotations

import argparse

from dualcl.benchmark.cli.options import SCHEDULERS
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.text import say
from dualcl.benchmark.exports.generate import generate, open_model


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""
    if args.scheduler is not None and args.scheduler not in SCHEDULERS:
        raise UserError(f"unknown --scheduler {args.scheduler!r}; {nearest(args.scheduler, SCHEDULERS, 'schedulers')}")
    args.place = args.out or args.run_dir / "generated"

    model = open_model(
        args.run_dir, args.device, base=args.base, after=args.after, method=args.method, data=args.data, say=say
    )
    paths = generate(
        model,
        args.prompts,
        args.place,
        n=args.n,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        scheduler=args.scheduler,
        negative_prompt=args.negative,
        batch_size=args.batch_size,
        say=say,
    )
    print("\n".join(map(str, paths)))
    return 0
