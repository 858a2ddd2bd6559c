"""`dualcl bench step`: speed and memory of every method's training step and evaluation, beside the bare backbone's."""

from __future__ import annotations

import argparse
import csv
import io
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dualcl.benchmark.config.presets import load_preset
from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import RunFailed, UserError
from dualcl.benchmark.core.reading import parse_names
from dualcl.benchmark.core.settings import parse_assignment
from dualcl.benchmark.core.text import align, say
from dualcl.methods import method_class, method_info
from dualcl.results.files import write_text

if TYPE_CHECKING:
    from dualcl.methods.base import Method

#: where the methods' hyper-parameters and the optimiser come from
PRESET = "imagenet-r-10"
METHODS = "clora,lora,coda_prompt,dualprompt,l2p"
#: tasks a method is told of, where the measured ones do not ask for more: prompt pools are shared out among them
PLANNED_TASKS = 10
MAY_SET = (
    *("methods.", "method.", "backbone.kwargs.", "backbone.gradient_checkpointing"),
    *("train.optimizer", "train.grad_clip"),
)
SETUP = ("backbone", "image_size", "batch", "precision", "repeats", "device", "threads", "torch", "timm", "dualcl")

J = TypeVar("J")


@dataclass(frozen=True)
class Job:
    """One process's work: `method` (None: the bare backbone) at each of `tasks` (counted from 1, ascending)."""

    preset: str
    method: str | None
    sets: Sequence[str]
    tasks: Sequence[int]
    repeats: int
    #: training and tensors only, at several tasks of one growing run
    grow: bool


def positive_count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number from 1 on, got {text!r}")
    return int(text)


