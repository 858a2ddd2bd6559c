"""`dualcl quickstart`."""

from __future__ import annotations

import argparse

from dualcl.benchmark.cli.options import REPORT_FORMATS
from dualcl.benchmark.cli.reports import write_report
from dualcl.benchmark.core.machine import usable_cpus
from dualcl.benchmark.core.reading import parse_names
from dualcl.benchmark.grids.execute import conclude, execute
from dualcl.benchmark.grids.plan import default_methods, plan_comparison
from dualcl.results.report import terminal_table
from dualcl.results.tables import summarise

#: preset, folder, methods (None: the preset's own) and settings of each part of the quickstart; the longest runs first,
#: so that two cores end together
QUICKSTART: tuple[tuple[str, str, str | None, tuple[str, ...]], ...] = (
    ("portraits-quick", "customization", None, ()),
    ("renditions-10", "classification", "joint,clora,lora,ranpac,ncm", ("train.epochs=2",)),
)


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""

    args.place = args.out
    plan = []
    for preset, folder, methods, sets in QUICKSTART:
        names = default_methods(preset) if methods is None else parse_names(methods, "methods")
        plan += plan_comparison(preset, names, [0], sets, args.out / folder)
    # the models are too small for several threads to pay: one process per core, with one thread each
    outcomes = execute(plan, jobs=args.jobs or min(usable_cpus(), 4), quiet=args.quiet, root=args.out)
    code = conclude(outcomes, args.quiet)
    if any(o.code == 0 for o in outcomes):
        dirs = [p.out for p in plan if (p.out / "record.json").is_file()]
        summary = summarise(dirs)
        print(terminal_table(summary).rstrip("\n"), flush=True)
        write_report(summary, args.out / "report", REPORT_FORMATS)
    return code
