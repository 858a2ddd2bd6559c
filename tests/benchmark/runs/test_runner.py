"""The task loop's parts: schedules, optimisers and their state, clipping, counts, and what a record says."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dualcl.benchmark.cli import main
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core import machine
from dualcl.benchmark.core.errors import RunFailed, UserError
from dualcl.benchmark.core.machine import environment
from dualcl.benchmark.core.settings import TrainConfig
from dualcl.benchmark.domains.classification import Classification, StreamConfig
from dualcl.benchmark.runs.folder import RunFolder
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.restore import recorded_config
from dualcl.benchmark.runs.runner import Run, run
from dualcl.benchmark.runs.step import load_optimizer, lr_factor, make_optimizer, optimizer_tensors
from dualcl.methods import available_methods, method_class
from dualcl.methods.base import ParamGroup
from dualcl.results.metrics import run_metrics
from dualcl.results.records import comparable, load_record, run_row
from dualcl.results.report import build_report
from dualcl.results.tables import summarise

CPU = torch.device("cpu")

# 4 classes x 5 images in 2 tasks, batches of 4: 3 steps an epoch (4 + 4 + 2 images)
PRESET = """
domain: classification
data: {name: glyphs, train_per_class: 5, test_per_class: 3, classes: 4}
stream: {tasks: 2}
backbone:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {img_size: 32, patch_size: 16, depth: 2, embed_dim: 32, num_heads: 2}
train: {epochs: 2, batch_size: 4, log_every: 1}
input: {workers: 0}
methods: {clora: {rank: 3}, ranpac: {width: 100}, moal: {width: 100}}
threads: 1
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("runner") / "tiny.yaml"
    file.write_text(PRESET)
    return str(file)


@pytest.fixture(scope="module")
def made(preset: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], Path]]:
    """made(method, *sets) -> (record, folder) of a finished run, made once."""
    place = tmp_path_factory.mktemp("runs")
    done: dict[Any, tuple[dict[str, Any], Path]] = {}

    def make(method: str, *sets: str) -> tuple[dict[str, Any], Path]:
        if (method, sets) not in done:
            out = place / str(len(done))
            done[method, sets] = (run(resolve(preset, method, sets), out), out)
        return done[method, sets]

    return make


# --- schedules --------------------------------------------------------------------------------------------------------


def test_cosine_goes_from_one_to_nearly_zero_per_step() -> None:
    train = TrainConfig(epochs=5, schedule="cosine")
    factors = [lr_factor(train, step, 4) for step in range(20)]
    assert factors[0] == 1
    assert factors[10] == pytest.approx(0.5)
    assert factors == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 20) for step in range(20)])
    assert all(a > b > 0 for a, b in itertools.pairwise(factors))


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_coda_schedule_is_constant_within_an_epoch(epochs: int) -> None:
    train = TrainConfig(epochs=epochs, schedule="coda")
    factors = [lr_factor(train, step, 3) for step in range(3 * epochs)]
    assert factors[::3] == factors[1::3] == factors[2::3]
    # cos(99 pi e / (200 (E - 1))) for e = 0, 0, 1, ..., E - 2: the public scheduler is an epoch late
    late = [0, *range(epochs - 1)]
    assert factors[::3] == pytest.approx([math.cos(99 * math.pi * e / (200 * max(epochs - 1, 1))) for e in late])
    assert factors[-1] == pytest.approx(1.0 if epochs <= 2 else math.cos(0.495 * math.pi * 48 / 49))


def test_milestones_are_epochs_after_which_the_rate_is_a_tenth() -> None:
    train = TrainConfig(epochs=5, schedule="milestones", milestones=(2, 4))
    factors = [lr_factor(train, step, 3) for step in range(15)]
    assert factors == pytest.approx([1.0] * 6 + [0.1] * 6 + [0.01] * 3)
    for wrong in ({"schedule": "milestones"}, {"milestones": (2,)}):
        with pytest.raises(
            UserError, match=r"train\.schedule=milestones and train\.milestones=EPOCH,\.\.\. go together"
        ):
            TrainConfig(**wrong)


def test_constant_schedule() -> None:
    assert {lr_factor(TrainConfig(epochs=3, schedule="constant"), step, 2) for step in range(6)} == {1.0}


