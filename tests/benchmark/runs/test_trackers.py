"""Trackers: what they are told, that they change nothing, that they resume, and that they stop no run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.runs import trackers
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import run
from dualcl.results.records import comparable, load_record

SETS = (
    *("threads=1", "data.classes=4", "data.train_per_class=8", "data.test_per_class=4", "stream.tasks=2"),
    *("train.epochs=2", "train.batch_size=4", "train.log_every=1", "train.checkpoint_seconds=0"),
)
#: steps of a task
STEPS = 8


def tracked(out: Path, *names: str, reporter: Reporter | None = None, method: str = "lora") -> dict[str, Any]:
    return run(resolve("glyphs", method, [*SETS, f"tracker={','.join(names) or 'none'}"]), out, reporter)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    tracked(out)
    return out


def events(out: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return found


@pytest.mark.parametrize("at", [None, 3, STEPS + 1, STEPS + 4])
def test_tensorboard_holds_every_step_once_and_the_record_is_the_same(
    plain: Path, tmp_path: Path, at: int | None, stopping: Callable[..., Any]
) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    if at is not None:
        with pytest.raises(KeyboardInterrupt):
            tracked(out, "tensorboard", reporter=stopping(at))
    tracked(out, "tensorboard")
    record = load_record(out)
    assert comparable(record) == comparable(load_record(plain))
    assert (out / "log.jsonl").read_bytes() == (plain / "log.jsonl").read_bytes()
    found = events(out)
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    told = [(STEPS * line["task"] + line["step"], pytest.approx(line["loss"])) for line in record.log()]
    assert losses == told
    assert [event.step for event in found.Scalars("eval/task_1")] == [STEPS - 1, 2 * STEPS - 1]
    cells = record.cells()
    assert [event.value for event in found.Scalars("eval/task_1")] == [pytest.approx(row[0]) for row in cells if row]
    (last,) = found.Scalars("final/A_last")
    assert last.value == pytest.approx(record.metrics["A_last"])
    assert any("log_every" in str(found.Tensors(tag)) for tag in found.Tags()["tensors"])


def test_weights_and_biases_stays_offline_and_keeps_its_id(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: Callable[..., Any]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tracked(out, "wandb", reporter=stopping(STEPS + 2))
    tracked(out, "wandb")
    assert comparable(load_record(out)) == comparable(load_record(plain))
    files = sorted(out.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2  # one per session, with one id
    assert len({file.name for file in files}) == 1
    # protobuf messages one after another: names and numbers lie in them as text
    record = load_record(out)
    losses = {json.dumps(line["loss"]).encode() for line in record.log()}
    until, told = time.monotonic() + 20, b""
    while not all(loss in told for loss in losses) and time.monotonic() < until:  # its own process is still writing
        told = b"".join(file.read_bytes() for file in files)
        time.sleep(0.1)
    assert told.count(b"train/loss") >= 2 * STEPS
    assert [loss for loss in losses if loss not in told] == []
    assert b"final/A_last" in told
    assert str(record.data["config_hash"]).encode() in told


class Broken(trackers.TensorBoard):
    """A backend whose disk is full from the second line on."""

    lines = 0

    def log(self, step: int, values: Any) -> None:
        self.lines += 1
        if self.lines > 1:
            raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_is_dropped_with_one_note(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: Callable[..., Any]
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(trackers.BACKENDS, "tensorboard", Broken)
    reporter = stopping()
    tracked(tmp_path / "run", "tensorboard", reporter=reporter)
    assert comparable(load_record(tmp_path / "run")) == comparable(load_record(plain))
    (note,) = [note for note in reporter.notes if "tracker" in note]
    assert "tracker tensorboard stopped ([Errno 28] No space left on device)" in note


def test_a_method_without_steps_has_a_place_per_task(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracked(tmp_path / "run", "tensorboard", method="ncm")
    assert [event.step for event in events(tmp_path / "run").Scalars("eval/mean")] == [0, 1]


def test_settings() -> None:
    asked = resolve("glyphs", "lora", ["tracker=tensorboard,wandb"])
    assert asked.general.tracker == ("tensorboard", "wandb")
    assert asked.hash() == resolve("glyphs", "lora").hash()
    assert resolve("glyphs", "lora", ["tracker=none"]).general.tracker == ()
    with pytest.raises(UserError, match="tracker must be"):
        resolve("glyphs", "lora", ["tracker=tensorbord"])


def test_a_missing_extra_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.NEEDS, "wandb", "no_such_package")
    with pytest.raises(UserError, match=r'pip install "dualcl\[wandb\]"'):
        tracked(tmp_path / "run", "wandb")
    assert not (tmp_path / "run").exists()
