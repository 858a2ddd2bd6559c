"""Who holds a run folder, the plan of a grid, and the state of its runs as `dualcl status` tells it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.cli import main
from dualcl.benchmark.core import lock as lease
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.files import write_json
from dualcl.benchmark.grids.execute import make_engine
from dualcl.benchmark.grids.local import Local, SideBySide
from dualcl.benchmark.grids.plan import Needs, Planned, needs, plan_comparison
from dualcl.benchmark.grids.status import LiveTable, render, text_table
from dualcl.benchmark.grids.survey import Survey, read_plan, read_state, seconds_left, write_plan
from dualcl.benchmark.runs.folder import RunFolder, new_record
from dualcl.benchmark.runs.mirror import PLAN


def wait_until(true: Callable[[], Any], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


# --- leases -----------------------------------------------------------------------------------------------------------


def foreign(folder: Path) -> None:
    """As another host's process leaves its lock on a file system without flock."""
    told = {"host": "elsewhere", "kernel": "another", "pid": 1, "token": "theirs"}
    folder.mkdir(exist_ok=True)
    (folder / lease.LOCK).write_text(json.dumps(told))


def test_a_held_folder_names_its_holder_and_a_patient_process_gets_it_next(tmp_path: Path) -> None:
    folder, got = tmp_path / "run", threading.Event()

    def second() -> None:
        with lease.hold(folder, patient=True):
            got.set()

    with lease.hold(folder):
        held = lease.holder(folder)
        assert held is not None
        assert (held.pid, held.alive) == (os.getpid(), True)
        named = re.escape(f"in use by another dualcl process ({os.getpid()} on {held.host}); wait for it")
        with pytest.raises(UserError, match=named), lease.hold(folder):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        assert not got.wait(0.3)
    thread.join(10)
    assert got.is_set()
    assert lease.holder(folder) is None


def test_another_host_keeps_the_folder_while_it_beats_and_loses_it_when_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE", 0.5)
    monkeypatch.setattr(lease, "BEAT", 0.05)
    foreign(tmp_path)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            os.utime(tmp_path / lease.LOCK)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with (
            pytest.raises(UserError, match=r"in use by another dualcl process \(1 on elsewhere\)"),
            lease.hold(tmp_path),
        ):
            pass
    finally:
        over.set()
        heart.join()
    with lease.hold(tmp_path):
        held = lease.holder(tmp_path)
        assert held is not None
        assert held.token != "theirs"


