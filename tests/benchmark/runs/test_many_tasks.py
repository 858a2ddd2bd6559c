"""A task among many costs what an early one does, but for the images that its evaluation looks at again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.files import Growing, json_text
from dualcl.benchmark.domains.classification import Classification
from dualcl.benchmark.runs.folder import RunFolder, new_record
from dualcl.benchmark.runs.progress import Reporter
from dualcl.benchmark.runs.runner import Run
from dualcl.datasets.base import ArrayImages, ClassData, ImageSet
from dualcl.results.records import load_record

PRESET = """
domain: classification
data: {name: glyphs}
stream: {tasks: TASKS, class_order: natural}
backbone:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {img_size: 16, patch_size: 8, depth: 1, embed_dim: 16, num_heads: 1}
train: {epochs: 1, batch_size: 4, log_every: 1}
input: {workers: 0, cache_gib: 0}
threads: 1
"""


class Counted(Run):
    """Counts the calls of functions, Python's and C's, in each task."""

    def _stage(self, record: Any, task: int, *given: Any) -> None:
        calls = 0

        def tally(frame: Any, event: str, what: Any) -> None:
            nonlocal calls
            calls += event.endswith("call")

        sys.setprofile(tally)
        super()._stage(record, task, *given)
        sys.setprofile(None)
        self.calls[task] = calls
        self.logs[task] = (self.folder.path / "log.jsonl").stat().st_ino if steps(self) else None


def steps(run: Run) -> bool:
    return run.method.takes_steps(0)


def counted(method: str, tasks: int, per_task: int, place: Path) -> Counted:
    preset = place / "many.yaml"
    preset.write_text(PRESET.replace("TASKS", str(tasks)))
    n = tasks * per_task
    pixels = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    images = ImageSet(tuple(map(str, range(n))), np.arange(n), ArrayImages(pixels), "many")
    data = ClassData("many", tuple(f"class {i}" for i in range(n)), images, images, "all", "all")
    resolved = resolve(str(preset), method)
    domain = Classification(resolved, torch.device("cpu"), data)
    run = Counted(resolved, RunFolder(place / "run"), Reporter(quiet=True), domain)
    run.calls, run.logs = {}, {}
    record = new_record(
        {"preset": "many", "domain": "classification", "method": method, "label": method, "table": "many", "seed": 0,
         "n_tasks": tasks, "joint": False, "caveats": [], "tuning": ""},
        resolved.tree(), config_hash="", sources={}, identity={}, network={"parameters": 1}, environment={},
    )  # fmt: skip
    with run.folder.locked():
        run.record = run.execute(record)
    return run


def test_calls_per_task_grow_by_the_images_evaluated_alone(tmp_path: Path) -> None:
    for method, per_task in (("ncm", 1), ("linear_probe", 2)):
        (place := tmp_path / method).mkdir()
        run = counted(method, 52, per_task, place)
        first, later = (run.calls[b] - run.calls[a] for a, b in ((10, 30), (30, 50)))
        assert later < 1.1 * first  # no task looks at pairs of tasks
        assert first / 20 < 300  # one batch of test images, and two tensors of the checkpoint
        assert len(set(run.logs.values())) == 1  # the log is not written anew
        assert load_record(place / "run").data == json.loads(json.dumps(run.record))


class Entry(dict[str, Any]):
    """An entry that counts how often its text was made."""

    made = 0

    def items(self) -> Any:
        self.made += 1
        return super().items()


def test_an_entry_that_was_written_is_not_written_out_again() -> None:
    entries = [Entry(b=[1, 2.5], a=(None, "é\n"), c={"2": True, "10": float(i)}) for i in range(3)]
    rows = Growing(entries[:1])
    tree: dict[str, Any] = {"z": (1,), "matrix": {"rows": rows, "kind": "x"}, "a": Growing()}
    for entry in (None, *entries[1:]):
        if entry is not None:
            rows.append(entry)
        plain = json.loads(json.dumps({**tree, "matrix": {"rows": [dict(e) for e in rows], "kind": "x"}}))
        assert json.loads(json_text(tree)) == plain
        assert json_text(tree, sort_keys=True) == json.dumps(plain, sort_keys=True)
    assert [e.made for e in entries] == [entries[0].made] * 3
