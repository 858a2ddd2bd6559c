"""Start-up, lists, wrong usage and exit codes: everything that needs no model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.cli import doctor, main
from dualcl.benchmark.cli.options import LISTS
from dualcl.benchmark.config.presets import load_preset
from dualcl.benchmark.models import bundled
from dualcl.datasets import available_datasets
from dualcl.methods import available_methods

# a module set to None cannot be imported
BLOCKED = """
import sys
for name in ("torch", "torchvision", "timm", "diffusers", "transformers", "matplotlib", "pandas", "numpy", "scipy"):
    sys.modules[name] = None
from dualcl.benchmark.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "args",
    [
        *(["--help"], ["--version"], ["run", "--help"], ["compare", "--help"], ["report", "--help"]),
        *(["list"], ["list", "published"]),
    ],
)
def test_light_commands_import_nothing_heavy_and_start_fast(args: list[str], starts: Callable[..., Any]) -> None:
    done, times = starts(BLOCKED, *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    assert times < 5, f"{times:.1f} starts of Python"


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
    assert main(["list", "--all"]) == 0
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
        (["run", "glyphs", "clora", "--seed", "-1"], "from 0 to"),
        (["run", "glyphs", "clora", "--seed", "1", "--set", "seed=2"], "--seed"),
        (["run", "nowhere.yaml", "clora"], "does not exist"),
        (["run", "glyphs"], "METHOD"),
        (["compare", "glyphs", "--methods", "clora,clora"], "'clora' twice"),
        (["compare", "glyphs", "--methods", "clora,,lora"], "empty entry"),
        (["compare", "glyphs", "--methods", "clora,lroa"], "'lora'"),
        (["compare", "glyphs", "--seeds", "0,1,00"], "0 twice"),
        (["compare", "glyphs", "--seeds", "0,x"], "'x'"),
        (["compare", "glyphs", "--seeds", "0,1000000000000001"], "from 0 to 10^15"),
        (["compare", "glyphs", "--seeds", "9" * 5000], "from 0 to 10^15"),
        (["compare", "glyphs", "--seeds", "0", "--set", "seed=1"], "--seeds"),
        (["compare", "glyphs", "--format", "pdf"], "'pdf'"),
        (["compare", "glyphs", "--jobs", "0"], "from 1 on"),
        (["compare", "glyphs", "--meth", "lora"], "--meth"),
        (["sweep", "glyphs", "ncm"], "no search space for ncm"),
        (["sweep", "glyphs", "clora", "--set", "method.lr=1e-3"], "the search space of preset glyphs and by --set"),
        (["sweep", "glyphs", "clora", "--set", "data.holdout=0"], "a sweep never does"),
        (["sweep", "glyphs", "clora", "--over", "data.holdout=0,0.2"], "different data"),
        (["sweep", "glyphs", "clora", "--over", "data.classes=4,8"], "--over data.classes would measure"),
        (["sweep", "glyphs", "clora", "--over", "data={classes: 4},{classes: 8}"], "different data"),
        (["sweep", "glyphs", "clora", "--over", "stream.tasks=2,4"], "fix it with --set stream.tasks="),
        (["sweep", "portraits-tune", "clora", "--over", "eval.n=2,4"], "in different ways"),
        (["sweep", "glyphs", "clora", "--on-test"], "--on-test"),
        (["sweep", "concept-folder", "clora"], "set data.validation=N here and in every run"),
        (["sweep", "glyph-concepts", "clora", "--set", "data.skip=3"], "number 1 to 10"),
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
    (line,) = captured.err.splitlines()
    assert line.startswith("dualcl: error: ")
    assert hint in line


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "the following arguments are required: COMMAND; see dualcl --help"),
        (["--nope"], "the following arguments are required: COMMAND; see dualcl --help"),
        (["run", "glyphs"], "the following arguments are required: METHOD; see dualcl run --help"),
        (
            ["run", "glyphs", "ncm", "--seed", "-1"],
            "argument --seed: wants a whole number from 0 to 10^15, got '-1'; see dualcl run --help",
        ),
        (
            ["run", "glyphs", "ncm", "--seed", "99999999999999999999"],
            "argument --seed: wants a whole number from 0 to 10^15, got '99999999999999999999'; see dualcl run --help",
        ),
        (["run", "glyphs", "ncm", "--sead", "1"], "unrecognized arguments: --sead 1; see dualcl run --help"),
        (
            ["generate", "x", "--prompt", "y", "--seed", "9223372036854775808"],
            "argument --seed: wants a whole number from 0 to 2^63 - 1, got '9223372036854775808'; "
            "see dualcl generate --help",
        ),
        (["bench", "step", "--nope"], "unrecognized arguments: --nope; see dualcl bench step --help"),
        (
            ["generate", "x", "--prompt", "y", "-n", "0"],
            "argument -n: wants a whole number from 1 on, got '0'; see dualcl generate --help",
        ),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_help(
    args: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"dualcl: error: {line}\n")


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


