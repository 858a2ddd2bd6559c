"""`dualcl check`."""

from __future__ import annotations

import argparse

from dualcl.benchmark.core.bar import Bar
from dualcl.benchmark.core.errors import EXIT_FAILED, UserError
from dualcl.benchmark.core.text import say
from dualcl.benchmark.runs.backbone_check import check_backbone, summary, transformers
from dualcl.benchmark.runs.method_check import check_method


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""
    if (args.method is None) == (args.backbones is None):
        raise UserError("check wants a METHOD or --backbones, one of the two")
    if args.backbones is not None:
        return _backbones(args.backbones)
    broken = 0
    for domain, name, problem, detail in check_method(args.method, args.sets):
        broken += bool(problem)
        said = f"failed: {problem}" if problem else f"ok ({detail})" if detail else "ok"
        print(f"{domain}: {name}: {said}", flush=True)
    if broken:
        say(f"{args.method} breaks {broken} of its promises (methods/README.md)")
    return EXIT_FAILED if broken else 0


def _backbones(globs: list[str]) -> int:
    names = transformers(globs)
    if not names:
        raise UserError(f"--backbones: no transformer of timm is called {' or '.join(globs)}; see timm.list_models()")
    found = []
    with Bar("backbones", len(names), "names") as bar:
        for name in names:
            found.append(check_backbone(name))
            bar.update(1)
    for one in found:
        print(f"{one.name}: {one.outcome}" + f": {one.why}" * bool(one.why))
    print("\n".join(summary(found)))
    return EXIT_FAILED if any(one.outcome in ("differs", "traceback") for one in found) else 0
