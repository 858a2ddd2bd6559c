"""Names that went say in one line where to look."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from dualcl.benchmark import config
from dualcl.benchmark.cli import main
from dualcl.benchmark.config.presets import load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.moved import MOVED

ROOT = Path(__file__).parents[3]
RUNNER = "^dualcl.benchmark.runner is now dualcl.benchmark.runs.runner$"


@pytest.mark.parametrize("old", MOVED)
def test_a_former_module_names_its_successors(old: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"^dualcl.{old} is (now dualcl|gone; its last)") as raised:
        importlib.import_module(f"dualcl.{old}")
    for word in str(raised.value).split()[3:]:
        if word.startswith("dualcl."):
            importlib.import_module(word)
        assert not word.startswith("results/") or (ROOT / word).is_file()


def test_every_way_to_import_is_answered() -> None:
    with pytest.raises(ModuleNotFoundError, match=RUNNER):
        import dualcl.benchmark.runner
    with pytest.raises(ModuleNotFoundError, match=RUNNER):
        from dualcl.benchmark import runner  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=RUNNER):
        from dualcl.benchmark.runner import run  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"^dualcl.benchmark.peers is now dualcl.benchmark.speed.peers$"):
        import dualcl.benchmark.peers.pilot
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'dualcl.benchmark.never'"):
        import dualcl.benchmark.never  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'never'"):
        from dualcl.benchmark import never  # noqa: F401


def test_the_former_module_config_is_a_package_with_its_names() -> None:
    assert config.resolve is resolve
    assert config.load_preset is load_preset
    assert isinstance(config.resolve("glyphs", "lora"), config.Resolved)


@pytest.mark.parametrize("kind", ["growth", "page", "scale", "report", "grid"])
def test_a_former_kind_of_bench_says_where_its_figures_are(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", kind, "--out", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dualcl: error: bench {kind} is gone; its last figures are in results/")
    assert (ROOT / line.split()[-1]).is_file()
