"""A grid in both domains on three local Ray nodes, one of which is killed amid a run, beside the same grid in series.

`python tests/benchmark/grids/ray_grid.py [--scale N] [--only-glyphs]` prints how many runs finished, whether their
records are equal, how many were resumed, and the ratio of the wall times; the exit code is 1 unless all is as it
should be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.lock import holder
from dualcl.benchmark.grids.execute import execute
from dualcl.benchmark.grids.plan import Planned, plan_comparison
from dualcl.benchmark.grids.survey import read_state
from dualcl.results.records import comparable, load_record

#: all that the three nodes hold besides their processes
OBJECTS = 80 * 2**20


def make_plan(out: Path, scale: int, only_glyphs: bool) -> list[Planned]:
    """24 short runs: 3 methods x 5 seeds of `glyphs`, 3 methods x 3 seeds of `glyph-concepts`; or 3 of `glyphs`."""
    shared = ["threads=1", "train.checkpoint_seconds=0.2", "train.log_every=1"]
    glyphs = [*shared, f"train.epochs={2 * scale}", "data.train_per_class=10", "data.test_per_class=5"]
    if only_glyphs:
        return plan_comparison("glyphs", ["clora", "ewc", "coda_prompt"], [0], glyphs, out / "glyphs")
    concepts = [*shared, "data.concepts=2", f"train.steps={5 * scale}", "eval.n=2", "eval.steps=4"]
    concepts += ["prior.n=4", "prior.steps=4"]
    return [
        *plan_comparison("glyphs", ["clora", "ewc", "coda_prompt"], range(5), glyphs, out / "glyphs"),
        *plan_comparison("glyph-concepts", ["clora", "ewc", "custom_diffusion"], range(3), concepts, out / "concepts"),
    ]


def parents(pid: int) -> list[int]:
    """The processes above `pid`."""
    out = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        out.append(pid)
    return out


class Killer(threading.Thread):
    """Kills a worker node, which is not the head, while a run on it has a checkpoint and is not done."""

    def __init__(self, cluster: Any, plan: Sequence[Planned]) -> None:
        super().__init__(daemon=True)
        self.cluster, self.plan = cluster, plan
        self.victim: Planned | None = None

    def run(self) -> None:
        raylets = {node.all_processes["raylet"][0].process.pid: node for node in self.cluster.worker_nodes}
        while self.victim is None:
            time.sleep(0.02)
            for planned in self.plan:
                held, state = holder(planned.out), read_state(planned.out)
                if held is None or not held.alive or state.state != "running" or not state.tasks_done:
                    continue
                node = next((raylets[pid] for pid in parents(held.pid) if pid in raylets), None)
                if node is not None:
                    self.cluster.remove_node(node, allow_graceful=False)
                    self.victim = planned
                    break


def on_ray(plan: Sequence[Planned], root: Path) -> dict[str, Any]:
    """Does the plan on three nodes, one of which is killed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": OBJECTS, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=OBJECTS)
        cluster.wait_for_nodes()
        killer = Killer(cluster, plan)
        killer.start()
        began = time.perf_counter()
        outcomes = execute(plan, engine="ray", address=cluster.address, root=root)
        return {
            "seconds": time.perf_counter() - began,
            "finished": sum(o.code == 0 for o in outcomes),
            "errors": [f"{o.planned.label}: {o.error}" for o in outcomes if o.code],
            "killed_node_ran": killer.victim and killer.victim.label,
            "nodes_left": len(cluster.list_all_nodes()),
        }
    finally:
        cluster.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=1, help="how long the runs are")
    parser.add_argument("--only-glyphs", action="store_true", help="three runs instead of 24")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        grid = make_plan(root / "ray", args.scale, args.only_glyphs)
        series = make_plan(root / "serial", args.scale, args.only_glyphs)
        told = on_ray(grid, root / "ray")
        began = time.perf_counter()
        execute(series, quiet=True)
        serial = time.perf_counter() - began
        same = sum(
            (a.out / "record.json").is_file()
            and comparable(load_record(a.out)) == comparable(load_record(b.out))
            and load_record(a.out).finished
            for a, b in zip(grid, series, strict=True)
        )
        result = {
            "runs": len(grid),
            **told,
            "records_equal_to_serial": same,
            "serial_seconds": serial,
            "ratio_to_serial": told["seconds"] / serial,
        }
    print(json.dumps(result, indent=1))
    return 0 if same == len(grid) and told["killed_node_ran"] else 1


if __name__ == "__main__":
    sys.exit(main())
