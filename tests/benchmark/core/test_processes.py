"""One run on two processes (gloo, CPU) is the run on one; shares, micro-batches, out of memory, stopping."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from dualcl.benchmark.core.processes import ALONE, Processes
from dualcl.methods import available_methods, method_class, method_info

pytest.importorskip("accelerate", reason="several processes need the extra `multi`")


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


runs = _module("process_runs")

#: at the first step of a task its gradient is zero but for rounding, of which Adam makes a whole step: another number
#: of threads changes its losses as much as another number of processes
CHAOTIC = {"lwf_mc"}
#: one of each kind; the `slow` tests take all that are registered
CLASSIFIERS = ("clora", "coda_prompt", "er", "ewc", "l2p", "lwf_mc", "ncm")
CUSTOMIZERS = ("clora", "custom_diffusion", "ewc", "generative_replay")


def _others(domain: str, tested: tuple[str, ...], requests: bool = False) -> list[str]:
    served = [m for m in available_methods() if domain in method_info(m).domains and m not in tested]
    return sorted(m for m in served if ("requests" in method_class(m).requires) == requests)


def _both(preset: str, methods: Sequence[str], out: Path, sets: Sequence[str] = ()) -> None:
    for n in (1, 2):
        runs.do(n, [runs.Job(preset, methods, str(out / str(n)), sets)])


# --- two processes ----------------------------------------------------------------------------------------------------

# 7 of 15 or 10 images a step: whole batches, and one of 1 or 3 rows; evaluations of 9 and 6 images in batches of 4
TINY = ("train.batch_size=7", "eval.batch_size=4")
KEPT = (*TINY, "train.checkpoint_seconds=0")
RESUMED = ("clora", "l2p")


@pytest.fixture(scope="module")
def concepts_preset(save_tiny_sd: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two concepts on a tiny Stable Diffusion; batches of 3 and of 3 + 3 with prior images, 3 images in twos."""
    folder = tmp_path_factory.mktemp("sd")
    model = save_tiny_sd(folder / "model", (8, 8))
    file = folder / "concepts.yaml"
    file.write_text(
        f"""
domain: customization
data: {{name: glyph-concepts, concepts: 2, per_concept: 3}}
base: {{model: "{model}"}}
train: {{epochs: 1, steps: 3, batch_size: 3, checkpoint_seconds: 0}}
eval: {{n: 3, steps: 2, batch_size: 2, guidance: 2.0, features: glyph-vit}}
prior: {{n: 3, steps: 2, guidance: 1.0}}
threads: 1
methods:
  lora: {{rank: 2}}
  clora: {{rank: 2}}
  orthogonal_adaptation: {{rank: 2}}
  mix_of_show: {{rank: 2}}
  clora_null: {{rank: 2}}
  loraclr: {{rank: 2}}
  encoder: {{encoder: untrained}}
  cidm: {{rank: 2}}
  lora_merge: {{rank: 2}}
  stamina: {{rank: 2}}
  ewc_dc: {{rank: 2, fisher_batches: 1}}
  dsc: {{rank: 2}}
  custom_diffusion_merge: {{captions: 60}}
  generative_replay: {{per_concept: 3}}
"""
    )
    return str(file)