# --- optimisers -------------------------------------------------------------------------------------------------------


def groups() -> list[ParamGroup]:
    a, b, c = (nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 4, 5))
    return [ParamGroup("own", [a, b], 0.1, 0.5), ParamGroup("none", [], 9.0), ParamGroup("outputs", [c], 0.2)]


@pytest.mark.parametrize(
    ("name", "cls"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_make_optimizer(name: Any, cls: type[torch.optim.Optimizer]) -> None:
    optimizer = make_optimizer(TrainConfig(optimizer=name), groups(), CPU)
    assert type(optimizer) is cls
    assert [(g["lr"], g["base_lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.1, 0.1, 0.5),
        (0.2, 0.2, 0.0),
    ]
    expected = {"momentum": 0.9} if name == "sgd" else {"betas": (0.9, 0.999)}
    assert all(g[k] == v for g in optimizer.param_groups for k, v in expected.items())


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        p.grad = torch.cos(torch.arange(p.numel()) * (number + 1.5) + i)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] / (number + 1)
    optimizer.step()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizer_state_survives_a_checkpoint_bit_for_bit(tmp_path: Path, name: Any) -> None:
    train = TrainConfig(optimizer=name)
    straight = groups()
    optimizer = make_optimizer(train, straight, CPU)
    for number in range(3):
        step(optimizer, number)
    folder = RunFolder(tmp_path)
    weights = {f"w{i}": p for i, p in enumerate(p for g in straight for p in g.params)}
    folder.save_checkpoint("partial", {**weights, **optimizer_tensors(optimizer)}, {})
    for number in range(3, 6):
        step(optimizer, number)

    resumed = groups()
    found = folder.load_checkpoint("partial")
    assert found is not None
    with torch.no_grad():
        for i, p in enumerate(p for g in resumed for p in g.params):
            p.copy_(found[0][f"w{i}"])
    again = make_optimizer(train, resumed, CPU)
    load_optimizer(again, found[0])
    for number in range(3, 6):
        step(again, number)
    for a, b in zip(straight, resumed, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.params, b.params, strict=True))
    assert optimizer_tensors(again).keys() == optimizer_tensors(optimizer).keys() != set()
    assert all(torch.equal(v, optimizer_tensors(optimizer)[k]) for k, v in optimizer_tensors(again).items())


def test_an_optimizer_that_took_no_step_has_no_state() -> None:
    optimizer = make_optimizer(TrainConfig(), groups(), CPU)
    assert optimizer_tensors(optimizer) == {}
    load_optimizer(optimizer, {"method.x": torch.ones(1)})
    assert optimizer_tensors(optimizer) == {}


@pytest.mark.parametrize("clip", [None, 0.01])
def test_grad_clip_bounds_the_norm_of_all_gradients_together(preset: str, tmp_path: Path, clip: float | None) -> None:
    sets = [
        f"train.grad_clip={'null' if clip is None else clip}",
        "train.optimizer=sgd",
        "method.lr=1",
        "method.head_lr=1",
    ]
    work = Run(resolve(preset, "clora", sets), RunFolder(tmp_path), Reporter(quiet=True))
    trained = work.groups(work.begin(0))
    params = [p for g in trained for p in g.params]
    before = [p.detach().clone() for p in params]
    optimizer = make_optimizer(work.train, trained, CPU)
    work.step(next(iter(work.domain.batches(0, 0))), optimizer, 0.5, "here")
    moved = math.sqrt(sum(float((p.detach() - old).square().sum()) for p, old in zip(params, before, strict=True)))
    # the first step of SGD is lr * factor * gradient
    if clip is None:
        assert moved > 0.5 * 0.01 * 1.5
    else:
        assert moved == pytest.approx(0.5 * clip, rel=1e-3)


# --- what a run records -----------------------------------------------------------------------------------------------


def test_counts_of_clora_by_hand(made: Callable[..., Any]) -> None:
    record, _ = made("clora")
    width, depth, rank, classes = 32, 2, 3, 2
    # patches of 16 px: 3 * 16 * 16 inputs and a bias; a class token; 1 + 4 positions; a last norm
    blocks = depth * (2 * 2 * width + (width + 1) * 3 * width + (width + 1) * width + 2 * 4 * width * width + 5 * width)
    network = (3 * 16 * 16 + 1) * width + width + 5 * width + blocks + 2 * width
    assert record["network"]["parameters"] == network
    factors = depth * 3 * rank * (width + width)  # Q, K and V of each block
    head = classes * (width + 1)
    assert [t["parameters_trained"] for t in record["tasks"]] == [factors + head] * 2
    # after one task the factors are smaller than a delta; two tasks' factors still are: 2 * 3 * 64 < 32 * 32
    assert [t["parameters_stored"] for t in record["tasks"]] == [factors + head, 2 * factors + 2 * head]
    metrics = run_metrics(record)
    assert metrics["N_train"] == pytest.approx(100 * (factors + head) / network)
    assert metrics["N_store"] == pytest.approx(100 * (2 * factors + 2 * head) / network)


def test_stored_parameters_stop_growing_at_one_delta_per_site(made: Callable[..., Any]) -> None:
    record, _ = made("clora", "method.rank=12")
    sites, head = 2 * 3, 2 * 33
    assert [t["parameters_stored"] for t in record["tasks"]] == [
        sites * 12 * 64 + head,  # 768 numbers in the factors of a site
        sites * 32 * 32 + 2 * head,  # 1024 in its delta, 1536 in two tasks' factors
    ]


def test_finetune_counts_the_whole_network(made: Callable[..., Any]) -> None:
    record, _ = made("finetune")
    network, head = record["network"]["parameters"], 2 * 33
    # its loss is over all classes seen, so the rows of earlier tasks are trained too
    assert [t["parameters_trained"] for t in record["tasks"]] == [network + head, network + 2 * head]


def test_log_and_final_loss(made: Callable[..., Any]) -> None:
    record, folder = made("clora")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(e["task"], e["step"], e["epoch"]) for e in log] == [(t, s, s // 3) for t in range(2) for s in range(6)]
    for task in record["tasks"]:
        last = [e["loss"] for e in log if e["task"] == task["task"] and e["epoch"] == 1]
        assert task["final_loss"] == sum(last) / 3
        assert task["steps"] == 6
    assert [e["lr_factor"] for e in log[:6]] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * s / 6) for s in range(6)])
    # nothing to protect; then an update that is zero until the classifier's rows, which start at zero, have moved
    assert all(e["penalty"] == 0 for e in log[:8])
    assert all(e["penalty"] > 0 for e in log[8:])


