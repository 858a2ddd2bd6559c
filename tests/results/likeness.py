"""Records like given ones, as many as a large study leaves."""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.speed.common import positive_count
from dualcl.results.records import find_records, record_checksum


@dataclass(frozen=True)
class Grid:
    """How many streams, methods and seeds; runs are their product."""

    streams: int
    methods: int
    seeds: int

    @property
    def records(self) -> int:
        """How many runs."""
        return self.streams * self.methods * self.seeds

    def __str__(self) -> str:
        return f"{self.streams}x{self.methods}x{self.seeds}"


def parse_grids(text: str) -> list[Grid]:
    """`1x20x500,77x13x10` -> Grids, for argparse."""
    grids = []
    for word in text.split(","):
        numbers = [positive_count(part.strip()) for part in word.split("x")]
        if len(numbers) != 3:
            raise argparse.ArgumentTypeError(f"wants streams x methods x seeds such as 77x13x10, got {word!r}")
        grids.append(Grid(*numbers))
    return grids


# --- records ----------------------------------------------------------------------------------------------------------


def _near(value: float, chance: random.Random) -> float:
    return value * chance.uniform(0.9, 1.1)


def _varied(row: dict[str, Any], chance: random.Random) -> None:
    """Another seed's row of a matrix: every number near the old one, and still a valid row."""
    if "correct" in row:
        row["correct"] = [
            min(n, max(0, c + chance.randint(-n // 20, n // 20)))
            for c, n in zip(row["correct"], row["total"], strict=True)
        ]
        return
    for field in ("mmd", "drift", "image_similarity", "text_similarity"):
        row[field] = [None if value is None else _near(value, chance) for value in row[field]]
    row["nearest_correct"] = [
        right if right is None else min(n, max(0, right + chance.randint(-1, 1)))
        for right, n in zip(row["nearest_correct"], row["generated"], strict=True)
    ]


def likeness(pattern: dict[str, Any], stream: str, label: str, seed: int) -> dict[str, Any]:
    """A record like `pattern` with another stream, label and seed, as if a run had written it."""
    chance = random.Random(f"{stream} {label} {seed}")
    data = copy.deepcopy(pattern)
    data["run"].update(preset=stream, table=stream, label=label, seed=seed)
    data["config"].update(preset=stream, seed=seed, label=None if label == data["run"]["method"] else label)
    data["config_hash"] = f"{chance.getrandbits(64):016x}"
    if data["identity"].get("order_seed") is not None:
        data["identity"]["order_seed"] = seed
    for row in data["matrix"]["rows"]:
        _varied(row, chance)
    for task in data["tasks"]:
        for place, key in ((task, "final_loss"), *((task["diagnostics"], name) for name in task["diagnostics"])):
            if isinstance(place[key], float):
                place[key] = _near(place[key], chance)
    for task in data["measured"]["tasks"]:
        task.update({key: _near(task[key], chance) for key in ("train_seconds", "eval_seconds")})
    data["measured"]["wall_seconds"] = sum(t["train_seconds"] + t["eval_seconds"] for t in data["measured"]["tasks"])
    return data


@dataclass(frozen=True)
class _Pattern:
    """A finished run to make others like."""

    data: dict[str, Any]
    log: list[dict[str, Any]]


def read_patterns(dirs: Sequence[Path]) -> dict[str, list[_Pattern]]:
    """The finished runs below `dirs` by label, of one stream: that of the first. UserError when there are none."""
    found = [record for record in find_records(dirs) if record.finished]
    if not found:
        raise UserError(f"no finished run below {', '.join(map(str, dirs))}; give runs to make records like")
    patterns: dict[str, list[_Pattern]] = {}
    for record in found:
        if record.preset == found[0].preset:
            patterns.setdefault(record.label, []).append(_Pattern(record.data, record.log()))
    return patterns


def write_grid(patterns: dict[str, list[_Pattern]], grid: Grid, folder: Path) -> None:
    """Writes STREAM/METHOD-seedN/record.json and log.jsonl for the whole grid; numbers depend on the names alone."""
    names = sorted(patterns)
    # joint training is one row, whatever it is called: only the others get a second name
    again = [name for name in names if not patterns[name][0].data["run"]["joint"]]
    labels = {name: name for name in names[: grid.methods]}
    for number in range(grid.methods - len(labels)):
        name = again[number % len(again)]
        labels[f"{name} {number // len(again) + 2}"] = name
    for number in range(grid.streams):
        stream = f"stream-{number + 1:02}"
        for label, name in labels.items():
            for seed in range(grid.seeds):
                pattern = patterns[name][seed % len(patterns[name])]
                chance = random.Random(f"log of {stream} {label} {seed}")
                place = folder / stream / f"{label.replace(' ', '-')}-seed{seed}"
                place.mkdir(parents=True)
                data = likeness(pattern.data, stream, label, seed)
                data["sha256"] = record_checksum(data)
                (place / "record.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
                lines = [{**line, "loss": _near(line["loss"], chance)} for line in pattern.log]
                if lines:
                    text = "".join(json.dumps(line) + "\n" for line in lines)
                    (place / "log.jsonl").write_text(text, encoding="utf-8")
