"""`--engine ray`: one small local cluster for all tests here; the grid on three nodes has a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualcl.benchmark.core.errors import EXIT_USER, UserError
from dualcl.benchmark.core.lock import hold
from dualcl.benchmark.grids import ray as ray_engine
from dualcl.benchmark.grids.execute import execute
from dualcl.benchmark.grids.plan import Needs, Planned, plan_comparison
from dualcl.benchmark.grids.ray import Interrupted, Job, cluster, gather
from dualcl.benchmark.grids.survey import Survey
from dualcl.results.records import comparable, load_record

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of one node with two CPUs, to which this process is connected."""
    with cluster("local", num_cpus=2, num_gpus=2) as ray:
        yield ray


def plan_of(preset: str, out: Path, *names: str) -> list[Planned]:
    return plan_comparison(preset, names, [0], ["threads=1", "device=cpu"], out)


def test_runs_on_ray_are_those_of_this_process_and_a_failing_one_stops_none(
    nodes: Any, tiny_preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(tiny_preset, tmp_path / "ray", "finetune")
    wrong = plan_comparison(
        tiny_preset, ["lora"], [0], ["threads=1", "device=cpu", "method.rank=1000"], tmp_path / "ray"
    )
    outcomes = execute([*plan, *wrong], engine="ray", root=tmp_path / "ray")
    assert [o.code for o in outcomes] == [0, EXIT_USER]
    assert outcomes[1].error.startswith("method.rank=1000")
    (here,) = plan_of(tiny_preset, tmp_path / "here", "finetune")
    execute([here], quiet=True)
    assert comparable(load_record(plan[0].out)) == comparable(load_record(here.out))
    told = capsys.readouterr().err
    assert "finetune seed 0: finished" in told
    assert {s.label: (s.state, s.error) for s in Survey([tmp_path / "ray"]).look()} == {
        "finetune seed 0": ("finished", ""),
        "lora seed 0": ("failed", outcomes[1].error),
    }


def _first_interrupted(folder: str, wait: float) -> int:
    """Stands for a run: fails at its first start, says how often it was started after that."""
    starts = len(list(Path(folder).iterdir()))
    (Path(folder) / str(starts)).touch()
    for _ in range(round(wait / 0.1)):
        time.sleep(0.1)
    if starts == 0:
        raise Interrupted("first")
    return starts


def _broken() -> None:
    raise ValueError("no use to try again")


def test_only_what_was_interrupted_is_tried_again_and_leaving_cancels_the_rest(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "GRACE_SECONDS", 9.0)
    needs = Needs(1, 0.0, None)
    (tmp_path / "a").mkdir()
    assert list(gather(nodes, _first_interrupted, [Job("a", needs, (str(tmp_path / "a"), 0.0))])) == [(0, 1)]
    ((_, error),) = gather(nodes, _broken, [Job("b", needs, ())])
    assert isinstance(error.cause, ValueError)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0").touch()
    # the others would outlast any patience with this test
    slow = [Job("c", needs, (str(tmp_path / "c"), t)) for t in (0.1, 9999, 9999, 9999)]
    results = gather(nodes, _first_interrupted, slow)
    assert next(results)[0] == 0
    results.close()
    tries = 0
    while nodes.available_resources().get("CPU") != nodes.cluster_resources()["CPU"]:  # Ray tells it late
        assert (tries := tries + 1) < 600
        time.sleep(0.1)


def test_a_run_whose_folder_is_held_waits_for_it(nodes: Any, tiny_preset: str, tmp_path: Path) -> None:
    plan = plan_of(tiny_preset, tmp_path, "ncm")

    held = threading.Event()

    def holder() -> None:
        with hold(plan[0].out):
            held.set()
            time.sleep(6)

    thread = threading.Thread(target=holder)
    thread.start()
    held.wait()
    outcomes = execute(plan, engine="ray", quiet=True)
    thread.join()
    assert [o.code for o in outcomes] == [0]
    assert load_record(plan[0].out).finished


def test_a_run_that_no_node_can_take_is_an_error(nodes: Any, tiny_preset: str, tmp_path: Path) -> None:
    plan = plan_comparison(tiny_preset, ["ncm"], [0], ["resources.cpus=1000"], tmp_path)
    with pytest.raises(UserError, match=r"no node has what ncm seed 0 asks for \(1000 CPUs"):
        execute(plan, engine="ray", address="local", quiet=True)


@pytest.mark.slow
def test_a_grid_survives_the_loss_of_a_node(tmp_path: Path) -> None:
    script = Path(__file__).with_name("ray_grid.py")
    done = subprocess.run(
        [sys.executable, str(script), "--only-glyphs", "--scale", "3"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["finished"] == result["records_equal_to_serial"] == result["runs"] == 3
    assert result["nodes_left"] == 2
