"""Both sides of `dualcl bench classification` compute the same: the losses of a first step agree."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from dualcl.benchmark.speed import classification as bench_classification
from dualcl.benchmark.speed.pairs import OURS, Bench, Peer

VARIABLE, REPOSITORY = "DUALCL_REFERENCE_CODA_PROMPT", bench_classification.SOURCES["coda_prompt"]


@pytest.mark.reference
def test_sides_agree(checkout: Callable[[str, str], Path], tmp_path: Path) -> None:
    root = checkout(VARIABLE, REPOSITORY)
    parser = argparse.ArgumentParser()
    bench_classification.add_arguments(parser)
    sizes = ["--backbone", "vit_tiny_patch16_224", "--image-size", "32", "--batch", "4"]
    sizes += ["--set", "backbone.kwargs.patch_size=8", "--set", "backbone.kwargs.depth=5"]
    rows = {c.name: c for c in bench_classification.comparisons(parser.parse_args(sizes), tmp_path)}
    peers = {OURS: Peer(), "coda_prompt": Peer(checkout=str(root))}
    with Bench(peers, "cpu", threads=1, repeats=1) as bench:
        for method in bench_classification.LABELS:
            result = bench.measure(rows[f"step-{method}-coda_prompt"])
            assert result["agree"] < 1e-5, method