def test_log_every(made: Callable[..., Any]) -> None:
    _, folder = made("clora", "train.log_every=4")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(e["task"], e["step"]) for e in log] == [(0, 0), (0, 4), (1, 0), (1, 4)]
    assert comparable(made("clora")[0])["tasks"] == made("clora", "train.log_every=4")[0]["tasks"]


def test_measured_and_environment(made: Callable[..., Any]) -> None:
    record, folder = made("clora")
    measured = record["measured"]
    assert [t["task"] for t in measured["tasks"]] == [0, 1]
    assert all(t["train_seconds"] > 0 and t["eval_seconds"] > 0 and t["peak_mib"] > 10 for t in measured["tasks"])
    assert measured["wall_seconds"] == sum(t["train_seconds"] + t["eval_seconds"] for t in measured["tasks"])
    found = record["environment"]
    assert found == {**environment(), "device": found["device"], "threads": 1}
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"python", "timm", "pillow", "platform", "cpus", "commit"} <= found.keys()
    # neither the machine nor the user nor a place is in the record
    assert str(folder) not in (folder / "record.json").read_text()


def test_a_record_names_every_commit_that_its_run_went_on_at(
    preset: str,
    tmp_path: Path,
    made: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    stopping: Callable[..., Any],
) -> None:
    def go(commit: str, left: int) -> list[str]:
        monkeypatch.setattr(machine, "source_state", lambda: (commit, commit == "b"))
        reporter = stopping(left)
        with contextlib.suppress(KeyboardInterrupt):
            run(resolve(preset, "clora", ["train.checkpoint_seconds=0"]), tmp_path / "run", reporter)
        return [note for note in reporter.notes if "environment" in note]

    def told() -> list[tuple[Any, ...]]:
        parts = load_record(tmp_path / "run").environments
        return [tuple(part.get(key) for key in ("commit", "dirty", "tasks", "step")) for part in parts]

    said = [go(commit, left) for commit, left in (("lost", 1), ("a", 8), ("a", 1), ("b", 3), ("c", 1), ("c", 99))]
    other = "it goes on in another environment, which its record will say: "
    assert said == [[], [], [], [f"{other}commit b (was a), dirty True (was False)"],
                    [f"{other}commit c (was b), dirty False (was True)"], []]  # fmt: skip
    # six steps a task; nothing that the first did is kept; each step is saved after the reporter heard of it
    assert told() == [("a", False, 1, 1), ("b", True, 1, 3), ("c", False, None, None)]
    record = load_record(tmp_path / "run")
    assert comparable(record)["matrix"] == comparable(made("clora")[0])["matrix"]
    assert (record.made_in("commit"), record.dirty) == (["a", "b", "c"], True)
    assert run_row(record)["commit"] == "a, b, c"
    build_report([tmp_path / "run"], tmp_path / "report", ("html",))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "commit a, until step 1 after 1 finished tasks" in page
    assert "commit b, dirty True, until step 3 after 1 finished tasks" in page
    warnings = "\n".join(summarise([tmp_path]).warnings)
    assert "mixed commits: a, b, c" in warnings
    assert "began in another environment than they ended in: clora, seed 0" in warnings
    assert "1 of 1 runs came from a working tree with uncommitted changes" in warnings


