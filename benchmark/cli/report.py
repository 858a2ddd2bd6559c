"""`dualcl report`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from dualcl.benchmark.cli.reports import formats_of, write_report
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.text import say
from dualcl.benchmark.runs.mirror import fetched
from dualcl.results.prediction import write_predictions
from dualcl.results.report import terminal_table
from dualcl.results.tables import summarise


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""
    if args.out is None and not isinstance(args.dirs[0], Path) and args.ledger is None and args.format is None:
        raise UserError(f"a report on {args.dirs[0]} needs --out DIR, or --format md, csv or tex for stdout alone")
    args.dirs = fetched(args.dirs)
    if args.ledger is not None:
        return _write_ledger(args)
    formats = formats_of(args.format)
    alone = formats[0] if args.format is not None and len(formats) == 1 and formats[0] in ("md", "csv", "tex") else None
    if args.out is None and len(args.dirs) > 1 and not alone:
        raise UserError("a report on several folders needs --out DIR, or --format md, csv or tex for stdout alone")
    if args.with_published and alone == "csv" and args.out is None:
        raise UserError(
            "--with-published keeps published numbers out of our table: with --format csv give --out DIR too"
        )
    summary = summarise(args.dirs, allow_mixed=args.allow_mixed, baseline=args.baseline, confidence=args.confidence)
    # the table first: pictures take longer
    print(terminal_table(summary, alone or "text", with_published=args.with_published).rstrip("\n"), flush=True)
    if alone == "csv":
        for problem in summary.problems:  # the other forms have a place for it
            say(problem)
    if args.out is not None or not alone:
        write_report(summary, args.out or args.dirs[0] / "report", formats, args.with_published, args.all_plots)
    if args.predicts is not None:
        for line in write_predictions(summary, args.predicts, args.out or args.dirs[0] / "report"):
            print(line)
    return 0


def _write_ledger(args: argparse.Namespace) -> int:
    for name in ("out", "format", "with_published", "allow_mixed", "baseline"):
        if getattr(args, name):
            raise UserError(f"--ledger writes the ledger and nothing else; leave out --{name.replace('_', '-')}")

    args.place = args.ledger
    say(f"ledger: {importlib.import_module('dualcl.benchmark.grids.ledger').write_ledger(args.dirs, args.ledger)}")
    return 0
