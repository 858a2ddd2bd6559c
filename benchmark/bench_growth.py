"""`dualcl bench growth`: images per second and memory against number of tasks and classes, rank and image size."""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualcl.benchmark.bench import (
    PLANNED_TASKS,
    PRESET,
    add_settings,
    add_sizes,
    ascending_counts,
    fixed,
    positive_count,
    say,
    settings,
)
from dualcl.benchmark.bench_classification import ADAPTER, CLASSES_PER_TASK, SET_EXAMPLE, write_batch
from dualcl.benchmark.bench_pairs import PEERS, WORKER, WorkerProcess, command_line
from dualcl.benchmark.compare import align, parse_names
from dualcl.benchmark.config import resolve
from dualcl.benchmark.errors import RunFailed, UserError

#: what grows, and how the table and the plot call it
AXES = {"tasks": "tasks", "classes": "classes", "ranks": "rank", "image_sizes": "image size"}
COLUMNS = (
    ("training img/s", "train_images_per_s", 1),
    ("evaluation img/s", "eval_images_per_s", 1),
    ("peak MiB", "peak_mib", 0),
    ("peak process MiB", "peak_process_mib", 0),
)


@dataclass(frozen=True)
class Point:
    """One measurement: a method where `axis` has `value`, and what our adapter is told."""

    method: str
    axis: str
    value: int
    setup: dict[str, Any]
    image_size: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dualcl bench growth`."""
    parser.description = (
        "Speed and memory of training steps and evaluation as one thing grows and the others stay, on random weights "
        f"and images, with the hyper-parameters of the preset {PRESET}; each point has a process of its own. Where "
        "nothing else grows: task 2, two classes a task, the preset's rank, --image-size."
    )
    parser.add_argument("--methods", default="clora", metavar="A,B,C", help="default %(default)s")
    for option, values, text in (
        ("tasks", "1,10,50", "at these tasks of one stream"),
        ("classes", "10,100,1000", "with so many classes seen, in two tasks"),
        ("ranks", "4,16,64", "with these ranks (methods that have one)"),
        ("image-sizes", "112,224,384", "at these sizes, px"),
    ):
        parser.add_argument(
            f"--{option}",
            type=ascending_counts,
            default=ascending_counts(values),
            metavar="N,N,...",
            help=f"{text}; default {values}",
        )
    add_sizes(parser, batch=4)
    add_settings(parser, SET_EXAMPLE)
    parser.add_argument(
        "--repeats", type=positive_count, default=3, metavar="N", help="timed steps; default %(default)s"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default %(default)s")
    parser.add_argument("--threads", type=positive_count, metavar="N", help="CPU threads; default: torch's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default %(default)s")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="folder for growth.json, .csv, .png and .svg"
    )
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.set_defaults(bench_parser=parser)


def main(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes the files; returns the exit code."""
    from dualcl.benchmark.environment import environment, pick_device
    from dualcl.benchmark.runner import device_name
    from dualcl.results.files import write_text

    if not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: the folder {args.out.parent} does not exist; make it first")
    found = list(points(args))
    device = pick_device(args.device)
    rows, threads, errors = [], args.threads, []
    with tempfile.TemporaryDirectory(prefix="dualcl-bench-") as folder:
        for number, point in enumerate(found, start=1):
            name = f"{point.method}, {AXES[point.axis]} {point.value}"
            say(f"[{number}/{len(found)}] {name}")
            batch = Path(folder, f"{point.image_size}.safetensors")
            setup = {
                **point.setup,
                "batch": write_batch(batch, args.batch, point.image_size),
                "device": str(device),
                "threads": args.threads,
            }
            try:
                row, threads = measure(name, setup, args.repeats)
            except (UserError, RunFailed) as error:
                say(str(error))
                errors.append(error)
                continue
            rows.append({"method": point.method, "axis": AXES[point.axis], "value": point.value, **row})
    if rows:
        value = {
            "kind": "growth",
            "command": f"{command_line(args, 'growth')} --out DIR",
            "setup": {
                "backbone": args.backbone,
                "image_size": args.image_size,
                "batch": args.batch,
                "precision": args.precision,
                "repeats": args.repeats,
            },
            "device": device_name(device),
            "threads": threads,
            "environment": environment(),
            "rows": rows,
        }
        args.out.mkdir(exist_ok=True)
        write_text(args.out / "growth.json", json.dumps(value, indent=1, allow_nan=False) + "\n")
        write_text(args.out / "growth.csv", csv_text(rows))
        write_plots(rows, args.out)
        print("\n".join(align(table(rows), range(2, 3 + len(COLUMNS)))))
        print(f"written to {args.out}", file=sys.stderr)
    if errors:
        raise errors[0]
    return 0


def points(args: argparse.Namespace) -> Iterator[Point]:
    """What to measure, checked."""
    from dualcl.methods import method_class, method_info

    for method in parse_names(args.methods, "methods"):
        method_info(method, "classification")
        cls = method_class(method)
        if cls.joint or not cls.takes_steps:
            raise UserError(f"{method} takes no training steps task by task, which bench growth measures; leave it out")
        for axis in AXES:
            if axis == "ranks" and not hasattr(cls.Config, "rank"):
                continue
            for value in getattr(args, axis):
                yield _point(args, method, axis, value)


def _point(args: argparse.Namespace, method: str, axis: str, value: int) -> Point:
    size = value if axis == "image_sizes" else args.image_size
    tasks, task, classes = PLANNED_TASKS, 2, CLASSES_PER_TASK
    if axis == "tasks":
        tasks, task = args.tasks[-1], value
    if axis == "classes":
        if value < 2 * CLASSES_PER_TASK or value % 2:
            raise UserError(f"--classes {value}: wants even numbers from {2 * CLASSES_PER_TASK} on")
        tasks, classes = 2, value // 2
    sets = settings(args, "growth", tasks, args.precision)
    sets += [f"backbone.kwargs.img_size={size}"]
    sets += [f"method.rank={value}"] if axis == "ranks" else []
    resolve(PRESET, method, sets)
    setup = {
        "preset": PRESET,
        "method": method,
        "sets": sets,
        "task": task,
        "tasks": tasks,
        "classes_per_task": classes,
        "batch_size": args.batch,
    }
    return Point(method, axis, value, setup, size)


def measure(name: str, setup: dict[str, Any], repeats: int) -> tuple[dict[str, float], int | None]:
    """(speed and peak of training and of a first evaluation, threads) in a fresh process. UserError or RunFailed."""
    worker = WorkerProcess(name, [sys.executable, str(WORKER), str(PEERS / f"{ADAPTER}.py")], setup["threads"])
    try:
        made = worker.ask("ok", do="make", setup=setup)
        speeds: dict[str, float] = {}
        peak: dict[str, float] = {}
        for part, work in (("train", "step"), ("eval", "first_evaluation")):
            worker.ask("seconds", do="time", work=work)
            worker.ask("mib", do="peak")
            times = [worker.ask("seconds", do="time", work=work) for _ in range(repeats)]
            peak = peak or worker.ask("mib", do="peak")
            speeds[f"{part}_images_per_s"] = statistics.median(t["images"] / t["seconds"] for t in times)
    except BaseException:
        worker.kill()
        raise
    worker.close()
    return {**speeds, "peak_mib": peak["mib"], "peak_process_mib": peak["process_mib"]}, made.get("threads")


# --- output -----------------------------------------------------------------------------------------------------------


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and cells."""
    body = [
        [r["method"], r["axis"], str(r["value"]), *(fixed(r[key], digits) for _, key, digits in COLUMNS)] for r in rows
    ]
    return [["method", "what grows", "to", *(label for label, *_ in COLUMNS)], *body]


def write_plots(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """growth.png and growth.svg."""
    from dualcl.results.plots import save_figure
    from dualcl.results.speed_page import growth_figure

    for suffix in ("png", "svg"):
        save_figure(growth_figure(rows), out / f"growth.{suffix}")
