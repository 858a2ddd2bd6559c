"""`dualcl run`."""

from __future__ import annotations

import argparse

from dualcl.benchmark.cli.options import RUNS
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.config.tuned import read_tuned
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.machine import follower
from dualcl.benchmark.core.text import say
from dualcl.benchmark.grids.plan import check_seed_given_once
from dualcl.benchmark.runs import runner
from dualcl.benchmark.runs.folder import discard, run_folder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.methods import method_info
from dualcl.results.report import terminal_table


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""

    if args.seed is not None:
        check_seed_given_once(args.sets, "--seed")
    tuned = None
    if args.tuned_on:
        name = method_info(args.method).name
        tuned = read_tuned(args.tuned_on, name, same_stream=args.allow_same_stream)
        if tuned is None:
            raise UserError(f"--tuned-on {args.tuned_on} has no sweep of {name}")
    resolved = resolve(args.preset, args.method, args.sets, seed=args.seed, tuned=tuned)
    out = args.out or RUNS / resolved.preset / f"{resolved.method}-seed{resolved.general.seed}"
    args.place = out

    reporter = Reporter(quiet=args.quiet or follower() > 0)
    folder = run_folder(out, patient=args.wait)
    try:
        runner.run(resolved, folder, reporter)
    finally:
        reporter.close()
    if follower():
        return 0
    print(terminal_table([folder.path]).rstrip("\n"))
    if not args.quiet:
        say(f"record: {out}/record.json")
    discard(folder)
    return 0
