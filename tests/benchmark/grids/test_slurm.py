"""The array script of `dualcl compare --print-slurm`, run by bash as Slurm would."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dualcl.benchmark.cli import main


def script_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["compare", *arguments, "--print-slurm"]) == 0
    return capsys.readouterr().out


def environment(index: int, tmp_path: Path) -> dict[str, str]:
    """What Slurm sets, and an `scontrol` that notes what it was asked."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    (tools / "scontrol").chmod(0o755)
    slurm = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "1"}
    return {**os.environ, **slurm, "PATH": f"{tools}:{os.environ['PATH']}"}


def test_the_script_has_what_the_runs_declare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a b'c"
    sets = ["--set", "resources.cpus=2", "resources.gpus=1", "resources.memory_gib=1.5", "label=it's $HOME"]
    text = script_of(
        capsys, "glyphs", "--methods", "ncm,lora", "--seeds", "0,1", "--out", str(out), *sets,
        "--slurm-option", "partition=gpu", "--slurm-option", "array=0-3%2", "--slurm-option", "exclusive",
    )  # fmt: skip
    head = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    for option in (
        "--array=0-3%2", "--cpus-per-task=2", "--gres=gpu:1", "--mem=1536M", "--requeue", "--signal=B:USR1@120",
        "--partition=gpu", "--exclusive",
    ):  # fmt: skip
        assert f"#SBATCH {option}" in head
    assert sum(line.startswith("#SBATCH --array") for line in head) == 1
    assert text.splitlines()[-1].startswith("# when all is done: dualcl report ")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    # the arguments come through the shell as they are
    shown = subprocess.run(
        ["bash"],
        input=text.replace('"${command[@]}" &', 'printf "%s\\0" "${command[@]}"; exit 0'),
        env=environment(3, tmp_path),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[:-1]
    assert shown[:6] == ["dualcl", "run", "glyphs", "lora", "--seed", "1"]
    assert shown[7] == str(out / "lora-seed1")
    assert shown[-2:] == ["--quiet", "--wait"]
    assert "label=it's $HOME" in shown
    assert "threads=2" in shown
    assert [run["folder"] for run in json.loads((out / "grid.json").read_text())["runs"]][-1] == "lora-seed1"
    for wrong in ("Partition=x", "a b=c", "=x", "time=1\n#SBATCH --x"):
        assert main(["compare", "glyphs", "--out", str(out), "--print-slurm", "--slurm-option", wrong]) == 2


def test_a_line_break_cannot_leave_the_comment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compare", "glyphs", "--methods", "ncm", "--out", f"{tmp_path}/a\nrm b", "--print-slurm"]) == 2
    assert "control characters" in capsys.readouterr().err


def test_every_index_does_its_run_and_others_are_refused(
    tiny_preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    text = script_of(capsys, tiny_preset, "--methods", "ncm,finetune", "--out", str(out), "--set", "threads=1")
    for index in (0, 1):
        done = subprocess.run(["bash"], input=text, env=environment(index, tmp_path), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    statuses = {p.parent.name: json.loads(p.read_text())["status"] for p in out.glob("*/record.json")}
    assert statuses == {"ncm-seed0": "finished", "finetune-seed0": "finished"}
    done = subprocess.run(["bash"], input=text, env=environment(2, tmp_path), capture_output=True, text=True)
    assert (done.returncode, "no run has the number 2" in done.stderr) == (2, True)
    assert not (tmp_path / "scontrol.txt").exists()


def test_the_notice_of_the_time_limit_saves_and_requeues(
    tiny_preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    sets = ["--set", "threads=1", "train.epochs=20000", "train.checkpoint_seconds=0"]
    text = script_of(capsys, tiny_preset, "--methods", "finetune", "--out", str(out), *sets)
    begun = out / "finetune-seed0" / "checkpoints" / "partial"
    assert interrupted(text, begun, signal.SIGUSR1, tmp_path) == 130
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77_0\n"
    assert json.loads((out / "finetune-seed0" / "record.json").read_text())["status"] == "interrupted"
    assert (out / "finetune-seed0" / ".lock").read_text() == ""  # the same command goes on


def test_a_cancelled_run_is_told_and_not_requeued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script_of(capsys, "glyphs", "--methods", "ncm", "--out", str(tmp_path / "runs"))
    saves = f"trap 'echo saved > {tmp_path}/saved; exit 130' TERM; touch {tmp_path}/begun; while :; do sleep 0.1; done"
    text = text.replace('"${command[@]}" &', f"bash -c {shlex.quote(saves)} &")
    assert interrupted(text, tmp_path / "begun", signal.SIGTERM, tmp_path) == 130
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "scontrol.txt").exists()


def interrupted(text: str, begun: Path, sent: signal.Signals, tmp_path: Path) -> int:
    """Runs the script's first task, sends a signal to the shell alone once `begun` is there; the exit code."""
    (tmp_path / "job.sh").write_text(text)
    with subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment(0, tmp_path)) as job:
        until = time.monotonic() + 60
        while not begun.exists():
            assert job.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        job.send_signal(sent)
        return job.wait(60)
