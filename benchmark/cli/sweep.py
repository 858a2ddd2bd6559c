"""`dualcl sweep`."""

from __future__ import annotations

import argparse

from dualcl.benchmark.cli.options import RUNS
from dualcl.benchmark.config.presets import load_preset
from dualcl.benchmark.core.text import say
from dualcl.benchmark.grids import sweep as s
from dualcl.benchmark.grids.execute import conclude, execute
from dualcl.benchmark.grids.plan import parse_seeds


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""

    seeds = None if args.seeds is None else parse_seeds(args.seeds)
    out = args.out or RUNS / f"sweep-{load_preset(args.preset, args.method).name}"
    args.place = out
    sweep = s.plan_sweep(args.preset, args.method, args.over, seeds, args.sets, out, select=args.select)
    if not args.quiet:
        say(f"{len(sweep.points)} points, {len(sweep.plan)} runs, measured on {sweep.measured_on}")
    outcomes = execute(sweep.plan, engine=args.engine, address=args.address, jobs=args.jobs, quiet=args.quiet, root=out)
    scores = s.score_sweep(sweep, outcomes)
    print(s.sweep_table(sweep, scores))
    best = s.best_score(sweep, scores)
    if best is None:
        say(f"no best point: none has all its seeds with a defined {sweep.select}")
    else:
        say(f"best {sweep.select} {best.metrics[sweep.select][0]:.2f}; use it with: {s.set_line(best)}")
        say(f"for `tuning:` in a preset: {sweep.tuning}")
    written = s.write_sweep(sweep, scores, out / sweep.method)
    say(f"sweep: {', '.join(map(str, written))}")
    return conclude(outcomes, args.quiet)
