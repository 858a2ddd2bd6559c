"""The run folder: atomic files, the log, the lock, checkpoints."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import as_json, atomic_write, write_json
from dualcl.benchmark.runs.folder import RunFolder, new_record
from dualcl.results.records import VERSION, load_record


def test_atomic_write_replaces_only_when_complete(tmp_path: Path) -> None:
    file = tmp_path / "below" / "file"
    with atomic_write(file) as handle:
        handle.write(b"old")
    with atomic_write(file) as handle:
        handle.write(b"new and longer")
        handle.flush()
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new and longer"
    for error in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_write(file) as handle:  # noqa: PT012
            handle.write(b"half")
            raise error
        assert file.read_bytes() == b"new and longer"
    assert [p.name for p in file.parent.iterdir()] == ["file"]


def test_atomic_write_that_cannot_be_renamed_leaves_no_litter(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"), atomic_write(tmp_path / "taken") as handle:
        handle.write(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_json_has_no_nan_and_the_old_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"x": 0.1})
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(file, {"x": [wrong]})
    assert json.loads(file.read_text()) == {"x": 0.1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_as_json_is_what_comes_back(tmp_path: Path) -> None:
    value = {"a": (1, 2.5, ("x", None)), "b": True}
    write_json(tmp_path / "a.json", value)
    assert as_json(value) == json.loads((tmp_path / "a.json").read_text()) == {"a": [1, 2.5, ["x", None]], "b": True}


def steps(folder: RunFolder) -> list[tuple[int, int]]:
    return [(e["task"], e["step"]) for e in map(json.loads, (folder.path / "log.jsonl").read_text().splitlines())]


def test_log_drops_what_will_be_written_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open_log(0, 0)
    for task, step in [(0, 0), (0, 10), (1, 0), (1, 10), (1, 20)]:
        folder.log(task=task, step=step, loss=0.5)
    folder.open_log(1, 10)
    assert steps(folder) == [(0, 0), (0, 10), (1, 0)]
    folder.log(task=1, step=10, loss=0.25)
    assert steps(folder)[-1] == (1, 10)
    folder.open_log(1, 0)
    assert steps(folder) == [(0, 0), (0, 10)]
    folder.open_log(2, 0)
    assert steps(folder) == [(0, 0), (0, 10)]
    folder.open_log(0, 0)
    assert steps(folder) == []
    folder.close()
    folder.log(task=0, step=0, loss=1.0)  # a closed log takes nothing
    assert steps(folder) == []


@pytest.mark.parametrize("cut", ['{"task": 0, "st', '{"task": 0, "step": 2, "loss": 0.', "\x00\x00", ""])
def test_log_line_cut_by_a_kill_is_dropped(tmp_path: Path, cut: str) -> None:
    folder = RunFolder(tmp_path)
    good = [json.dumps({"task": 0, "step": step}) for step in range(2)]
    (tmp_path / "log.jsonl").write_text("\n".join([*good, cut]))
    folder.open_log(0, 5)
    folder.log(task=0, step=5)
    folder.close()
    assert steps(folder) == [(0, 0), (0, 1), (0, 5)]


def test_lock_keeps_others_out_and_goes_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with RunFolder(out).locked(), pytest.raises(UserError, match=r"run is in use by another dualcl process"):  # noqa: SIM117
        with RunFolder(out).locked():
            pytest.fail("locked twice")
    code = (
        "import os, signal, sys; from pathlib import Path; from dualcl.benchmark.runs.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tmp_path)
    assert done.returncode < 0
    with RunFolder(out).locked():
        assert (out / ".lock").exists()


def test_lock_sweeps_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / ".record.json.12.part").write_text("{")
    (tmp_path / "record.json").write_text("{}")
    with RunFolder(tmp_path).locked():
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "record.json"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/run: Not a directory; choose another --out"):  # noqa: SIM117
        with RunFolder(tmp_path / "file" / "run").locked():
            pytest.fail("made")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def names(folder: RunFolder) -> list[str]:
    return sorted(p.name for p in folder.checkpoints.iterdir())


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.load_checkpoint("partial") is None
    assert folder.finished_tasks() == []
    tensors = {
        "a": torch.randn(3, 4).T,  # not contiguous
        "b": torch.tensor(3.0),
        "c": torch.zeros(2, 0, 5),
        "d": torch.randn(4).to(torch.bfloat16),
        "e": torch.randn(2, requires_grad=True),
    }
    state = {"step": 3, "loss_sum": 0.1 + 0.2, "rows": [{"correct": [1]}]}
    folder.save_checkpoint("partial", tensors, state)
    found = folder.load_checkpoint("partial")
    assert found is not None
    assert found[0].keys() == tensors.keys()
    assert all(torch.equal(found[0][k], v) and found[0][k].dtype == v.dtype for k, v in tensors.items())
    assert found[1] == state
    folder.save_checkpoint("partial", {"a": torch.ones(1)}, {"step": 4})
    found = folder.load_checkpoint("partial")
    assert found is not None
    assert (list(found[0]), found[1]) == (["a"], {"step": 4})
    assert names(folder) == ["partial"]


def test_checkpoint_whose_replacement_was_cut_is_read_from_beside(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_checkpoint("partial", {"a": torch.ones(1)}, {"step": 1})
    os.replace(folder.checkpoints / "partial", folder.checkpoints / ".partial.old")
    found = folder.load_checkpoint("partial")
    assert found is not None
    assert found[1] == {"step": 1}
    folder.keep_only("partial")
    assert names(folder) == [".partial.old"]
    folder.save_checkpoint("partial", {"a": torch.ones(1)}, {"step": 2})
    assert names(folder) == ["partial"]
    found = folder.load_checkpoint("partial")
    assert found is not None
    assert found[1] == {"step": 2}


def test_keep_only_removes_the_rest_and_all_litter(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_only()
    for name in ("task_0", "task_9", "task_10", "partial"):
        folder.save_checkpoint(name, {"a": torch.ones(1)}, {})
    for litter in (".partial.part", ".partial.old", ".task_0.part", ".partial.gone", "..partial.old.gone"):
        (folder.checkpoints / litter).mkdir()
        (folder.checkpoints / litter / "state.json").write_text("{")
    assert folder.finished_tasks() == [0, 9, 10]
    folder.keep_only("task_10", "partial")
    assert names(folder) == ["partial", "task_10"]
    folder.keep_only("task_10")
    assert names(folder) == ["task_10"]
    folder.keep_only()
    assert names(folder) == []


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "flipped", "other"])
def test_damaged_checkpoint_is_refused(tmp_path: Path, file: str, damage: str) -> None:
    folder = RunFolder(tmp_path)
    folder.save_checkpoint("task_3", {"a": torch.arange(9.0)}, {"correct": [12, 34]})
    path = folder.checkpoints / "task_3" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        at = content.index(b"12") if file == "state.json" else len(content) - 3
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        path.write_bytes(b"[1]")
    with pytest.raises(UserError) as caught:
        folder.load_checkpoint("task_3")
    assert str(folder.checkpoints / "task_3") in str(caught.value)
    assert "delete" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_new_record_is_one_that_the_reader_takes(tmp_path: Path) -> None:
    run = {"preset": "p", "domain": "classification", "method": "m", "label": "m", "seed": 0, "n_tasks": 2}
    record = new_record({**run, "joint": False}, {"train": {"epochs": 1}}, identity={"data": "d"})
    folder = RunFolder(tmp_path)
    assert folder.read_record() is None
    folder.write_record(record)
    assert folder.read_record() == load_record(tmp_path).data
    found = load_record(tmp_path)
    assert (found.status, found.data["version"], found.data["identity"]) == ("running", VERSION, {"data": "d"})


def test_record_changed_by_hand_or_a_bad_disk_is_refused(tmp_path: Path) -> None:
    run = {"preset": "p", "domain": "classification", "method": "m", "label": "m", "seed": 0, "n_tasks": 2}
    folder = RunFolder(tmp_path)
    folder.write_record(new_record({**run, "joint": False}, {"train": {"epochs": 1}}))
    content = (tmp_path / "record.json").read_text()
    assert '"seed": 0' in content
    (tmp_path / "record.json").write_text(content.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"record\.json is not a usable record \(its checksum differs.*; delete it and"):
        folder.read_record()
    # a file that others indented anew says the same
    (tmp_path / "record.json").write_text(json.dumps(json.loads(content), indent=4))
    assert folder.read_record() is not None


def test_checkpoint_of_another_configuration_or_other_data_is_refused(tmp_path: Path) -> None:
    mine = {"config_hash": "a", "identity": {"weights_sha256": "1"}}
    folder = RunFolder(tmp_path)
    folder.bind(mine)
    folder.save_checkpoint("task_0", {"a": torch.ones(1)}, {"step": 1})
    for other in ({**mine, "config_hash": "b"}, {**mine, "identity": {"weights_sha256": "2"}}):
        stranger = RunFolder(tmp_path)
        stranger.bind(other)
        with pytest.raises(UserError, match=r"task_0 is of a run with another configuration or other data; choose"):
            stranger.load_checkpoint("task_0")
    again = RunFolder(tmp_path)
    again.bind(mine)
    found = again.load_checkpoint("task_0")
    assert found is not None
    assert found[1] == {"step": 1}


@pytest.mark.parametrize("damage", ["lost", "changed", "deleted"])
def test_damaged_log_is_refused_where_the_checkpoint_knew_its_lines(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    folder.open_log(1, 0)
    for step in range(3):
        folder.log(task=1, step=step, loss=0.5)
    folder.save_checkpoint("partial", {}, {"task": 1, "step": 2 + 1})
    folder.log(task=1, step=3, loss=0.25)  # is written again
    folder.close()
    log = tmp_path / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    again = RunFolder(tmp_path)
    assert again.load_checkpoint("partial") is not None
    again.open_log(1, 3)
    again.close()
    assert steps(again) == [(1, 0), (1, 1), (1, 2)]
    if damage == "deleted":
        log.unlink()
        again.open_log(1, 3)
        assert steps(again) == []
        return
    log.write_text("".join([lines[0], *lines[2:]]) if damage == "lost" else "".join(lines).replace("0.5", "0.6", 1))
    with pytest.raises(UserError, match=r"log\.jsonl is damaged: its lines before task 2, step 3 are not those"):
        again.open_log(1, 3)
