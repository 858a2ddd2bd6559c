"""`dualcl bench report`: seconds and memory of `dualcl report` on as many records as a large study leaves."""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.bench import fixed, measure_all, positive_count
from dualcl.benchmark.environment import resident_peak_mib
from dualcl.benchmark.errors import RunFailed, UserError
from dualcl.results.records import find_records, record_checksum

#: one wide and one deep grid of about 10,000 runs
GRIDS = "1x20x500,77x13x10"


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


# --- measuring --------------------------------------------------------------------------------------------------------


def _tree_mib(pid: int) -> float:
    """Memory of a process and of those that it started, shared pages counted once (PSS)."""
    total = 0.0
    pids = [pid]
    while pids:
        place = Path(f"/proc/{pids.pop()}")
        try:
            for line in (place / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) / 1024
            for thread in (place / "task").iterdir():
                pids += [int(child) for child in (thread / "children").read_text().split()]
        except OSError:
            continue  # ended since
    return total


def measure(runs: Path, out: Path, options: Sequence[str]) -> dict[str, float]:
    """`dualcl report RUNS --out OUT` once, as a user calls it: seconds, seconds of CPU, peak MiB. Raises RunFailed."""
    import resource

    command = [sys.executable, "-m", "dualcl.benchmark.cli", "report", str(runs), "--out", str(out), *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    peak = 0.0
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=said, cwd=out.parent) as child:
        while child.poll() is None:
            # not its rusage, which counts the memory of the process that started it, too
            peak = max(peak, _tree_mib(child.pid), resident_peak_mib(child.pid) or 0.0)
            time.sleep(0.2)  # a look holds up what it looks at
        seconds = time.perf_counter() - started
        said.seek(0)
        if child.returncode:
            raise RunFailed(f"dualcl report: {said.read().decode('utf-8', 'replace').strip().splitlines()[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "mib": peak,
        "files": float(sum(len(names) for _, _, names in os.walk(out))),
        "written_mib": sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 2**20,
    }


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dualcl bench report`."""
    parser.description = (
        "Writes records and logs in the likeness of given runs (numbers varied, streams and seeds new), calls "
        "`dualcl report` on them, and prints its time and its peak memory."
    )
    parser.add_argument("dirs", type=Path, nargs="+", metavar="DIR", help="runs of one stream to make others like")
    parser.add_argument(
        "--grids",
        type=parse_grids,
        default=GRIDS,
        metavar="SxMxN,...",
        help="streams x methods x seeds; default %(default)s",
    )
    parser.add_argument("--repeats", type=positive_count, default=1, metavar="N", help="reports; default %(default)s")
    parser.add_argument("--report", default="", metavar="OPTIONS", help='of the report, such as "--format html,csv"')
    parser.add_argument("--format", choices=("text", "md", "json"), default="text", help="default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the output to this file too")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def main(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes `--out`; returns the exit code."""
    patterns = read_patterns(args.dirs)

    def work(grid: Grid) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="dualcl-report-") as folder:
            runs, out = Path(folder) / "runs", Path(folder) / "report"
            write_grid(patterns, grid, runs)
            found = [measure(runs, out, shlex.split(args.report)) for _ in range(args.repeats)]
            read = sum(p.stat().st_size for p in runs.rglob("*") if p.is_file()) / 2**20
        return {
            "like": next(iter(patterns.values()))[0].data["run"]["preset"],
            **{"streams": grid.streams, "methods": grid.methods, "seeds": grid.seeds, "records": grid.records},
            "read_mib": read,
            **{key: statistics.median(each[key] for each in found) for key in found[0]},
        }

    return measure_all(args, [(str(grid), grid) for grid in args.grids], work, render)


HEADER = ("streams x methods x seeds", "records", "MiB read", "seconds", "CPU s", "peak MiB", "files", "MiB written")


def rows_as_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table, HEADER first."""
    keys = ("read_mib", "seconds", "cpu_seconds", "mib", "files", "written_mib")
    digits = (0, 1, 1, 0, 0, 1)
    return [
        [*HEADER],
        *(
            [
                f"{row['streams']} x {row['methods']} x {row['seeds']}",
                str(row["records"]),
                *(fixed(row[key], n) for key, n in zip(keys, digits, strict=True)),
            ]
            for row in rows
        ),
    ]


def render(args: argparse.Namespace, results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The output in the wanted format, ending in a line break."""
    from dualcl.benchmark.compare import align
    from dualcl.benchmark.environment import environment

    rows = [row for _, row in results]
    if args.format == "json":
        value = {"repeats": args.repeats, "report": args.report, "environment": environment(), "rows": rows}
        return json.dumps(value, indent=1, allow_nan=False) + "\n"
    table = rows_as_cells(rows)
    if args.format == "md":
        rule = ["---", *["---:"] * (len(HEADER) - 1)]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in (table[0], rule, *table[1:]))
    return "\n".join(align(table, range(1, len(HEADER)))) + "\n"
