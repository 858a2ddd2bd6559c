"""`dualcl check`."""

from __future__ import annotations

import argparse

from dualcl.benchmark.core.errors import EXIT_FAILED
from dualcl.benchmark.core.text import say
from dualcl.benchmark.runs.method_check import check_method


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""
    broken = 0
    for domain, name, problem, detail in check_method(args.method, args.sets):
        broken += bool(problem)
        said = f"failed: {problem}" if problem else f"ok ({detail})" if detail else "ok"
        print(f"{domain}: {name}: {said}", flush=True)
    if broken:
        say(f"{args.method} breaks {broken} of its promises (methods/README.md)")
    return EXIT_FAILED if broken else 0
