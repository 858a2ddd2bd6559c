"""`dualcl bench classification` on a tiny, real ViT: both sides' works, and the command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dualcl.benchmark.cli import main
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.speed import classification as bench_classification
from dualcl.benchmark.speed.pairs import OURS, PEERS, Comparison, Side
from dualcl.benchmark.speed.worker import load_adapter

BATCH, DEPTH = 4, 5
TINY = ["--backbone", "vit_tiny_patch16_224", "--image-size", "32", "--batch", str(BATCH), "--device", "cpu"]
TINY += ["--set", "backbone.kwargs.patch_size=16", "--set", f"backbone.kwargs.depth={DEPTH}"]
TINY += ["--set", "backbone.kwargs.embed_dim=32", "--set", "backbone.kwargs.num_heads=2", "--threads", "1"]
TINY += ["--set", "methods.clora.rank=2", "--set", "methods.coda_prompt.pool=20"]
Works = Mapping[str, Callable[[], float]]


def arguments(module: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([*TINY, *words])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Comparison]:
    folder = tmp_path_factory.mktemp("inputs")
    found = bench_classification.comparisons(arguments(bench_classification), folder)
    assert len({c.name for c in found}) == len(found)
    return {c.name: c for c in found}


def made(side: Side) -> Works:
    """The works of a side, in this process."""
    works: Works = load_adapter(PEERS / f"{side.adapter}.py").make({**side.setup, "device": "cpu", "threads": 1})
    assert side.work in works
    return works


def test_every_peer_is_timed_in_the_works_that_its_adapter_has(rows: dict[str, Comparison]) -> None:
    assert {c.peer.peer for c in rows.values()} == {"coda_prompt", "pilot", "timm", "peft", OURS}
    for method in bench_classification.LABELS:
        for peer in bench_classification.SOURCES:
            assert {f"{kind}-{method}-{peer}" for kind in ("step", "step_low", "eval", "eval_later")} <= set(rows)
    assert all(c.ours.setup["batch"] == c.peer.setup["batch"] for c in rows.values())
    theirs = [c.peer.setup["weights"] for c in rows.values() if c.peer.peer != OURS]
    assert all(f'backbone.weights="{theirs[0]}"' in c.ours.setup["sets"] for c in rows.values())
    assert set(theirs) == {theirs[0]}


@pytest.mark.parametrize("method", bench_classification.LABELS)
def test_ours_does_a_unit_of_every_work(rows: dict[str, Comparison], method: str) -> None:
    side = rows[f"step-{method}-coda_prompt"].ours
    works = made(side)
    start = load_file(side.setup["start"])
    assert start["head.weight"].shape == (bench_classification.CLASSES_PER_TASK, 32)
    assert start["prompts"].shape[0] == len(bench_classification.BLOCKS[method]["expert"])
    first = works["loss"]()
    assert works["step"]() == works["fetched_step"]() == BATCH
    assert works["loss"]() != first  # the steps learnt something
    assert works["first_evaluation"]() == works["later_evaluation"]() == 2 * BATCH


def test_penalty_is_timed_where_there_is_one(rows: dict[str, Comparison]) -> None:
    assert made(rows["l_forget-share"].ours)["penalty"]() == BATCH
    with pytest.raises(ValueError, match="clora has no penalty at task 1"):
        made(rows["clora-peft"].ours)["penalty"]()


def changed_by_a_step(side: Side, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the weights that a step of a peer changes."""
    adapter = load_adapter(PEERS / f"{side.adapter}.py")
    models: list[Any] = []
    monkeypatch.setattr(adapter, "build", lambda setup, build=adapter.build: models.append(build(setup)) or models[0])
    works = adapter.make({**side.setup, "device": "cpu", "threads": 1})
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    assert works["step"]() == BATCH
    assert works["step"]() == BATCH  # the first step of peft's second factor has no gradient
    return {name for name, p in models[0].named_parameters() if not torch.equal(p, before[name])}


def test_peers_train_what_they_are_said_to_train(rows: dict[str, Comparison], monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"head.weight", "head.bias"}
    sites = {f"blocks.{i}.attn.qkv" for i in range(DEPTH)}
    assert changed_by_a_step(rows["clora-full"].peer, monkeypatch) == {f"{s}.weight" for s in sites} | head
    lora = changed_by_a_step(rows["clora-peft"].peer, monkeypatch)
    assert lora == {f"{s}.lora_{factor}.default.weight" for s in sites for factor in "AB"} | head


def test_bare_pass_reaches_the_first_block_and_no_weight(
    rows: dict[str, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    side = rows["clora-bare"].peer
    adapter = load_adapter(PEERS / f"{side.adapter}.py")
    models: list[Any] = []
    monkeypatch.setattr(adapter, "build", lambda setup, build=adapter.build: models.append(build(setup)) or models[0])
    works = adapter.make({**side.setup, "device": "cpu", "threads": 1})
    entered: list[torch.Tensor] = []
    models[0].blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    assert works["pass"]() == BATCH
    assert entered[0].grad is not None
    assert entered[0].grad.count_nonzero() > 0
    assert all(p.grad is None for p in models[0].parameters())


def test_command_measures_ours_in_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.py"
    other.write_text("def make(setup):\n    return {'pass': lambda: 4}\n", encoding="utf-8")
    words = ["--quantities", "clora-bare", "--adapter", f"timm={other}", "--repeats", "1", "--format", "json"]
    assert main(["bench", "classification", *TINY, *words]) == 0
    value = json.loads(capsys.readouterr().out)
    (row,) = value["rows"]
    assert row["ratio"] > 1  # the other side does nothing
    assert row["met"] is False
    assert (value["device"], value["threads"], value["setup"]["batch"]) == ("cpu", 1, BATCH)
    assert value["peers"]["timm"]["adapter"] == "the user's own"
    assert "--adapter timm=FILE" in value["command"]


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--set", "stream.tasks=3"], "stream.tasks"),
        (["--set", "methods.clora.rnk=3"], "clora.rank"),
        (["--backbone", "vit_tny"], "vit_tny"),
    ],
)
def test_mistakes_are_named(words: list[str], culprit: str) -> None:
    with pytest.raises(UserError, match=culprit):
        bench_classification.main(arguments(bench_classification, *words))