@pytest.fixture(scope="module")
def done(tiny_preset: str, concepts_preset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in classified/ and customized/, below 1/ and 2/ by the number of processes, and stopped ones in stopped/.

    All of two processes in one start of them, which takes longer than the runs.
    """
    out = tmp_path_factory.mktemp("runs")
    for n in (1, 2):
        jobs = [
            runs.Job(tiny_preset, CLASSIFIERS, f"{out}/{n}/classified", TINY),
            runs.Job(concepts_preset, CUSTOMIZERS, f"{out}/{n}/customized"),
            runs.Job(tiny_preset, RESUMED, f"{out}/{n}/stopped", KEPT, "task 2, step 1"),
        ]
        runs.do(n, jobs)
    return out


def _classified_alike(one: Path, two: Path, method: str) -> None:
    found = runs.difference(one / method, two / method)
    assert found.predictions == 9 + (9 + 6) + (9 + 6 + 6) or method == "joint"  # each test image once per evaluation
    if method not in CHAOTIC:
        assert found.loss <= 1e-5
        assert found.differing == 0
        assert found.matrix == 0


@pytest.mark.parametrize("method", CLASSIFIERS)
def test_two_processes_classify_as_one_does(done: Path, method: str) -> None:
    _classified_alike(done / "1" / "classified", done / "2" / "classified", method)


@pytest.mark.slow
def test_two_processes_classify_as_one_does_with_every_method(tiny_preset: str, tmp_path: Path) -> None:
    methods = _others("classification", CLASSIFIERS)
    _both(tiny_preset, methods, tmp_path, TINY)
    for method in methods:
        _classified_alike(tmp_path / "1", tmp_path / "2", method)


def _customized_alike(one: Path, two: Path, method: str) -> None:
    found = runs.difference(one / method, two / method)
    assert found.loss <= 1e-5
    assert found.pixels <= 1
    assert found.matrix <= 5e-3  # features of images that differ by that


@pytest.mark.parametrize("method", CUSTOMIZERS)
def test_two_processes_customize_as_one_does(done: Path, method: str) -> None:
    _customized_alike(done / "1" / "customized", done / "2" / "customized", method)


@pytest.mark.slow
def test_two_processes_customize_as_one_does_with_every_method(concepts_preset: str, tmp_path: Path) -> None:
    methods = _others("customization", CUSTOMIZERS)
    _both(concepts_preset, methods, tmp_path)
    for method in methods:
        _customized_alike(tmp_path / "1", tmp_path / "2", method)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", "select=0.2,project=2", "merge=true,l2=1"])
def test_two_processes_unlearn_as_one_does(concepts_preset: str, tmp_path: Path, how: str) -> None:
    text = Path(concepts_preset).read_text()
    learnt = "data: {name: glyph-concepts, concepts: 2, per_concept: 3}"
    assert learnt in text
    asked = (
        'data: {name: unlearn-prompts, requests: ["umbrella = symbol", "cat = house"], keep: [sun], retained: [heart]}'
    )
    preset = tmp_path / "requests.yaml"
    preset.write_text(text.replace(learnt, asked))
    methods = _others("customization", (), requests=True)
    _both(str(preset), methods, tmp_path, [f"method.{one}" for one in how.split(",") if one])
    for method in methods:
        _customized_alike(tmp_path / "1", tmp_path / "2", method)


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(done: Path, tiny_preset: str, first: int, then: int) -> None:
    stopped = done / str(first) / "stopped"
    assert (stopped / "l2p" / "checkpoints" / "partial").is_dir()
    runs.do(then, [runs.Job(tiny_preset, RESUMED, str(stopped), KEPT)])
    assert not (stopped / "l2p" / "checkpoints" / "partial").is_dir()
    for method in RESUMED:
        found = runs.difference(done / "1" / "classified" / method, stopped / method)
        assert found.loss <= 1e-5
        assert found.matrix == 0


def test_two_processes_of_the_command_line(tiny_preset: str, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "dualcl.benchmark.cli", "run", tiny_preset, "lora", "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, "--set", "device=cpu"], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("lora") == 1  # one process speaks
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["environment"]["processes"] == 2


def test_a_launcher_is_for_run_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dualcl.benchmark.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", "glyphs"]) == 2
    assert "started 2 processes" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_a_partition(n: int, count: int) -> None:
    found, items = [], []
    for index in range(count):
        processes = Processes()
        processes.index, processes.count = index, count
        rows = range(n)[processes.rows(n)]
        assert n // count <= len(rows) <= n // count + 1
        found += list(rows)
        items += list(processes.mine(range(n)))
    assert found == list(range(n))
    assert sorted(items) == list(range(n))


def test_alone_is_as_if_there_were_no_processes() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    ALONE.average([weight])
    assert weight.grad.tolist() == [1.0, 2.0, 3.0]
    assert ALONE.together(iter([3, 1])) == [3, 1]
    assert ALONE.from_main(lambda: 5) == 5
    assert not ALONE.any(False)
    assert ALONE.any(True)
    ALONE.check_equal([weight], "weights")


# --- micro-batches and memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["clora", "coda_prompt", "er", "ewc", "l2p"])
def test_micro_batches_change_nothing(done: Path, tiny_preset: str, tmp_path: Path, method: str) -> None:
    runs.do(1, [runs.Job(tiny_preset, [method], str(tmp_path), (*TINY, "train.micro_batch_size=3"))])
    found = runs.difference(done / "1" / "classified" / method, tmp_path / method)
    assert found.loss <= 1e-5
    assert found.differing == 0


@pytest.mark.parametrize("method", ["clora", "custom_diffusion"])
def test_micro_batches_of_concepts(done: Path, concepts_preset: str, tmp_path: Path, method: str) -> None:
    runs.do(1, [runs.Job(concepts_preset, [method], str(tmp_path), ("train.micro_batch_size=2",))])
    found = runs.difference(done / "1" / "customized" / method, tmp_path / method)
    assert found.loss <= 1e-5
    assert found.pixels <= 1


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator fails for more than two images at once in a pass that is learnt from."""
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer.forward_features

    def short_of_memory(self: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and len(images) > 2:
            torch.empty(2**60)
        return network(self, images)

    monkeypatch.setattr(VisionTransformer, "forward_features", short_of_memory)


@pytest.mark.parametrize("method", ["clora", "er", "l2p"])
def test_a_step_out_of_memory_is_taken_again(
    scarce: None, done: Path, tiny: Callable[..., Any], tiny_preset: str, tmp_path: Path, method: str
) -> None:
    runs.do(1, [runs.Job(tiny_preset, [method], str(tmp_path), (*TINY, "train.on_oom=split"))])
    found = runs.difference(done / "1" / "classified" / method, tmp_path / method)
    assert found.loss <= 1e-5
    assert found.differing == 0


def test_out_of_memory_names_the_mend(
    scarce: None, tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dualcl.benchmark.core.errors import UserError
    from dualcl.benchmark.runs.runner import run

    with pytest.raises(UserError, match=r"out of memory on cpu.*train\.micro_batch_size below 7"):
        run(tiny("clora", "device=cpu", *TINY), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "failed"
    assert "out of memory" in record["error"]
    assert run(tiny("clora", "device=cpu", *TINY, "train.on_oom=split"), tmp_path / "run")["status"] == "finished"


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_the_first_signal_waits_and_the_second_does_not() -> None:
    from dualcl.benchmark.runs.stopping import Stop

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stopped_run_keeps_its_last_step(tiny: Callable[..., Any], tmp_path: Path) -> None:
    from dualcl.benchmark.runs.progress import Reporter
    from dualcl.benchmark.runs.runner import run
    from dualcl.results.records import comparable

    class Impatient(Reporter):
        def step(self, step: int, loss: float) -> None:
            signal.raise_signal(signal.SIGINT)

    whole = run(tiny("clora"), tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stops = 0
        while True:
            try:
                record = run(tiny("clora"), tmp_path / "run", Impatient(quiet=True))
                break
            except KeyboardInterrupt:
                stops += 1
                left = json.loads((tmp_path / "run" / "record.json").read_text())
                assert left["status"] == "interrupted"
    finally:
        signal.signal(signal.SIGINT, before)
    assert stops == sum(task["steps"] for task in whole["tasks"])  # each call takes one step and keeps it
    assert comparable(record) == comparable(whole)
