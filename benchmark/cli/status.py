"""`dualcl status`."""

from __future__ import annotations

import argparse
import sys

from dualcl.benchmark.core.errors import UserError, nearest
from dualcl.benchmark.grids.status import FORMATS, render, told_apart, watch
from dualcl.benchmark.grids.survey import RunState, Survey
from dualcl.benchmark.runs.mirror import fetched


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""

    if args.format not in FORMATS:
        raise UserError(f"unknown --format {args.format!r}; {nearest(args.format, FORMATS, 'formats')}")
    survey = Survey(fetched(args.dirs))
    if args.watch is None:
        states = survey.look()
        # rows for programs have the folder apart
        shown = states if args.format in ("csv", "json") else told_apart(states, survey.roots)
        print(render(shown, args.format), end="")
        return 0
    if args.format != "text":
        raise UserError("--watch shows text; leave out --format, or call again for every look")

    def look() -> list[RunState]:
        fetched(args.dirs)
        return told_apart(survey.look(), survey.roots)

    watch(look, args.watch, sys.stdout)
    return 0
