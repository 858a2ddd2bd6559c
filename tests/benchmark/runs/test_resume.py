"""Killed runs that are called again end with the record of an undisturbed one, bit for bit.

One helper process imports everything once and forks a process per `dualcl run`, so that a run costs no start-up. Each
is a process of its own: it can be killed, holds the lock, and has the exit code of the command.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualcl.results.records import comparable

# Reads one JSON request per line: {argv, out, err, at, fault, snapshots}. Answers with the process id, then with the
# exit code. The child counts the changes it makes to the file system (audit events) and, just before change `at`,
# kills itself or reports a full disk; with `snapshots` it copies the run folder before each change instead.
SERVER = """
import errno, json, os, shutil, signal, sys
sys.path[:] = [p for p in sys.path if p]
from dualcl.benchmark.cli import main
import dualcl.benchmark.runs.runner, dualcl.benchmark.domains.classification, dualcl.results.report
import dualcl.methods.clora, dualcl.methods.coda_prompt, dualcl.methods.finetune, dualcl.datasets.glyphs, pandas
import safetensors.torch

os.fsync = lambda handle: None  # a killed process, unlike a power cut, leaves what it wrote

def watch(out, at, fault, snapshots):
    count, busy = 0, False
    def hook(event, args):
        nonlocal count, busy
        if busy or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if event == "open" and not (str(args[0]).startswith(out) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        busy = True
        if snapshots and os.path.isdir(out):
            shutil.copytree(out, os.path.join(snapshots, f"{count:04d}"))
        if count == at and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if at is not None and count >= at and fault == "full" and event in ("open", "os.mkdir"):
            busy = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count += 1
        busy = False
    sys.addaudithook(hook)

print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        err = os.open(request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(err, 1)
        os.dup2(err, 2)
        watch(request["out"], request["at"], request["fault"], request["snapshots"])
        code = main(request["argv"])
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

PRESET = """
domain: classification
data: {name: glyphs, train_per_class: 5, test_per_class: 2, classes: 4}
stream: {tasks: 2}
backbone:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {img_size: 32, patch_size: 16, depth: 2, embed_dim: 32, num_heads: 2}
train: {epochs: 1, batch_size: 4, checkpoint_seconds: 0, log_every: 1}
input: {workers: 0}
threads: 1
methods:
  clora: {rank: 2}
  coda_prompt: {pool: 4, length: 2, blocks: [0, 1], mu: 0.1}
"""
METHODS = ("clora", "coda_prompt", "finetune")


class Runs:
    """Starts `dualcl run` in forked processes."""

    def __init__(self, place: Path) -> None:
        self.preset = place / "tiny.yaml"
        self.preset.write_text(PRESET)
        self.err = place / "stderr"
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def start(
        self,
        method: str,
        out: Path,
        *sets: str,
        at: int | None = None,
        fault: str = "",
        snapshots: Path | None = None,
    ) -> int:
        """The process id of a run that has just begun; `end` must follow."""
        argv = ["run", str(self.preset), method, "--out", str(out)] + [w for s in sets for w in ("--set", s)]
        request = {"argv": argv, "out": str(out), "err": str(self.err), "at": at, "fault": fault}
        request["snapshots"] = None if snapshots is None else str(snapshots)
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self._answer())

    def end(self) -> int:
        """Waits for the run; its exit code, or minus the signal that killed it."""
        return int(self._answer())

    def __call__(self, method: str, out: Path, *sets: str, **faults: Any) -> int:
        self.start(method, out, *sets, **faults)
        return self.end()

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.kill()
        self.server.communicate()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("resume"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An undisturbed run of each method."""
    place = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        assert runs(method, place / method) == 0, runs.err.read_text()
    return {method: place / method for method in METHODS}


def outcome(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on what happened on the way."""
    record = json.loads((folder / "record.json").read_text())
    last = max((folder / "checkpoints").glob("task_*"))
    state = json.loads((last / "state.json").read_text())
    return {
        "record": comparable(record),
        "matrix": record["matrix"],
        "log": (folder / "log.jsonl").read_bytes(),
        "checkpoint": last.name,
        "tensors": (last / "state.safetensors").read_bytes(),
        "state": {k: state[k] for k in ("tasks", "matrix")},
        "config": (folder / "config.yaml").read_text(),
        # nothing of the way is left either
        "files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")),
    }


def test_the_undisturbed_run_is_what_it_should_be(whole: dict[str, Path]) -> None:
    for method, folder in whole.items():
        found = outcome(folder)
        assert found["record"]["status"] == "finished"
        assert [row["after_task"] for row in found["matrix"]["rows"]] == [0, 1]
        assert [(e["task"], e["step"]) for e in map(json.loads, found["log"].splitlines())] == [
            (task, step) for task in range(2) for step in range(3)
        ]
        assert all(e["loss"] > 0 for e in map(json.loads, found["log"].splitlines())), method
        assert found["files"] == [
            ".lock",
            "checkpoints",
            "checkpoints/task_1",
            "checkpoints/task_1/state.json",
            "checkpoints/task_1/state.safetensors",
            "config.yaml",
            "log.jsonl",
            "record.json",
        ]


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_five_random_moments(runs: Runs, tmp_path: Path, method: str) -> None:
    long = "train.epochs=4"
    started = time.perf_counter()
    assert runs(method, tmp_path / "whole", long) == 0
    wall = time.perf_counter() - started
    chance, kills = random.Random(METHODS.index(method)), 0
    while kills < 5:
        child = runs.start(method, tmp_path / "run", long)
        time.sleep(wall * chance.uniform(0.1, 0.8))
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(child, signal.SIGKILL)
        if runs.end() == -signal.SIGKILL:
            kills += 1
        else:  # the machine has become faster: from the start, with earlier kills
            shutil.rmtree(tmp_path / "run")
            wall /= 2
    assert runs(method, tmp_path / "run", long) == 0, runs.err.read_text()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("method", METHODS)