def test_a_process_whose_folder_was_taken_over_ends_without_another_write(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from dualcl.benchmark.core import lock as lease
lease.BEAT = 0.05
folder = Path(sys.argv[1])
with lease.hold(folder):
    (folder / "begun").touch()
    time.sleep(60)
    (folder / "written").touch()
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True) as child:
        wait_until((tmp_path / "begun").exists)
        foreign(tmp_path)
        _, told = child.communicate(timeout=20)
    assert child.returncode == 1
    assert "was taken over by elsewhere" in told
    assert lease.holder(tmp_path) is not None
    assert not (tmp_path / "written").exists()


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    write_json(tmp_path / PLAN, {"format": "dualcl-grid", "version": 1, "runs": [
        {"folder": "a", "label": "a", "method": "a", "seed": 0}
    ]})  # fmt: skip
    code = """
import sys, time
from dualcl.benchmark.grids.child import Child
child = Child(["status", sys.argv[1], "--watch", "1"], threads=1)
print(child.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(1)
        os.kill(pid, 0)
        parent.kill()

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_until(gone)


# --- plans and states -------------------------------------------------------------------------------------------------


def plan_of(out: Path, *names: str) -> list[Planned]:
    return plan_comparison("glyphs", names, [0], [], out)


def put_record(folder: Path, status: str, tasks: int, seconds: float = 10.0, error: str | None = None) -> None:
    """A run of five tasks with ten steps each, of which `tasks` are done."""
    run = {"preset": "glyphs", "domain": "classification", "method": folder.name.partition("-")[0], "seed": 0}
    record = new_record({**run, "n_tasks": 5, "joint": False, "label": run["method"]}, {})
    record["tasks"] = [{"task": i, "steps": 10} for i in range(tasks)]
    record["measured"]["wall_seconds"] = seconds
    RunFolder(folder).write_record({**record, "status": status, "error": error})


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """A run in every state: `finetune` was not begun, nobody holds `l2`, and the record of `mas` is half."""
    write_plan(tmp_path, plan_of(tmp_path, "clora", "lora", "ewc", "ncm"))
    write_plan(tmp_path, plan_of(tmp_path, "ncm", "finetune"))
    put_record(tmp_path / "clora-seed0", "finished", 5, 20.0)
    put_record(tmp_path / "lora-seed0", "running", 2)
    log = [{"task": 1, "step": 9, "loss": 1.0}, {"task": 2, "step": 4, "loss": 1.0}]
    (tmp_path / "lora-seed0" / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log) + '{"task": 2, "st')
    put_record(tmp_path / "ewc-seed0", "failed", 1, error="the loss is nan")
    put_record(tmp_path / "l2-seed0", "running", 1)
    put_record(tmp_path / "ncm-seed0", "interrupted", 3)
    (tmp_path / "mas-seed0").mkdir()
    (tmp_path / "mas-seed0" / "record.json").write_text('{"format": "dualcl-rec')
    return tmp_path


def test_plans_add_up_and_a_damaged_one_is_an_error(grid: Path) -> None:
    methods = [run.method for run in read_plan(grid)]
    assert methods == ["clora", "lora", "ewc", "ncm", "finetune"]
    assert read_plan(grid)[0].folder == grid / "clora-seed0"
    (grid / PLAN).write_text("[]")
    with pytest.raises(UserError, match=r"grid\.json is not a plan"):
        Survey([grid]).look()
    with pytest.raises(UserError, match="does not exist"):
        Survey([grid / "nowhere"]).look()


def test_every_state_is_told_from_the_folders(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(grid / "lora-seed0").locked():
        states = {s.folder.name.partition("-")[0]: s for s in Survey([grid]).look()}
        assert {name: s.state for name, s in states.items()} == {
            "clora": "finished",
            "lora": "running",
            "ewc": "failed",
            "ncm": "interrupted",
            "finetune": "waiting",
            "l2": "stale",
            "mas": "damaged",
        }
        lora = states["lora"]
        assert (lora.tasks_done, lora.tasks, lora.step, lora.steps) == (2, 5, 5, 10)
        assert lora.done == pytest.approx(0.5)
        assert lora.host
        # clora took 20 s: half of lora, all of finetune, 2 of 5 tasks of ncm, 4 of 5 of l2 and mas, one at a time
        assert seconds_left(list(states.values())) == pytest.approx(20 * (0.5 + 1 + 0.4 + 0.8 + 1))
        assert main(["status", str(grid), "--format", "json"]) == 0
        told = json.loads(capsys.readouterr().out)
    assert told["counts"] == dict.fromkeys(
        ("waiting", "running", "finished", "failed", "interrupted", "stale", "damaged"), 1
    )
    assert next(r for r in told["runs"] if r["method"] == "ewc")["error"] == "the loss is nan"
    assert read_state(grid / "lora-seed0").state == "stale"


def test_a_record_changed_by_hand_is_damaged(grid: Path) -> None:
    record = json.loads((grid / "clora-seed0" / "record.json").read_text())
    (grid / "clora-seed0" / "record.json").write_text(json.dumps(record))
    assert read_state(grid / "clora-seed0").state == "finished"
    survey = Survey([grid])
    survey.look()
    record["measured"]["wall_seconds"] = 1.0
    (grid / "clora-seed0" / "record.json").write_text(json.dumps(record, indent=1))
    found = next(s for s in survey.look() if s.folder.name == "clora-seed0")
    assert (found.label, found.state) == ("clora seed 0", "damaged")
    assert "changed by hand" in found.error
    del record["sha256"]  # as older ones
    (grid / "clora-seed0" / "record.json").write_text(json.dumps(record))
    assert read_state(grid / "clora-seed0").state == "finished"


def test_runs_of_one_method_and_seed_are_told_apart_by_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lora-full", "lora-kill", "below/lora-int", "ncm"):
        put_record(tmp_path / name, "finished", 5)
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines[1:5]] == [
        "lora seed 0 (below/lora-int)",
        "lora seed 0 (lora-full)",
        "lora seed 0 (lora-kill)",
        "ncm seed 0",
    ]
    some = [str(tmp_path / name) for name in ("lora-full", "lora-kill")]
    assert main(["status", *some, "--format", "md"]) == 0
    told = capsys.readouterr().out
    assert all(f"lora seed 0 ({folder})" in told.replace("\\", "") for folder in some)
    assert main(["status", str(tmp_path), "--format", "json"]) == 0
    assert {r["run"] for r in json.loads(capsys.readouterr().out)["runs"]} == {"lora seed 0", "ncm seed 0"}


def test_formats_and_many_runs(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = Survey([grid]).look()
    rows = list(csv.DictReader(io.StringIO(render(states, "csv"))))
    assert [r["state"] for r in rows] == [s.state for s in states]
    assert render(states, "md").count("\n| ") == len(states) + 1
    assert text_table(states)[-1].startswith("7 runs: 1 waiting, ")
    short = text_table(states, rows=6)
    assert short[0].split()[:3] == ["method", "waiting", "finished"]
    assert any("the loss is nan" in line or "more that failed" in line for line in short)
    assert main(["status", str(grid), "--format", "cvs"]) == 2
    assert "did you mean" in capsys.readouterr().err
    # a run that is done is not read again, one that goes on is
    survey = Survey([grid])
    survey.look()
    put_record(grid / "lora-seed0", "finished", 5)
    assert {s.label: s.state for s in survey.look()}["lora seed 0"] == "finished"


def test_status_of_a_hundred_runs_is_quick_and_needs_no_torch(tmp_path: Path, starts: Callable[..., Any]) -> None:
    for i in range(100):
        put_record(tmp_path / f"m{i}-seed0", "finished", 5)
    code = "import sys; sys.modules.update(torch=None, pandas=None, matplotlib=None, numpy=None, fsspec=None)\n"
    code += "from dualcl.benchmark.cli import main; sys.exit(main(sys.argv[1:]))"
    done, times = starts(code, "status", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "100 runs: 100 finished" in done.stdout
    assert times < 5, f"{times:.1f} starts of Python"


def test_the_live_table_tells_changes_line_by_line_where_it_cannot_redraw(tmp_path: Path) -> None:
    stream = io.StringIO()
    table = LiveTable(plan_of(tmp_path, "lora", "ncm"), stream)
    table.update()
    assert stream.getvalue() == ""
    with RunFolder(tmp_path / "lora-seed0").locked():
        put_record(tmp_path / "lora-seed0", "running", 1)
        table.update()
        table.update()
    put_record(tmp_path / "lora-seed0", "finished", 5)
    put_record(tmp_path / "ncm-seed0", "failed", 0, error="no room")
    table.update()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("lora seed 0: running on ")
    assert lines[0].endswith(", task 2/5")
    assert lines[1:] == ["lora seed 0: finished", "ncm seed 0: failed: no room"]


def test_the_live_table_redraws_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "50")
    stream = Terminal()
    with LiveTable(plan_of(tmp_path, "lora"), stream) as table:
        table.update()
    shown = stream.getvalue()
    assert shown.count("lora seed 0") == 2
    assert "\x1b[4F\x1b[J" in shown
    assert all(len(line.replace("\x1b[K", "")) < 70 for line in shown.splitlines())


# --- engines ----------------------------------------------------------------------------------------------------------


def test_engines_refuse_what_they_have_no_use_for() -> None:
    assert isinstance(make_engine("local"), Local)
    assert isinstance(make_engine("local", jobs=2), SideBySide)
    for kwargs, text in (
        ({"name": "rai"}, "did you mean 'ray'"),
        ({"name": "local", "address": "auto"}, "--address is for --engine ray"),
        ({"name": "ray", "jobs": 2}, "--jobs is for --engine local"),
    ):
        with pytest.raises(UserError, match=text):
            make_engine(**kwargs)


def test_needs_come_from_the_configuration(tmp_path: Path) -> None:
    def of(*sets: str, cuda: bool = False) -> Needs:
        return needs(plan_comparison("glyphs", ["ncm"], [0], sets, tmp_path)[0], cuda=cuda)

    assert of() == Needs(1, 0.0, None)
    assert of("threads=3", cuda=True) == Needs(3, 1.0, None)
    assert of("device=cpu", cuda=True).gpus == 0
    assert of("device=cuda:0").gpus == 1
    wanted = ("resources.cpus=4", "resources.gpus=0.5", "resources.memory_gib=12", "threads=2")
    assert of(*wanted) == Needs(4, 0.5, 12.0)
    with pytest.raises(UserError, match=r"resources\.cpus must be at least 1"):
        of("resources.cpus=0")
    plain, asking = (plan_comparison("glyphs", ["ncm"], [0], sets, tmp_path)[0].resolved for sets in ((), wanted))
    assert plain.hash() == asking.hash()


def test_a_run_asked_to_end_is_asked_once(tmp_path: Path) -> None:
    from dualcl.benchmark.grids.child import Child

    write_plan(tmp_path, plan_of(tmp_path, "ncm"))
    child = Child(["status", str(tmp_path), "--watch", "1"], threads=1)
    time.sleep(1.5)
    child.stop()
    child.stop()
    assert child.wait() in (130, -signal.SIGTERM)
