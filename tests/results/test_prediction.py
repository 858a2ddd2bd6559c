"""Kendall's tau of a small world's ranks against published ones."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import UserError
from dualcl.results import prediction
from dualcl.results.prediction import FEWEST, predictions
from dualcl.results.published import stream
from dualcl.results.tables import Table, summarise

STORED = Path(__file__).parent / "stored" / "glyphs"


@pytest.fixture(scope="module")
def table() -> Table:
    return summarise([STORED]).tables[0]


@pytest.mark.parametrize("seed", range(5))
def test_tau_over_all_pairs_is_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    theirs, ours = rng.integers(0, 6, (2, 9)).astype(float)
    gaps = {(str(a), str(b)): theirs[a] - theirs[b] for a, b in itertools.combinations(range(9), 2)}
    found = prediction._tau(gaps, {str(i): float(v) for i, v in enumerate(ours)})
    assert found == pytest.approx(scipy.stats.kendalltau(theirs, ours).statistic)


def test_readings_of_the_weights_are_never_mixed(table: Table) -> None:
    found = {p.reading: p for p in predictions(table, "imagenet-r-10")}
    assert {*found} == {"in21k_ft_in1k", "in21k"}
    here = {record.label for record in table.records}
    here = {record.label for record in table.records}
    published = {n.dualcl_method: float(n.value) for n in stream("imagenet-r-10") if n.weights_reading == "in21k"
                 and n.metric == "A_last" and "E2-LoRA" in n.source and n.dualcl_method in here}  # fmt: skip
    assert {label: theirs for label, (theirs, _) in found["in21k"].points.items() if label != "l2p"} == {
        label: value for label, value in published.items() if label != "l2p"
    }
    ours = {row.label: stat.mean for row in table.rows if (stat := row.stats["A_last"])}
    for one in found.values():
        assert all(mine == pytest.approx(ours[label]) for label, (_, mine) in one.points.items())
        assert one.interval is not None
        assert one.tau is not None
        assert -1 <= one.interval[0] <= one.interval[1] <= 1


def test_a_pair_is_compared_within_one_source(table: Table) -> None:
    """No source has both L2 (A Closer Look) and FT++ (VQ-Prompt): the pair does not count."""
    found = next(p for p in predictions(table, "imagenet-r-10") if p.reading == "in21k_ft_in1k")
    assert found.pairs < found.all_pairs


def test_few_methods_get_no_verdict(table: Table) -> None:
    for one in predictions(table, "imagenet-r-10"):
        assert ("no verdict" in one.line) == (len(one.points) < FEWEST)
    labels = [f"m{i}" for i in range(FEWEST)]
    points = {label: (float(i), float(i)) for i, label in enumerate(labels)}
    whole = prediction.Prediction("in21k", points, 28, 28, 0.9, (0.7, 1.0), (("m1", "m0"),))
    assert whole.line == (
        "ImageNet-21k, not fine-tuned: n = 8, 28 of 28 pairs, tau-b 0.90 (95% 0.70 to 1.00); agrees; out of order: "
        "m1 above m0 there"
    )


def test_report_writes_the_page_and_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["report", str(STORED), "--out", str(tmp_path), "--format", "md"]
    assert main([*command, "--predicts", "imagenet-r-10"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(
        r"glyphs and imagenet-r-10, ImageNet-21k, not fine-tuned: n = \d+, .* tau-b -?\d\.\d\d \(95% ", last
    )
    page = (tmp_path / "prediction.md").read_text(encoding="utf-8")
    assert last.partition(", ")[2] in page
    assert (tmp_path / "prediction-glyphs.png").stat().st_size > 10_000


def test_what_cannot_be_compared_is_refused(table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no published numbers for 'imagenet-r-11'; did you mean"):
        predictions(table, "imagenet-r-11")
    command = [
        "report",
        str(Path(__file__).parent / "stored" / "concepts"),
        "--out",
        str(tmp_path),
        "--format",
        "md",
    ]
    assert main([*command, "--predicts", "imagenet-r-10"]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("there are no accuracies here to compare with those published for imagenet-r-10")
    )