def test_show_tells_the_order_and_draws_next_to_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualcl.datasets import renditions

    drawn: list[int] = []
    draw = renditions._draw_class

    def counted(name: str, part: str, count: int, *rest: Any) -> Any:
        drawn.append(count)
        return draw(name, part, count, *rest)

    monkeypatch.setattr(renditions, "_draw_class", counted)
    assert main(["show", "renditions-10", "ncm", "--set", "data.holdout=0.2", "data.limit=20"]) == 0
    assert "  task 1 (2): anchor, rook\n" in capsys.readouterr().out
    assert drawn == [1] * 40


def test_show_without_method_says_who_tuned_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "imagenet-r-20", "--set", "methods.clora.lambda=3", "methods.l2p.top_k=2"]) == 0
    out = capsys.readouterr().out
    assert not any(line.startswith("method.") for line in out.splitlines())
    assert "compared by default: joint" in out
    table = out[out.index("tuned by") : out.index("search spaces")]
    rows = {line.split()[0]: line for line in table.splitlines()[1:] if line}
    assert set(load_preset("imagenet-r-20").compare) <= set(rows)
    assert "lambda_=3.0 " in rows["clora"]
    assert "rank=64" in rows["clora"]
    assert "--set method.lambda_; the rest: InfLoRA's comparison (arXiv 2404.00228)" in rows["clora"]
    assert "top_k=2" in rows["l2p"]
    assert rows["l2p"].endswith("--set method.top_k; the rest: public CODA-Prompt code")
    assert rows["linear_probe"].split(None, 2)[1:] == ["-", "not tuned: code default"]
    assert "search spaces, 6 points each (dualcl sweep imagenet-r-20 METHOD)" in out
    assert "clora              method.lr=5e-4,1e-3 x method.lambda_=0.05,0.5,5.0" in out


def test_show_of_a_method_says_who_tuned_it_and_what_a_sweep_would_try(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "glyph-concepts", "ewc"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "method: ewc",
        "tuned by: dualcl sweep, 3 points of lambda_, 1 seed, 5 other pictographs",
        "search space: method.lr=1e-3,4e-3 x method.lambda_=1e3,1e5,1e7",
    ]
    assert main(["show", "glyphs", "ncm", "--set", "method.metric=euclidean"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["tuned by: --set method.metric; the rest: nothing to tune", "search space: none, give --over"]


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


def test_doctor_finds_what_is_damaged_or_missing_of_the_bundled_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "bundled"
    shutil.copytree(bundled.BUNDLED, copy)
    for place in (bundled, doctor):
        monkeypatch.setattr(place, "BUNDLED", copy)

    def broken() -> list[str]:
        return [finding.text for finding in doctor.examine() if finding.topic == "model" and finding.broken]

    assert broken() == []
    unet = copy / "portraits_diffusion" / "unet" / "diffusion_pytorch_model.safetensors"
    blob = bytearray(unet.read_bytes())
    blob[-1] ^= 1
    unet.write_bytes(blob)
    (copy / "portraits_judge" / "model.safetensors").unlink()
    (copy / "renditions_vit.json").unlink()
    assert broken() == [
        "renditions-vit is missing: the default presets cannot run",
        "portraits-diffusion: portraits_diffusion/unet/diffusion_pytorch_model.safetensors is damaged "
        "(its checksum differs)",
        "portraits-judge: portraits_judge/model.safetensors is missing",
    ]
    (copy / "portraits_judge" / "card.json").write_text("{")
    assert ["cannot be read" in text for text in broken()] == [True]


@pytest.mark.parametrize(
    ("what", "shown", "kept"),
    [
        ("presets", "renditions-10", {"glyphs", "glyphs-10"}),
        ("presets", "portraits-10", {"glyph-concepts", "glyph-concepts-quick"}),
        ("datasets", "renditions", {"glyphs"}),
        ("datasets", "portraits", {"glyph-concepts"}),
        ("backbones", "renditions-vit", {"glyph-vit"}),
        ("models", "portraits-diffusion", {"glyph-diffusion"}),
    ],
)
def test_what_is_kept_for_tests_is_listed_when_asked_for(
    what: str, shown: str, kept: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = []
    for more in ([], ["--all"]):
        assert main(["list", what, *more]) == 0
        names.append({line.split()[0] for line in capsys.readouterr().out.splitlines()})
    assert shown in names[0]
    assert not names[0] & kept
    assert names[1] >= names[0] | kept
