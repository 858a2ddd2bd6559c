"""`dualcl bench scale`: the page of what a full study costs, the jobs of a simulated grid, sizes of run folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dualcl.benchmark.bench import positive_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dualcl bench scale`."""
    parser.description = (
        "SCALE.md from the measurements beside it (speed/, photos/, concepts/, scale/); no torch, no measuring."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="SCALE.md", help="write the page; its folder holds the measurements")
    what.add_argument(
        "--storage", type=Path, nargs="+", metavar="RUN_DIR", help="instead: print the sizes of run folders as JSON"
    )
    parser.add_argument("--jobs", type=Path, metavar="FILE.json", help="also write the jobs of a simulated grid")
    parser.add_argument(
        "--count", type=positive_count, default=1000, metavar="N", help="how many jobs; default %(default)s"
    )
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def main(args: argparse.Namespace) -> int:
    """Writes the page or prints the sizes; returns the exit code."""
    from dualcl.results.cost import jobs_text, measure_storage, scale_page, simulated_jobs
    from dualcl.results.files import write_text

    if args.storage is not None:
        print(json.dumps({"rows": measure_storage(args.storage)}, indent=1))
        return 0
    if args.jobs is not None:
        print(write_text(args.jobs, jobs_text(simulated_jobs(args.out.parent, args.count))))
    print(write_text(args.out, scale_page(args.out.parent)))
    return 0