@pytest.mark.parametrize("place", ["before_tasks", "_newest", "restore"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), UserError("a damaged checkpoint"), RuntimeError("a new buffer")]
)
def test_a_resume_that_stops_early_leaves_what_was_recorded(
    preset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopping: Callable[..., Any],
    place: str,
    error: BaseException,
) -> None:
    def go(commit: str, left: int = 99) -> None:
        monkeypatch.setattr(machine, "source_state", lambda: (commit, False))
        run(resolve(preset, "lora", ["train.checkpoint_seconds=0"]), tmp_path / "run", stopping(left))

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(KeyboardInterrupt):
        go("a", 8)
    before = load_record(tmp_path / "run").data
    with monkeypatch.context() as patch:
        patch.setattr(Classification if place == "before_tasks" else Run, place, stop)
        with pytest.raises((KeyboardInterrupt, UserError, RunFailed)):
            go("b")
    after = load_record(tmp_path / "run").data
    assert after["status"] == ("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
    assert {k: v for k, v in after.items() if k not in ("status", "error", "sha256")} == {
        k: v for k, v in before.items() if k not in ("status", "error", "sha256")
    }
    go("c")
    assert load_record(tmp_path / "run").made_in("commit") == ["a", "c"]


def test_a_run_that_lacks_its_last_line_alone_was_made_where_it_was_made(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(commit: str) -> None:
        monkeypatch.setattr(machine, "source_state", lambda: (commit, False))
        run(resolve(preset, "lora", []), tmp_path / "run")

    def full(self: RunFolder, record: dict[str, Any]) -> None:
        if record["status"] == "finished":
            raise OSError("no space left")
        write(self, record)

    write = RunFolder.write_record
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_record", full)
        with pytest.raises(OSError, match="no space left"):
            go("a")
    go("b")
    record = load_record(tmp_path / "run")
    assert (record.status, record.made_in("commit")) == ("finished", ["a"])


def test_record_on_disk_and_its_metrics(made: Callable[..., Any]) -> None:
    record, folder = made("clora")
    loaded = load_record(folder)
    assert loaded.data == json.loads(json.dumps(record))
    assert (loaded.status, loaded.data["error"], loaded.n_tasks) == ("finished", None, 2)
    rows = record["matrix"]["rows"]
    assert [(r["after_task"], r["total"]) for r in rows] == [(0, [6]), (1, [6, 6])]
    share = [[c / t for c, t in zip(r["correct"], r["total"], strict=True)] for r in rows]
    metrics = loaded.metrics
    assert metrics["A_last"] == pytest.approx(100 * (share[1][0] + share[1][1]) / 2)
    assert metrics["A_avg"] == pytest.approx(100 * (share[0][0] + (share[1][0] + share[1][1]) / 2) / 2)
    assert metrics["F_step"] == metrics["F_max"] == pytest.approx(100 * (share[0][0] - share[1][0]))
    assert metrics["plasticity"] == pytest.approx(100 * (share[0][0] + share[1][1]) / 2)
    names = [name for task in record["tasks"] for name in task["classes"]]
    assert sorted(names) == sorted(record["network"]["class_names"])
    assert [(t["n_train"], t["n_test"]) for t in record["tasks"]] == [(10, 6), (10, 6)]


def test_joint_is_one_stage_over_all_tasks(made: Callable[..., Any]) -> None:
    record, folder = made("joint")
    assert record["run"]["joint"] is True
    assert [(t["task"], t["name"], t["steps"]) for t in record["tasks"]] == [(None, "all tasks", 2 * 5)]
    assert [r["after_task"] for r in record["matrix"]["rows"]] == [1]
    assert len(record["matrix"]["rows"][0]["correct"]) == 2
    metrics = load_record(folder).metrics
    assert metrics["A_last"] is not None
    assert metrics["F_max"] is None


def test_a_method_without_steps(made: Callable[..., Any]) -> None:
    record, folder = made("ncm")
    assert [(t["steps"], t["final_loss"], t["parameters_trained"]) for t in record["tasks"]] == [(0, None, 0)] * 2
    assert not (folder / "log.jsonl").exists()
    assert all(t["train_seconds"] > 0 for t in record["measured"]["tasks"])


def test_runs_repeat_and_seeds_differ(made: Callable[..., Any], preset: str, tmp_path: Path) -> None:
    first = comparable(made("clora")[0])
    again = run(resolve(preset, "clora"), tmp_path / "again")
    assert comparable(again) == first
    assert (tmp_path / "again" / "log.jsonl").read_bytes() == (made("clora")[1] / "log.jsonl").read_bytes()
    other = made("clora", "seed=1", "stream.order_seed=0")[0]
    assert other["identity"]["class_order"] == first["identity"]["class_order"]
    assert other["tasks"][0]["final_loss"] != first["tasks"][0]["final_loss"]


def test_bf16_is_another_run_that_also_ends(made: Callable[..., Any]) -> None:
    record, _ = made("clora", "precision=bf16")
    assert record["status"] == "finished"
    assert record["identity"]["precision"] == "bf16"
    assert record["tasks"][0]["final_loss"] == pytest.approx(made("clora")[0]["tasks"][0]["final_loss"], rel=0.1)


def test_in_bf16_passes_that_are_run_again_are_the_same(made: Callable[..., Any]) -> None:
    (once, a), (again, b) = (
        made("clora", "precision=bf16", *sets) for sets in ((), ("backbone.gradient_checkpointing=true",))
    )
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()
    assert once["matrix"] == again["matrix"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_cpu_steps_in_bf16_take_plain_attention(
    precision: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = []
    cls = method_class("clora")
    loss = cls.loss
    monkeypatch.setattr(
        cls, "loss", lambda *given: fused.append(torch.backends.cuda.flash_sdp_enabled()) or loss(*given)
    )
    run(resolve(preset, "clora", [f"precision={precision}"]), tmp_path / "run")
    assert set(fused) == {precision == "fp32"}
    assert torch.backends.cuda.flash_sdp_enabled()  # and is given back


# --- order and sizes of tasks -----------------------------------------------------------------------------------------


def test_tasks_of_other_sizes_and_orders_by_name(preset: str, made: Any, capsys: Any, tmp_path: Path) -> None:
    (plain, equal), (sized, folder) = made("ncm"), made("ncm", "stream.sizes=[3,1]")
    assert "task_sizes" not in plain["identity"]
    assert sized["identity"]["task_sizes"] == [3, 1]
    assert [len(t["classes"]) for t in sized["tasks"]] == [3, 1]
    names = [name for task in sized["tasks"] for name in task["classes"]]
    (tmp_path / "names.txt").write_text("\n".join(names[::-1]))
    order, sets = f"stream.class_order={tmp_path / 'names.txt'}", ["--set", "stream.sizes=[3,1]", "stream.first=null"]
    assert main(["show", preset, "ncm", *sets, order]) == 0
    shown = capsys.readouterr().out
    assert f"  task 1 (3): {', '.join(names[:0:-1])}\n  task 2 (1): {names[0]}\n" in shown
    with pytest.raises(UserError, match=r"task_sizes is None .* \[3, 1\]|task_sizes is \[3, 1\] .* None"):
        summarise([equal, folder])
    resolved = resolve(preset, "ncm", [order])
    (tmp_path / "names.txt").unlink()
    again = run(resolved, tmp_path / "named")  # the names are the configuration, not the file
    assert again["config"]["stream"]["class_order"] == names[::-1]
    assert recorded_config(again).section("stream", StreamConfig).class_order == names[::-1]
    with pytest.raises(UserError, match=r"stream\.tasks=3, but other keys of stream make 2 tasks"):
        run(resolve(preset, "ncm", ["stream.tasks=3", "stream.sizes=[3,1]"]), tmp_path / "both")


def test_defaults_of_later_keys_leave_the_hash_of_a_configuration_as_it_was(preset: str) -> None:
    resolved = resolve(preset, "ncm")
    assert {"stream.sizes", "stream.first", "stream.increment"} <= resolved.flat().keys()
    assert {k for k in resolved.flat(volatile=False) if k.startswith("stream.")} == {
        "stream.tasks", "stream.class_order", "stream.order_seed",
    }  # fmt: skip


# --- tasks of one class -----------------------------------------------------------------------------------------------

ONE = """
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from dualcl.methods.base import Method, register_method

@register_method("own", domains=("classification",), summary="x", source="x")
class Own(Method):
    requires = ("logits",)

    def loss(self, batch):
        {loss}

    def other(self, batch):
        return self.domain.loss(batch)

    def sigmoids(self, batch):
        logits = self.domain.logits(batch)
        return binary_cross_entropy_with_logits(logits, one_hot(self.domain.targets(batch), logits.shape[1]).float())
"""


@pytest.mark.parametrize("method", [m.name for m in available_methods().values() if "classification" in m.domains])
def test_a_task_of_one_class_is_learnt_or_refused_before_anything_is(method: str, preset: str, tmp_path: Path) -> None:
    cls, blocks = method_class(method), {"dualprompt": ["method.general_blocks=[0]", "method.expert_blocks=[1]"]}
    blocks |= {"coda_prompt": ["method.blocks=[0]", "method.pool=4"], "coda_prompt_small": ["method.blocks=[0]"]}
    for sets in ("stream.sizes=[3,1]", "stream.tasks=4", "data.classes=1 stream.tasks=1"):
        out = tmp_path / sets.replace("/", "")
        resolved = resolve(preset, method, [*sets.split(), "train.epochs=1", *blocks.get(method, [])])
        alone = "data.classes=1" in sets and method != "lwf_mc"  # a sigmoid needs no rival
        first_alone = method == "aper" and sets == "stream.sizes=[3,1]"
        learns = method not in ("ncm", "fecam", "ranpac") and not first_alone
        if learns and (alone or (cls.output_scope == "task" and not cls.joint)):
            with pytest.raises(UserError, match=r"^(task \d|the stream) has one class \([\w ]+\)[^\n]*$"):
                run(resolved, out)
            assert not (out / "record.json").exists()
        elif sets != "stream.tasks=4" or method == "er":
            record = run(resolved, out)
            assert all(t["final_loss"] > 0 for t in record["tasks"][1:] if learns)


@pytest.mark.parametrize(
    ("loss", "how"),
    [
        ("return 2 * super().loss(batch)", "before"),
        ("return self.other(batch)", "when it is asked for"),
        ("return self.sigmoids(batch)", "never"),
    ],
)
def test_a_method_of_ones_own_is_refused_where_it_asks_for_that_loss(
    loss: str, how: str, preset: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text(ONE.format(loss=loss))
    resolved = resolve(preset, str(file), ["stream.sizes=[3,1]", "train.epochs=1"])
    if how == "never":
        assert [t["final_loss"] > 0 for t in run(resolved, tmp_path / "run")["tasks"]] == [True, True]
        return
    with pytest.raises(UserError, match="task 2 has one class"):
        run(resolved, tmp_path / "run")
    assert (tmp_path / "run" / "record.json").exists() == (how != "before")
