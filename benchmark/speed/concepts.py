"""`dualcl bench concepts`: what customization costs at the size of Stable Diffusion, and concept after concept."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.reading import parse_names
from dualcl.benchmark.core.settings import parse_assignment
from dualcl.benchmark.speed.common import (
    add_shared,
    ascending_counts,
    fixed,
    formatted,
    in_process,
    measure_all,
    one_by_one,
    positive_count,
)

#: the methods' hyper-parameters: of the published benchmarks with Stable Diffusion, and of the bundled model
FULL_PRESET, GROW_PRESET = "celeba-hq-10", "glyph-concepts"
FULL_METHODS, GROW_METHODS = "finetune,clora", "clora,lora,finetune"
FULL_REPEATS, GROW_REPEATS = 1, 25
FULL_NAME = "Stable Diffusion 1.x with random weights"
GROW_NAME = "glyph-diffusion"
#: steps of a concept before anything is timed, also in the concepts between those that are measured
WARM_UP = 2
MAY_SET = ("methods.", "method.", "concept.n_tokens", "train.optimizer", "train.grad_clip", "eval.guidance")
SETUP = (
    *("model", "image_size", "batch", "precision", "gradient_checkpointing", "repeats", "device", "threads"),
    *("torch", "diffusers", "transformers", "dualcl"),
)


@dataclass(frozen=True)
class ConceptJob:
    """One process's work: a method at each of `concepts` (from 1 on, ascending), or at full size when it is empty."""

    preset: str
    method: str
    sets: Sequence[str]
    concepts: Sequence[int]
    repeats: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dualcl bench concepts`."""
    parser.description = (
        "What customization costs, on random images (speed does not depend on them; nothing is downloaded). Each "
        "method has a process of its own. Precisions below fp32 also hold the frozen weights in that precision."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--full-size",
        action="store_true",
        help="one training step and one denoising step of the full Stable Diffusion 1.x, with random weights",
    )
    what.add_argument(
        "--grow",
        type=ascending_counts,
        metavar="N,N,...",
        help="step time, memory and checkpoint at these concepts of a run on the bundled model, e.g. 2,30",
    )
    parser.add_argument("--methods", metavar="A,B,C", help=f"default {FULL_METHODS}; with --grow {GROW_METHODS}")
    parser.add_argument(
        "--batch", type=positive_count, default=1, metavar="N", help="images per training step; default %(default)s"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default %(default)s")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument(
        "--repeats",
        type=positive_count,
        metavar="N",
        help=f"timed steps; default {FULL_REPEATS}, the very first one of a process; with --grow {GROW_REPEATS}",
    )
    add_shared(parser, "methods.clora.rank=16")


def main(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes `--out`; returns the exit code."""
    return measure_all(args, [(job.method, job) for job in plan(args)], measure, render)


def plan(args: argparse.Namespace) -> list[ConceptJob]:
    """The processes to run, one for each method, checked."""
    preset = FULL_PRESET if args.full_size else GROW_PRESET
    concepts = args.grow or []
    repeats = args.repeats or (FULL_REPEATS if args.full_size else GROW_REPEATS)
    for key, _ in map(parse_assignment, args.sets):
        if not key.startswith(MAY_SET):
            raise UserError(
                f"--set {key}: bench concepts takes only {', '.join(k + '*' * k.endswith('.') for k in MAY_SET)}"
            )
    sets = [
        *args.sets,
        f"precision={args.precision}",
        f"base.weights_dtype={args.precision}",
        f"base.gradient_checkpointing={json.dumps(args.gradient_checkpointing)}",
        f"device={json.dumps(args.device)}",
        f"threads={'none' if args.threads is None else args.threads}",
        f"train.batch_size={args.batch}",
        "train.epochs=1",
        f"train.steps={repeats + WARM_UP + 1}",  # one of the untimed round of a comparison
        f"stream.tasks={concepts[-1] if concepts else 1}",
        "stream.class_order=natural",
        "input.augment=none",
        "eval.steps=1",
        "eval.batch_size=1",
    ]
    jobs = []
    for name in parse_names(args.methods or (FULL_METHODS if args.full_size else GROW_METHODS), "methods"):
        cls = one_by_one(name, "customization", "concepts")
        if made := {"prior", "replay"} & set(cls.requires):
            raise UserError(
                f"{name} also trains on {', '.join(made)} images, which bench concepts does not make; leave it out"
            )
        resolve(preset, name, sets)
        jobs.append(ConceptJob(preset, name, sets, concepts, repeats))
    return jobs


def measure(job: ConceptJob) -> dict[str, Any]:
    """Does `job` in a fresh process, so that no method's memory hides another's; raises UserError or RunFailed."""
    return in_process("dualcl.benchmark.speed.concepts_work", job.method, asdict(job))


# --- numbers ----------------------------------------------------------------------------------------------------------


def full_rows(results: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One flat row per method: what is trained, seconds and peaks of a step and of an image, the last loss."""
    rows = []
    for name, result in results:
        row: dict[str, Any] = {"method": name, "network_parameters": result["network_parameters"]}
        row["parameters_trained"] = result["parameters_trained"]
        row["percent"] = 100 * result["parameters_trained"] / result["network_parameters"]
        row["token_parameters"] = result["token_parameters"]
        row["encode_seconds"] = result["encode_seconds"]
        row["step_seconds"] = statistics.median(result["step_seconds"])
        row["sample_seconds"] = statistics.median(result["sample_seconds"])
        for part in ("train", "sample"):
            row.update({f"{part}_peak_{k}_mib": v for k, v in result[f"{part}_peak_mib"].items()})
        rows.append({**row, "loss": result["losses"][-1]})
    return rows


def grow_rows(results: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One flat row per method and concept, each quantity also as a ratio to the method's first row.

    The ratio of step times is the median, with least and most, over rounds in which the steps of all the concepts
    measured followed one another.
    """
    rows = []
    for name, result in results:
        first: dict[str, Any] = {}
        for point in result["points"]:
            times, base = point["seconds"], result["points"][0]["seconds"]
            ratios = [late / early for late, early in zip(times, base, strict=True)]
            row = {
                "method": name,
                "concept": point["concept"],
                "step_seconds": statistics.median(times),
                **{f"peak_{k}_mib": v for k, v in point["peak_mib"].items()},
                **{k: point[k] for k in ("live_mib", "tensors", "numbers", "checkpoint_bytes")},
            }
            first = first or row
            to_first = {
                f"{key}_to_first": None if value is None else value / first[key]
                for key, value in row.items()
                if key not in ("method", "concept")
            }
            steps = max(1, row["concept"] - first["concept"])
            rows.append(
                {
                    **row,
                    **to_first,
                    "step_seconds_to_first": statistics.median(ratios),
                    "step_seconds_to_first_min": min(ratios),
                    "step_seconds_to_first_max": max(ratios),
                    "bytes_per_concept": (row["checkpoint_bytes"] - first["checkpoint_bytes"]) / steps,
                }
            )
    return rows


# --- tables -----------------------------------------------------------------------------------------------------------


def render(args: argparse.Namespace, results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The output in the wanted format, ending in a line break."""
    first = results[0][1]
    setup = {
        "model": FULL_NAME if args.full_size else GROW_NAME,
        "batch": args.batch,
        "precision": args.precision,
        "gradient_checkpointing": "on" if args.gradient_checkpointing else "off",
        **{key: first[key] for key in ("image_size", "repeats", "device", "threads", "diffusers", "transformers")},
        **first["environment"],
    }
    rows = full_rows(results) if args.full_size else grow_rows(results)
    settings = {name: result["settings"] for name, result in results}
    value = {"setup": {**setup, "sets": args.sets}, "settings": settings, "rows": rows}
    cuda = str(setup["device"]).startswith("cuda")
    table = _full_table(rows, cuda) if args.full_size else _grow_table(rows, cuda)
    notes = _full_notes(rows, cuda) if args.full_size else _grow_notes(cuda)
    about = ", ".join(f"{key.replace('_', ' ')} {setup[key]}" for key in SETUP)
    right, known = range(1, len(table[0])), {key: setup[key] for key in SETUP}
    return formatted(args.format, value, rows, known, table, [about, *notes], right)


def _full_table(rows: Sequence[dict[str, Any]], cuda: bool) -> list[list[str]]:
    memory = "cuda" if cuda else "process"
    header = ["method", "N_train", "N_train %", "token row", "encode s", "step s", "sample s"]
    table = [[*header, "train peak MiB", "sample peak MiB", "loss"]]
    for row in rows:
        table.append(
            [
                row["method"],
                f"{row['parameters_trained']:,}",
                fixed(row["percent"], 3),
                f"{row['token_parameters']:,}",
                *(fixed(row[f"{k}_seconds"], 2) for k in ("encode", "step", "sample")),
                *(fixed(row[f"{k}_peak_{memory}_mib"], 0) for k in ("train", "sample")),
                fixed(row["loss"], 4),
            ]
        )
    return table


def _full_notes(rows: Sequence[dict[str, Any]], cuda: bool) -> list[str]:
    network = rows[0]["network_parameters"]
    return [
        f"U-Net: {network:,} parameters ({network / 1e6:.1f} M), the 100 % of N_train; token row: what is learnt "
        "of the concept's word, on top of N_train",
        "encode: one image to latents, once per image of a run; step: forward, backward and update, without the "
        "fetching of the batch; sample: one image, one denoising step, with decoding",
        "train peak: encoding and steps; peaks: "
        + ("allocated on the GPU" if cuda else "resident set of the process, model and libraries included")
        + "; the weights are random, so loss and image mean nothing beyond being finite",
        "the tokenizer is the bundled model's, whose ids lie below the 49,408 of the text encoder's table",
    ]


def _grow_table(rows: Sequence[dict[str, Any]], cuda: bool) -> list[list[str]]:
    memory = "cuda" if cuda else "process"
    columns = [
        ("peak GPU MiB" if cuda else "peak process MiB", f"peak_{memory}_mib", 1),
        ("live MiB", "live_mib", 2),
        ("checkpoint bytes", "checkpoint_bytes", 0),
    ]
    cells = [cell for label, *_ in columns for cell in (label, "to first")]
    table = [["method", "concept", "step ms", "to first", *cells, "bytes per concept", "tensors", "numbers"]]
    for row in rows:
        middle, least, most = (row[f"step_seconds_to_first{end}"] for end in ("", "_min", "_max"))
        start = row["method"] != table[-1][0]
        line = [row["method"], str(row["concept"]), fixed(1e3 * row["step_seconds"], 1)]
        line.append("1" if start else f"{middle:.3f} ({least:.2f}-{most:.2f})")
        for _, key, digits in columns:
            line += [fixed(row[key], digits), fixed(row[f"{key}_to_first"], 4 if key == "checkpoint_bytes" else 3)]
        line.append("-" if start else fixed(row["bytes_per_concept"], 0))
        table.append([*line, str(row["tensors"]), str(row["numbers"])])
    return table


def _grow_notes(cuda: bool) -> list[str]:
    return [
        "step: from fetching the batch to the updated weights, median; to first: median (least-most) over rounds in "
        "which runs held at each of these concepts took a step in turn",
        "peak: of encoding a concept's images and training on them, of "
        + ("tensors on the GPU" if cuda else "the process's resident set")
        + "; live: all tensors Python holds, photographs and token rows of all concepts so far included",
        "tensors, numbers: held by the method (parameters, buffers) and its optimiser; checkpoint: after the concept, "
        "without the record's rows; bytes per concept: its growth since the first row",
    ]