def ascending_counts(text: str) -> list[int]:
    """Ascending whole numbers from 1 on such as 2,10,50, for argparse."""
    counts = [positive_count(part.strip()) for part in text.split(",")]
    if sorted(set(counts)) != counts:
        raise argparse.ArgumentTypeError(f"wants ascending task numbers such as 2,10,50, got {text!r}")
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dualcl bench step`."""
    parser.description = (
        "Time and memory of training steps and evaluations on random weights and random images (speed depends on "
        f"neither; nothing is downloaded), with the hyper-parameters of the preset {PRESET}. Each method has a process "
        "of its own; its steps alternate with the bare backbone's."
    )
    parser.add_argument("--methods", default=METHODS, metavar="A,B,C", help="default %(default)s")
    add_sizes(parser, batch=16)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default %(default)s")
    parser.add_argument(
        "--repeats", type=positive_count, default=7, metavar="N", help="timed pairs; default %(default)s"
    )
    when = parser.add_mutually_exclusive_group()
    when.add_argument(
        "--task", type=positive_count, default=2, metavar="N", help="measure in task N, from 1 on; default %(default)s"
    )
    when.add_argument(
        "--grow",
        type=ascending_counts,
        metavar="N,N,...",
        help="instead: step time, memory and tensors at these tasks of a run",
    )
    add_shared(parser, "methods.clora.rank=16 or backbone.kwargs.depth=6")


def add_sizes(parser: argparse.ArgumentParser, batch: int) -> None:
    """Adds --backbone, --image-size and --batch."""
    parser.add_argument(
        "--backbone", default="vit_base_patch16_224", metavar="NAME", help="a ViT of timm; default %(default)s"
    )
    parser.add_argument("--image-size", type=positive_count, default=224, metavar="PX", help="default %(default)s")
    parser.add_argument(
        "--batch", type=positive_count, default=batch, metavar="N", help="images per step; default %(default)s"
    )


def add_settings(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds --set; `example` of what it takes."""
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"other settings, such as {example}",
    )


def add_shared(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds the arguments of every kind of measurement; `example` of what --set takes."""
    parser.add_argument("--threads", type=positive_count, metavar="N", help="CPU threads; default: torch's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default %(default)s")
    add_settings(parser, example)
    parser.add_argument("--format", choices=("text", "md", "csv", "json"), default="text", help="default %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the output to this file too")
    # SUPPRESS: `dualcl bench --debug step` has set it already
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def main(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes `--out`; returns the exit code."""
    return measure_all(args, [(job.method or "backbone", job) for job in plan(args)], measure, render)


def measure_all(
    args: argparse.Namespace,
    jobs: Sequence[tuple[str, J]],
    work: Callable[[J], dict[str, Any]],
    show: Callable[[argparse.Namespace, Sequence[tuple[str, dict[str, Any]]]], str],
) -> int:
    """Does the named jobs one after another, prints what `show` makes of the results and writes `--out`; returns 0.

    A method that cannot be measured does not stop the others: its error (UserError or RunFailed) is raised after the
    table of the rest. Mistakes that show before the first measurement are raised at once.
    """
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: the folder {args.out.parent} does not exist; make it first")
    results: list[tuple[str, dict[str, Any]]] = []
    errors: list[Exception] = []
    for number, (name, job) in enumerate(jobs, start=1):
        say(f"[{number}/{len(jobs)}] {name}")
        try:
            results.append((name, work(job)))
        except (UserError, RunFailed) as error:
            say(f"{name}: {error}")
            errors.append(error)
    if results:
        text = show(args, results)
        print(text, end="")
        if args.out is not None:
            write_text(args.out, text)
            say(f"written to {args.out}")
    if errors:
        raise errors[0]
    return 0


def plan(args: argparse.Namespace) -> list[Job]:
    """The processes to run, checked; the bare backbone has one of its own unless the table is about growth."""
    tasks = args.grow or [args.task]
    planned = max(tasks[-1], 1 if args.grow else PLANNED_TASKS)
    sets = settings(args, "step", tasks=planned, precision=args.precision)
    sets += [f"device={json.dumps(args.device)}", f"threads={'none' if args.threads is None else args.threads}"]
    domain = load_preset(PRESET).domain
    names: list[str | None] = [*parse_names(args.methods, "methods")]
    for name in names:
        one_by_one(str(name), domain, "step")
        resolve(PRESET, str(name), sets)
    if not args.grow:
        names.insert(0, None)
    return [Job(PRESET, name, sets, tasks, args.repeats, bool(args.grow)) for name in names]


def one_by_one(name: str, domain: str, kind: str) -> type[Method]:
    """The method, which must learn every task by steps of its own; UserError otherwise."""
    method_info(name, domain)
    cls = method_class(name)
    own = [c for c in cls.__mro__ if "takes_steps" in vars(c)]
    if cls.joint or len(own) > 1:
        raise UserError(f"{name} does not take training steps in each task, which bench {kind} measures; leave it out")
    return cls


def settings(args: argparse.Namespace, kind: str, tasks: int, precision: str) -> list[str]:
    """What a run on random images is told, --set included. UserError for a --set that would change more than speed."""
    for key, _ in map(parse_assignment, args.sets):
        if not key.startswith(MAY_SET):
            raise UserError(
                f"--set {key}: bench {kind} takes only {', '.join(k + '*' * k.endswith('.') for k in MAY_SET)}"
            )
    return [
        *args.sets,
        f"backbone.name={json.dumps(args.backbone)}",
        "backbone.pretrained=false",
        f"backbone.kwargs.img_size={args.image_size}",
        f"precision={precision}",
        f"train.batch_size={args.batch}",
        f"train.epochs={args.repeats + 16}",  # one batch each; a few more than are timed
        "train.drop_last=true",
        f"eval.batch_size={args.batch}",
        f"stream.tasks={tasks}",
        "input.augment=flip",
        "input.resize=none",
        "input.workers=0",
    ]


def measure(job: Job) -> dict[str, Any]:
    """Does `job` in a fresh process, so that no method's memory hides another's; raises UserError or RunFailed."""
    return in_process("dualcl.benchmark.speed.step_work", job.method or "backbone", asdict(job))


def in_process(module: str, name: str, job: dict[str, Any]) -> dict[str, Any]:
    """The result of `module` run as a process with `job` on its stdin; raises UserError or RunFailed, naming `name`."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    if done.returncode < 0:
        why = " (out of memory? try a smaller --batch)" if done.returncode == -signal.SIGKILL else ""
        raise RunFailed(f"{name}: killed by signal {-done.returncode}{why}")
    if done.returncode or not done.stdout.strip():
        raise RunFailed(f"{name}: its process ended with code {done.returncode}; its own message is above")
    return result_of(name, done.stdout)


def result_of(name: str, stdout: str) -> dict[str, Any]:
    """The result in the last line that a process printed. Raises UserError."""
    reply: dict[str, Any] = json.loads(stdout.strip().splitlines()[-1])
    if "error" in reply:
        raise UserError(f"{name}: {reply['error']}")
    result: dict[str, Any] = reply["result"]
    return result


# --- numbers ----------------------------------------------------------------------------------------------------------


def _speed(point: dict[str, Any], part: str) -> dict[str, float | None]:
    """Median images/s of a part, and the median, least and most time in units of the bare pass beside it."""
    keys = [f"{part}_{k}" for k in ("images_per_s", "time_ratio", "time_ratio_min", "time_ratio_max")]
    if part not in point:
        return dict.fromkeys(keys)
    times = point[part]["seconds"]
    bare = point[part].get("bare_seconds", times)
    ratios = [ours / theirs for ours, theirs in zip(times, bare, strict=True)]
    speed = point[part]["images"] / statistics.median(times)
    return dict(zip(keys, [speed, statistics.median(ratios), min(ratios), max(ratios)], strict=True))


def step_rows(results: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One flat row per method: training, first and later evaluation, peak of training."""
    rows = []
    for name, result in results:
        point = result["points"][0]
        row: dict[str, Any] = {"method": name, "task": point["task"]}
        for part in ("train", "first", "later"):
            row.update(_speed(point, part))
        rows.append({**row, **{f"peak_{k}_mib": v for k, v in point["peak_mib"].items()}})
    return rows


def grow_rows(results: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One flat row per method and task, each quantity also as a ratio to the method's first row."""
    rows = []
    for name, result in results:
        first: dict[str, Any] = {}
        for point in result["points"]:
            row = {
                "method": name,
                "task": point["task"],
                "step_seconds": statistics.median(point["train"]["seconds"]),
                "step_time_ratio": _speed(point, "train")["train_time_ratio"],
                **{f"peak_{k}_mib": v for k, v in point["peak_mib"].items()},
                "live_mib": point["live_mib"],
                "tensors": point["tensors"],
                "numbers": point["numbers"],
            }
            first = first or row
            ratios = {
                f"{key}_to_first": None if value is None else value / first[key]
                for key, value in row.items()
                if key not in ("method", "task")
            }
            rows.append({**row, **ratios})
    return rows


# --- tables -----------------------------------------------------------------------------------------------------------


def render(args: argparse.Namespace, results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The output in the wanted format, ending in a line break."""
    setup = {
        "backbone": args.backbone,
        "image_size": args.image_size,
        "batch": args.batch,
        "precision": args.precision,
        "repeats": args.repeats,
        **{key: results[0][1][key] for key in ("device", "threads")},
        **results[0][1]["environment"],
    }
    rows = grow_rows(results) if args.grow else step_rows(results)
    settings = {name: result["settings"] for name, result in results if result["settings"]}
    value = {"setup": {**setup, "sets": args.sets}, "settings": settings, "rows": rows}
    cuda = any(row["peak_cuda_mib"] is not None for row in rows)
    table = _grow_table(rows, cuda) if args.grow else _step_table(rows, cuda)
    notes = _grow_notes(cuda) if args.grow else _step_notes(args, cuda)
    about = ", ".join(f"{key.replace('_', ' ')} {setup[key]}" for key in SETUP)
    right, known = range(1, len(table[0])), {key: setup[key] for key in SETUP}
    return formatted(args.format, value, rows, known, table, [about, *notes], right)


def formatted(
    kind: str,
    value: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    setup: Mapping[str, Any],
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
    right: range,
) -> str:
    """`value` as JSON, `rows` with `setup` as CSV, or `table` with `notes` as md or text; `right` are its numbers."""
    if kind == "json":
        return json.dumps(value, indent=1, allow_nan=False) + "\n"
    if kind == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, [*rows[0], *setup], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **setup} for row in rows)
        return out.getvalue()
    if kind == "md":
        rule = ["---:" if i in right else "---" for i in range(len(table[0]))]
        lines = [f"| {' | '.join(cells)} |" for cells in (table[0], rule, *table[1:])]
        return "\n".join([*lines, "", *[f"- {note}" for note in notes]]) + "\n"
    return "\n".join([*align(table, right), "", *notes]) + "\n"


def fixed(value: float | None, digits: int) -> str:
    """A cell with so many digits after the point; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(row: dict[str, Any], part: str) -> str:
    middle, least, most = (row[f"{part}_time_ratio{end}"] for end in ("", "_min", "_max"))
    return "-" if middle is None else f"{middle:.2f} ({least:.2f}-{most:.2f})"


def _step_table(rows: Sequence[dict[str, Any]], cuda: bool) -> list[list[str]]:
    parts = {"train": "train", "first": "first eval", "later": "later eval"}
    header = ["method", *(f"{label} {what}" for label in parts.values() for what in ("img/s", "time / bare"))]
    table = [[*header, *(["peak GPU MiB"] if cuda else []), "peak process MiB"]]
    for row in rows:
        cells = [row["method"]]
        for part in parts:
            cells += [fixed(row[f"{part}_images_per_s"], 1), _spread(row, part) if row["task"] else "1"]
        if not row["task"]:
            cells[-1] = "-"
        cells += [fixed(row["peak_cuda_mib"], 0)] if cuda else []
        table.append([*cells, fixed(row["peak_process_mib"], 0)])
    return table


def _step_notes(args: argparse.Namespace, cuda: bool) -> list[str]:
    return [
        f"train: steps of task {args.task}, from fetching the batch to the updated weights; "
        "bare: forward, and backward to the input through frozen weights",
        "eval: one task's test images, from fetching the batch to the predictions; bare: forward",
        "first eval: the prompt methods' query pass included, as in the first evaluation of a task; later eval: with "
        "the query features kept from it. Methods that change the weights in each task have first evaluations only",
        "time / bare: median (least-most) over pairs measured one right after the other; img/s: median",
        "peak: of training steps, without the bare backbone beside them; "
        + ("GPU: allocated; " if cuda else "")
        + "process: resident set, libraries and backbone included",
    ]


def _grow_table(rows: Sequence[dict[str, Any]], cuda: bool) -> list[list[str]]:
    columns = [
        ("step ms", "step_seconds", 1e3, 1),
        ("time / bare", "step_time_ratio", 1, 2),
        *([("peak GPU MiB", "peak_cuda_mib", 1, 1)] if cuda else []),
        ("peak process MiB", "peak_process_mib", 1, 1),
        ("live MiB", "live_mib", 1, 2),
        ("tensors", "tensors", 1, 0),
        ("numbers", "numbers", 1, 0),
    ]
    table = [["method", "task", *(cell for label, *_ in columns for cell in (label, "to first"))]]
    for row in rows:
        cells = [row["method"], str(row["task"])]
        for _, key, factor, digits in columns:
            value = row[key]
            cells += [fixed(None if value is None else value * factor, digits), fixed(row[f"{key}_to_first"], 3)]
        table.append(cells)
    return table


def _grow_notes(cuda: bool) -> list[str]:
    return [
        "step: from fetching the batch to the updated weights, median; time / bare: median over pairs with the bare "
        "backbone's forward and backward to the input",
        "peak: of training steps, the bare backbone beside them included; "
        + ("GPU: allocated; " if cuda else "")
        + "process: resident set; live: all tensors Python holds, classifier rows of all tasks included",
        "tensors, numbers: held by the method (parameters, buffers) and its optimiser",
    ]
