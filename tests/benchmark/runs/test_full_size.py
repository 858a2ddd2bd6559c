"""One training step and one image at the full size of Stable Diffusion 1.x: minutes and about 8 GiB on a CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dualcl.benchmark.cli import main

pytestmark = pytest.mark.slow


def test_full_size_step_trains_the_published_numbers_of_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "full.json"
    assert main(["bench", "concepts", "--full-size", "--format", "json", "--out", str(out)]) == 0
    value = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text(encoding="utf-8")) == value
    assert value["setup"]["image_size"] == 512
    finetune, clora = value["rows"]
    assert (finetune["method"], clora["method"]) == ("finetune", "clora")
    for row in (finetune, clora):
        assert row["network_parameters"] == 859_520_964
        assert row["token_parameters"] == 768
        assert math.isfinite(row["loss"])
        assert row["loss"] > 0
        assert min(row["encode_seconds"], row["step_seconds"], row["sample_seconds"]) > 0
    assert value["settings"]["clora"]["rank"] == 16
    assert (finetune["parameters_trained"], clora["parameters_trained"]) == (19_169_280, 792_576)
    assert [round(row["percent"], 3) for row in (finetune, clora)] == [2.230, 0.092]
    # both start from the same weights, image and noise, and a fresh low-rank update changes nothing
    assert finetune["loss"] == pytest.approx(clora["loss"], rel=1e-3)
