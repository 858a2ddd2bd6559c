"""`dualcl bench page`: the page of measured results."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dualcl bench page`."""
    parser.description = "One Markdown page of what `dualcl bench` wrote with --format json; no torch, no measuring."
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--notes", type=Path, metavar="FILE.yaml", help="reasons of misses: quantity: reason")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def main(args: argparse.Namespace) -> int:
    """Writes the page; returns the exit code."""
    from dualcl.results.files import write_text
    from dualcl.results.speed_page import read_notes, speed_page

    notes = {} if args.notes is None else read_notes(args.notes)
    print(write_text(args.out, speed_page(args.files, notes, args.out.parent)))
    return 0