def test_killed_again_and_again_while_it_writes(
    runs: Runs, whole: dict[str, Path], tmp_path: Path, method: str
) -> None:
    chance, codes = random.Random(7 + METHODS.index(method)), []
    for _ in range(6):
        codes.append(runs(method, tmp_path / "run", at=chance.randrange(8, 50), fault="kill"))
        assert codes[-1] in (0, -signal.SIGKILL), runs.err.read_text()
    assert codes.count(-signal.SIGKILL) >= 2
    assert runs(method, tmp_path / "run") == 0, runs.err.read_text()
    assert outcome(tmp_path / "run") == outcome(whole[method])


def distinct(snapshots: Path) -> list[Path]:
    """Snapshots that differ in names or content (process ids in names aside)."""
    seen, out = set(), []
    for folder in sorted(snapshots.iterdir()):
        key = tuple(
            (p.relative_to(folder).as_posix(), p.read_bytes() if p.is_file() else None)
            for p in sorted(folder.rglob("*"))
        )
        if key not in seen:
            seen.add(key)
            out.append(folder)
    return out


@pytest.mark.parametrize(
    ("method", "every"),
    [
        ("clora", 5),
        pytest.param("clora", 1, marks=pytest.mark.slow),
        pytest.param("coda_prompt", 1, marks=pytest.mark.slow),
        pytest.param("finetune", 1, marks=pytest.mark.slow),
    ],
)
def test_stopped_between_any_two_changes_to_the_files(
    runs: Runs, whole: dict[str, Path], tmp_path: Path, method: str, every: int
) -> None:
    shots = tmp_path / "shots"
    shots.mkdir()
    assert runs(method, tmp_path / "run", snapshots=shots) == 0
    wanted = outcome(whole[method])
    assert outcome(tmp_path / "run") == wanted
    states = distinct(shots)
    assert len(states) > 40
    wrong: dict[str, Any] = {}
    for state in states[::every]:
        before = sorted(p.relative_to(state).as_posix() for p in state.rglob("*"))
        code = runs(method, state)
        if code != 0:
            wrong[state.name] = (before, runs.err.read_text())
        elif outcome(state) != wanted:
            found = outcome(state)
            wrong[state.name] = (before, [k for k in wanted if wanted[k] != found[k]], found["files"])
        shutil.rmtree(state)
    assert wrong == {}


def wait_for(path: Path) -> None:
    """Waits until `path` is there, at most a minute."""
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.005)


def test_sigterm_keeps_the_folder_resumable_and_a_second_process_is_refused(
    runs: Runs, whole: dict[str, Path], tmp_path: Path
) -> None:
    out, long = tmp_path / "run", "train.epochs=1000"
    child = runs.start("clora", out, long)
    wait_for(out / "checkpoints" / "partial")
    command = [sys.executable, "-m", "dualcl.benchmark.cli", "run", str(runs.preset), "clora", "--out", str(out)]
    os.kill(child, signal.SIGSTOP)  # it holds the folder all the same, and leaves the cores to the second
    second = subprocess.run([*command, "--set", long], capture_output=True, text=True, cwd=tmp_path)
    os.kill(child, signal.SIGCONT)
    assert second.returncode == 2
    holder = f"({child} on {socket.gethostname()})"
    assert second.stderr == f"dualcl: error: {out} is in use by another dualcl process {holder}; " + (
        "wait for it or choose another --out\n"
    )
    os.kill(child, signal.SIGTERM)
    assert runs.end() == 130
    assert runs.err.read_text().splitlines()[-1] == "dualcl: interrupted; the same command resumes"
    assert json.loads((out / "record.json").read_text())["status"] == "interrupted"

    # the same with a length that can be compared; the signal comes while the run is at work
    child = runs.start("clora", tmp_path / "short", "train.log_every=1")
    wait_for(tmp_path / "short" / "checkpoints" / "partial")
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)
    assert runs.end() in (0, 130)  # it may just have finished
    assert runs("clora", tmp_path / "short") == 0
    assert outcome(tmp_path / "short") == outcome(whole["clora"])


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_is_left_alone(runs: Runs, whole: dict[str, Path], method: str) -> None:
    folder = whole[method]
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert runs(method, folder) == 0
    assert "is finished already" in runs.err.read_text()
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("at", [1, 4, 9, 15, 23, 31, 40, 52])
def test_a_full_disk_is_one_line_and_loses_nothing(runs: Runs, whole: dict[str, Path], tmp_path: Path, at: int) -> None:
    out = tmp_path / "run"
    assert runs("clora", out, at=at, fault="full") == 2
    lines = runs.err.read_text().splitlines()
    assert lines[-1].startswith("dualcl: error: ")
    assert lines[-1].endswith(": No space left on device") or "No space left on device; choose" in lines[-1]
    assert str(out) in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert not list(out.rglob(".*.json.*.part"))
    assert runs("clora", out) == 0, runs.err.read_text()
    assert outcome(out) == outcome(whole["clora"])
