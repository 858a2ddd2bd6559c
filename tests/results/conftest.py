"""Run directories as the runner writes them, made from a matrix of correct answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

WriteRun = Callable[..., Path]

#: correct answers out of 100: rows after task 1, 2, 3
CORRECT = [[90], [70, 80], [60, 50, 100]]


def record_data(
    correct: Sequence[Sequence[int] | None] = CORRECT,
    *,
    label: str = "clora",
    method: str = "clora",
    seed: int = 0,
    preset: str = "glyphs",
    joint: bool = False,
    status: str = "finished",
    total: int = 100,
    trained: int = 2_000,
    stored: int = 5_000,
    seconds: float = 12.0,
) -> dict[str, Any]:
    n = len(correct)
    rows = [
        {"after_task": i, "correct": list(row), "total": [total] * len(row)}
        for i, row in enumerate(correct)
        if row is not None
    ]
    tasks: list[int | None] = [None] if joint else list(range(n))
    return {
        "format": "dualcl-record",
        "version": 1,
        "status": status,
        "error": "loss is NaN" if status == "failed" else None,
        "run": {
            "preset": preset,
            "domain": "classification",
            "method": method,
            "seed": seed,
            "n_tasks": n,
            "joint": joint,
            "label": label,
        },
        "config": {"preset": preset, "seed": seed, "train": {"epochs": 3}, "method": {"rank": 8}},
        "config_hash": f"abc{seed}",
        "sources": {"train.epochs": "preset glyphs", "method.rank": "--set", "seed": "--seed"},
        "identity": {
            "data": "glyphs",
            "split_name": "all",
            "split_hash": "5b1d",
            "class_order": [3, 1, 2, seed],
            "order_seed": seed,
            "backbone": "vit_tiny",
            "weights_sha256": "00ff",
            "preprocess": {"mean": 0.5, "size": 32},
        },
        "network": {"parameters": 100_000, "skipped_images": []},
        "tasks": [
            {
                "task": t,
                "name": f"task {t}",
                "classes": ["umbrella"],
                "n_train": 800,
                "n_test": total,
                "steps": 50,
                "final_loss": 0.5,
                "parameters_trained": trained,
                "parameters_stored": stored,
                "diagnostics": {},
            }
            for t in tasks
        ],
        "matrix": {"kind": "accuracy", "rows": rows},
        "measured": {
            "tasks": [{"task": t, "train_seconds": 1.0, "eval_seconds": 0.4, "peak_mib": 512.0} for t in tasks],
            "wall_seconds": seconds,
        },
        "environment": {"dualcl": "0.1.0", "commit": "c0ffee", "dirty": False, "torch": "2.4", "device": "cpu"},
        "created": "2030-01-01T00:00:00",
        "finished": "2030-01-01T00:01:00",
    }


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """write_run(correct, edit=..., log=..., **record_data's keywords) -> the run directory, below tmp_path/runs."""

    def write(
        correct: Sequence[Sequence[int] | None] = CORRECT,
        *,
        edit: Callable[[dict[str, Any]], object] | None = None,
        log: Sequence[dict[str, Any]] = (),
        name: str = "",
        **keywords: Any,
    ) -> Path:
        data = record_data(correct, **keywords)
        if edit:
            edit(data)
        run = data["run"]
        folder = tmp_path / "runs" / (name or f"{run['preset']}-{run['label'].replace('/', '_')}-{run['seed']}")
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(data), encoding="utf-8")
        if log:
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
        return folder

    return write
