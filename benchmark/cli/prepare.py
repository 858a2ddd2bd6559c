"""`dualcl prepare`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dualcl.benchmark.config.resolve import resolve_shared
from dualcl.datasets import dataset_class, dataset_info
from dualcl.datasets.reading.download import alone_in


def main(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns the exit code."""

    sets = list(args.sets)
    if args.root is not None:
        sets.append(f"data.root={json.dumps(args.root)}")
    resolved = resolve_shared(args.preset, sets)
    info = dataset_info(resolved.data_reference)
    if not info.needs_prepare:
        print(f"{info.name}: nothing to prepare")
        return 0
    config = resolved.sections["data"]
    with alone_in(Path(config.root).expanduser()):
        dataset_class(info.reference, resolved.domain).prepare(config)
    print(f"{info.name}: ready")
    return 0
