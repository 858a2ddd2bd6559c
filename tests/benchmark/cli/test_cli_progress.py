"""Progress output, the environment and the choice of the device."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualcl.benchmark.core import machine
from dualcl.benchmark.core.devices import available_devices, pick_device
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.machine import environment, usable_cpus
from dualcl.benchmark.core.text import duration, printable
from dualcl.benchmark.runs.progress import Reporter, peak_mib


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def tell(reporter: Reporter) -> None:
    reporter.begin_task(0, 2, "teacup, king", 3)
    for step in (1, 2, 3):
        reporter.step(step, 1.5)
    reporter.end_task("accuracy 50.0 %")
    reporter.close()


def test_plain_lines_have_prefix_and_no_control_characters() -> None:
    stream = io.StringIO()
    tell(Reporter("lora seed 1", stream=stream, interval=0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert all(line.startswith("lora seed 1  task 1/2 (teacup, king)") for line in lines)
    assert "2/3, loss 1.500, ETA 0s" in lines[2]
    assert "MiB" in lines[2]
    assert "accuracy 50.0 %" in lines[-1]
    assert all(line.isprintable() for line in lines)


def test_plain_lines_come_at_most_once_per_interval() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream, interval=1000)
    reporter.begin_task(None, 5, "", 100)
    for step in range(1, 101):
        reporter.step(step, 1.0)
    assert stream.getvalue() == "all 5 tasks: 100 steps\n"


def test_terminal_overwrites_one_line_within_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    reporter = Reporter("coda_prompt seed 12", stream=stream)
    reporter.begin_task(3, 10, "a long name, another long name, ...", 2)
    reporter.step(2, 0.25)
    assert "\n" not in stream.getvalue()
    start, *bars = stream.getvalue().split("\r")
    assert start == ""
    for bar in bars:
        assert len(bar) < 60
        assert bar.startswith("coda_prompt seed 12  ")
        assert "2/2, loss 0.250" in bar
        assert "█" in bar
    reporter.end_task("done")
    assert stream.getvalue().endswith("\x1b[0m\n")
    assert stream.getvalue().count("\n") == 1


def test_no_color_and_dumb_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    tell(Reporter(stream=stream))
    assert "\x1b[32m" not in stream.getvalue()
    assert "\r" in stream.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    tell(Reporter(stream=stream, interval=0))
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_quiet_says_nothing() -> None:
    stream = Terminal()
    reporter = Reporter("x", quiet=True, stream=stream)
    tell(reporter)
    reporter.note("note")
    assert stream.getvalue() == ""


def test_ascii_streams_get_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    stream.isatty = lambda: True  # type: ignore[method-assign]
    reporter = Reporter(stream=stream)
    reporter.begin_task(0, 1, "Tür", 1)
    reporter.step(1, 0.0)
    reporter.note("über\x1b[2J")
    assert b"#" in raw.getvalue()
    assert b"?ber?[2J" in raw.getvalue()


def test_eta_of_a_resumed_task_counts_from_where_it_resumed() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream, interval=0)
    reporter.begin_task(0, 1, "", 1000)
    reporter.step(901, 1.0)
    assert "ETA" not in stream.getvalue()
    reporter.step(902, 1.0)
    assert "ETA 0s" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (42, "42s"), (190, "3m10s"), (7500, "2h05m"), (-1, "0s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_printable_keeps_one_line() -> None:
    assert printable("a\nb\tc\x07") == "a b c?"


def test_memory_is_plausible() -> None:
    assert 20 < peak_mib() < 1e6


def test_environment_names_versions_but_no_place_or_person() -> None:
    facts = environment()
    assert facts["torch"] == torch.__version__ or facts["torch"] == torch.__version__.partition("+")[0]
    assert facts["dualcl"]
    assert set(facts) >= {"commit", "dirty", "python", "torchvision", "timm", "numpy", "pillow", "platform", "cpus"}
    assert not any("/" in str(v) for v in facts.values())


def test_a_package_that_was_built_names_the_commit_that_it_was_built_from(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    root = Path(machine.__file__).resolve().parents[2]
    if not (root / "setup.py").is_file():
        pytest.skip("not a checkout")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    told = "print(machine.source_state(), machine.source_diff())"
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import machine; {told}"
    built = tmp_path / "dualcl" / "benchmark" / "core"
    ask = [sys.executable, "-c", code, str(built)]
    assert subprocess.check_output(ask, text=True).strip() == f"{machine.source_state()} {machine.source_diff()}"
    (built / machine.BUILT_FROM).write_text("{", encoding="utf-8")
    assert subprocess.check_output(ask, text=True).strip() == "(None, None) None"


def test_two_states_of_uncommitted_changes_at_one_commit_are_told_apart(tmp_path: Path) -> None:
    core = tmp_path / "benchmark" / "core"
    core.mkdir(parents=True)
    shutil.copy(machine.__file__, core / "machine.py")
    (tmp_path / "setup.cfg").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    code = "import sys; sys.path.insert(0, sys.argv[1]); import machine; print(machine.source_diff())"

    def found() -> str:
        return subprocess.check_output([sys.executable, "-B", "-c", code, str(core)], text=True).strip()

    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    states = [found()]
    (tmp_path / "notes").write_text("not of the suite")
    states.append(found())
    for text in ("one", "two"):
        (tmp_path / "methods").mkdir(exist_ok=True)
        (tmp_path / "methods" / "new.py").write_text(text)
        states.append(found())
    (tmp_path / "setup.cfg").unlink()
    subprocess.run([*git, "add", "-A", "methods"], check=True)
    states.append(found())  # without setup.cfg it is no checkout
    (tmp_path / "setup.cfg").write_text("changed")
    states.append(found())
    assert states[:2] == ["None", "None"]
    assert states[4] == "None"
    told = [states[2], states[3], states[5]]
    assert len(set(told)) == 3
    assert all(len(state) == 12 for state in told)


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == available_devices()[0].partition(":")[0]
    assert usable_cpus() >= 1
    with pytest.raises(UserError, match="did you mean 'cuda'"):
        pick_device("cudda")
    with pytest.raises(UserError, match=r"cuda:99.*not available"):
        pick_device("cuda:99")
    with pytest.raises(UserError, match="unknown device 'cuda:x'"):
        pick_device("cuda:x")
