"""Start-up, lists, wrong usage and exit codes: everything that needs no model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dualcl.benchmark.cli import LISTS, main
from dualcl.datasets import available_datasets
from dualcl.methods import available_methods

# a module set to None cannot be imported
BLOCKED = """
import sys, time
for name in ("torch", "torchvision", "timm", "diffusers", "transformers", "matplotlib", "pandas"):
    sys.modules[name] = None
from dualcl.benchmark.cli import main
code = main(sys.argv[1:])
print("cpu", time.process_time(), file=sys.stderr)
sys.exit(code)
"""


def run_blocked(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED, *args], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["list"], ["run", "--help"], ["compare", "--help"]])
def test_light_commands_import_nothing_heavy_and_start_fast(args: list[str]) -> None:
    done = run_blocked(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert float(done.stderr.split()[-1]) < 0.5


def test_console_script_reports_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dualcl.benchmark.cli", "--version"], capture_output=True, text=True, cwd="/"
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "dualcl")


@pytest.mark.parametrize("what", LISTS)
def test_each_list_has_one_line_per_entry(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert len(names) == len(set(names)) > 0


def test_lists_are_complete_and_methods_show_domains_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for info in available_methods().values():
        line = next(x for x in out.splitlines() if x.split()[:1] == [info.name])
        assert info.source in line
        assert all(domain in line for domain in info.domains)
    for name in available_datasets():
        assert any(x.split()[:1] == [name] for x in out.splitlines())


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["comapre", "glyphs"], "compare"),
        (["list", "method"], "methods"),
        (["run", "glyps", "clora"], "'glyphs'"),
        (["run", "glyphs", "cloar"], "'clora'"),
        (["run", "glyphs", "clora", "--set", "train.epoch=1"], "train.epochs"),
        (["run", "glyphs", "clora", "--set", "train.epochs"], "key=value"),
        (["run", "glyphs", "clora", "--set", "train.epochs=many"], "an integer"),
        (["run", "glyphs", "clora", "--seed", "-1"], "from 0 on"),
        (["run", "glyphs", "clora", "--seed", "1", "--set", "seed=2"], "--seed"),
        (["run", "nowhere.yaml", "clora"], "does not exist"),
        (["run", "glyphs"], "METHOD"),
        (["compare", "glyphs", "--methods", "clora,clora"], "'clora' twice"),
        (["compare", "glyphs", "--methods", "clora,,lora"], "empty entry"),
        (["compare", "glyphs", "--methods", "clora,lroa"], "'lora'"),
        (["compare", "glyphs", "--seeds", "0,1,00"], "0 twice"),
        (["compare", "glyphs", "--seeds", "0,x"], "'x'"),
        (["compare", "glyphs", "--seeds", "0", "--set", "seed=1"], "--seeds"),
        (["compare", "glyphs", "--format", "pdf"], "'pdf'"),
        (["compare", "glyphs", "--jobs", "0"], "from 1 on"),
        (["compare", "glyphs", "--meth", "lora"], "--meth"),
        (["sweep", "glyphs", "clora"], "--over"),
        (["sweep", "glyphs", "clora", "--over", "method.rank"], "key=v1,v2"),
        (["sweep", "glyphs", "clora", "--over", "method.rank=1,1"], "1 twice"),
        (["sweep", "glyphs", "clora", "--over", "method.rank=4,4.0"], "same setting"),
        (["sweep", "glyphs", "clora", "--over", "method.rank=1,"], "empty value"),
        (["sweep", "glyphs", "clora", "--over", "method.rnak=1"], "method.rank"),
        (["sweep", "glyphs", "clora", "--over", "seed=1,2"], "--seeds"),
        (["sweep", "glyphs", "clora", "--over", "method.rank=1", "--over", "method.rank=2"], "twice"),
        (["sweep", "glyphs", "clora", "--over", "method.rank=1", "--set", "method.rank=2"], "--over and by --set"),
        (["sweep", "glyphs", "clora", "--over", "method.rank=1", "--select", "A_lats"], "A_last"),
        (["report", "nowhere"], "nowhere"),
        (["pretrain", "glyph-vti"], "glyph-vit"),
        (["prepare", "glyphs", "--root", "x"], "data.root"),
    ],
)
def test_wrong_input_exits_2_with_one_line_that_names_it(
    args: list[str], hint: str, capsys: pytest.CaptureFixture[str], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *usage, last = captured.err.splitlines()
    assert last.startswith("dualcl: error: ")
    assert hint in last
    assert not usage or usage[0].startswith("usage: ")


def test_debug_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "glyps", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_show_tells_value_source_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "glyphs", "clora", "--set", "method.lr=2e-3", "train.epochs=7"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert rows["method.lr"].split()[1:3] == ["0.002", "--set"]
    assert rows["train.epochs"].split()[1:3] == ["7", "--set"]
    assert "preset glyphs" in rows["stream.tasks"]
    assert "default" in rows["seed"]
    assert "rank" in rows["method.rank"]


def test_show_without_method_lists_what_the_preset_tunes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "imagenet-r-20"]) == 0
    out = capsys.readouterr().out
    assert not any(line.startswith("method.") for line in out.splitlines())
    assert "methods.clora.rank" in out
    assert "compared by default: joint" in out


def test_prepare_says_when_nothing_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "glyphs"]) == 0
    assert "nothing to prepare" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_and_closed_stdout() -> None:
    command = [sys.executable, "-m", "dualcl.benchmark.cli", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd="/")
    assert done.returncode == 2
    assert done.stderr == "dualcl: error: standard output: No space left on device\n"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 0


def test_doctor_names_versions_device_and_places(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert code == ("BROKEN" in out)
    for word in ("torch 2", "cpu:", "dualcl:", "working directory", "torchvision"):
        assert word in out
