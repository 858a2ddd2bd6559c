"""Large imports leave the collector of cycles as they found it, and what they made out of its way."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from dualcl.benchmark.core.imports import import_large


def test_a_large_import_is_frozen_and_the_collector_goes_on() -> None:
    code = (
        "import gc\n"
        "from dualcl.benchmark.core.imports import import_large\n"
        "import_large('torch')\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 50_000)\n"
        "frozen = gc.get_freeze_count()\n"
        "import_large('torch')\n"
        "print(gc.get_freeze_count() == frozen)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "True", "True"]


def test_a_failed_import_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_large("dualcl.no_such_module")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    gc.disable()
    try:
        assert import_large("colorsys").__name__ == "colorsys"
        assert not gc.isenabled()
    finally:
        gc.enable()
