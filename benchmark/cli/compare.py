"""`dualcl compare`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dualcl.benchmark.cli.options import RUNS
from dualcl.benchmark.cli.reports import formats_of, write_report
from dualcl.benchmark.config.presets import load_preset
from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.core.reading import parse_names
from dualcl.benchmark.core.text import say
from dualcl.benchmark.grids.execute import conclude, execute, slurm_script
from dualcl.benchmark.grids.forecast import forecast
from dualcl.benchmark.grids.plan import Planned, default_methods, parse_seeds, plan_comparison
from dualcl.benchmark.grids.survey import write_plan
from dualcl.benchmark.runs.mirror import PLAN, local_and_url, push_files
from dualcl.results.report import terminal_table
from dualcl.results.tables import summarise


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""

    methods = default_methods(args.preset) if args.methods is None else parse_names(args.methods, "methods")
    seeds = None if args.seeds is None else parse_seeds(args.seeds)
    formats = formats_of(args.format)
    args.place = args.out or RUNS / load_preset(args.preset).name
    out, url = local_and_url(args.place)
    plan = plan_comparison(args.preset, methods, seeds, args.sets, out, url, args.tuned_on, args.allow_same_stream)
    if args.tuned_on and (untuned := list(dict.fromkeys(p.resolved.method for p in plan if not p.options))):
        say(f"no sweep of {', '.join(untuned)} in {args.tuned_on}: values of the preset")
    runs = [p.resolved for p in plan]
    rows = dict.fromkeys([*(r.method for r in runs), *(r.general.label or r.method for r in runs)])
    if args.baseline is not None and args.baseline not in rows:  # said now, not after hours
        raise UserError(f"the baseline {args.baseline!r} is not compared; {nearest(args.baseline, rows, 'methods')}")
    if args.print_slurm and args.dry_run:
        raise UserError("--print-slurm runs nothing either; leave --dry-run out")
    if args.print_slurm:
        return _print_slurm(plan, out, url, args.slurm_options)
    if args.slurm_options:
        raise UserError("--slurm-option is for --print-slurm; leave it out")

    def before(waiting: Sequence[Planned]) -> bool:
        for line in forecast(plan, waiting, args.jobs) if args.dry_run or not args.quiet else ():
            print(line) if args.dry_run else say(line)
        return not args.dry_run

    given = {"engine": args.engine, "address": args.address, "jobs": args.jobs, "quiet": args.quiet}
    outcomes = execute(plan, **given, root=out, url=url, before=before)
    if args.dry_run:
        return 0
    code = conclude(outcomes, args.quiet)
    if any(o.code == 0 for o in outcomes):
        dirs = [p.out for p in plan if (p.out / "record.json").is_file()]
        summary = summarise(dirs, allow_mixed=args.allow_mixed, baseline=args.baseline, confidence=args.confidence)
        print(terminal_table(summary).rstrip("\n"), flush=True)
        write_report(summary, out / "report", formats)
        if url is not None:
            push_files(out / "report", f"{url.rstrip('/')}/report")
    return code


def _print_slurm(plan: list[Planned], out: Path, url: str | None, options: list[str]) -> int:

    script = slurm_script(plan, url or os.path.abspath(out), options)
    write_plan(out, plan)
    if url is not None:
        push_files(out / PLAN, url)
    print(script, end="")
    return 0
