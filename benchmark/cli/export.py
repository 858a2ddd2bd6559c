"""`dualcl export`."""

from __future__ import annotations

import argparse

from dualcl.benchmark.cli.options import EXPORT_FORMATS
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.text import say
from dualcl.benchmark.exports.export import export
from dualcl.benchmark.exports.usage import describe


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""
    if args.kind not in EXPORT_FORMATS:
        raise UserError(f"unknown --to {args.kind!r}; {nearest(args.kind, EXPORT_FORMATS, 'formats')}")
    args.place = args.out

    card = export(args.run_dir, args.kind, args.out, args.rank, method=args.method, data=args.data, base=args.base)
    for line in describe(card, args.out):
        say(line)
    print(args.out)
    return 0
