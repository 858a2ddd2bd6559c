"""`dualcl bench classification`: training steps, evaluation, memory against public code, peft and a bare timm ViT."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dualcl.benchmark.config.resolve import resolve
from dualcl.benchmark.core.generators import torch_generator
from dualcl.benchmark.models.vit import BackboneConfig, load_backbone
from dualcl.benchmark.speed.common import PLANNED_TASKS, PRESET, add_settings, add_sizes, settings
from dualcl.benchmark.speed.pairs import OURS, Comparison, Side, Target, add_pair_arguments, run_comparisons

#: public code of prompt methods
SOURCES = {
    "coda_prompt": "https://github.com/GT-RIPL/CODA-Prompt",
    "pilot": "https://github.com/LAMDA-CL/LAMDA-PILOT",
}
LABELS = {"l2p": "L2P++", "dualprompt": "DualPrompt", "coda_prompt": "CODA-P"}
#: with these ours computes what the public CODA-Prompt code does, so that the losses of the first step agree
QUIRKS = {"l2p": ["batch_key_loss"], "dualprompt": ["sum_key_loss", "future_experts"], "coda_prompt": []}
#: where the public CODA-Prompt code has its prompts
BLOCKS = {
    "l2p": {"expert": [0]},
    "dualprompt": {"general": [0, 1], "expert": [2, 3, 4]},
    "coda_prompt": {"expert": [0, 1, 2, 3, 4]},
}
CLASSES_PER_TASK = 2
ADAPTER = "ours_classification"
TEST_BATCHES = 2
LATE = 50
NO_TARGET = Target("-")
SET_EXAMPLE = "methods.clora.rank=16, or backbone.kwargs.depth=6 (of both sides)"
GROUPS = ("step", "eval", "eval_later", "fetched", "step_low", "clora", "l_forget")

IN_MEMORY = "batches lie in memory; an optimiser step each"
SAME = f"{IN_MEMORY}; ours with the public code's quirks, so that both losses of the first step agree"
OTHER = f"{IN_MEMORY}; its prompts are its own: their kind, length and number differ from ours"
LATER = "from the second evaluation of a test set on: ours keeps the frozen backbone's query features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dualcl bench classification`."""
    parser.description = (
        "Ours and a peer side by side, in two processes that take turns, on random weights and random images (speed "
        f"depends on neither; nothing is downloaded), with the hyper-parameters of the preset {PRESET}."
    )
    add_sizes(parser, batch=16)
    add_settings(parser, SET_EXAMPLE)
    parser.add_argument(
        "--low",
        choices=("bf16", "fp16"),
        default="bf16",
        help="our precision in the comparisons with the peers' default, fp32 (step_low); default %(default)s",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of both sides for C-LoRA; default %(default)s"
    )
    add_pair_arguments(parser, GROUPS)


def main(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes `--out`; returns the exit code."""
    setup = {
        "backbone": args.backbone,
        "image_size": args.image_size,
        "batch": args.batch,
        "weights": "random, the same on both sides",
    }
    if args.precision != "fp32":
        setup["precision_of_clora"] = args.precision
    with tempfile.TemporaryDirectory(prefix="dualcl-bench-") as folder:
        return run_comparisons(args, "classification", comparisons(args, Path(folder)), setup)


# --- what is compared -------------------------------------------------------------------------------------------------


def comparisons(args: argparse.Namespace, folder: Path) -> list[Comparison]:
    """All comparisons, with weights and batch written to `folder`. UserError for a backbone or --set that is wrong."""
    given = {**write_inputs(args, folder), "batch_size": args.batch}
    rows = [row for method in LABELS for peer in SOURCES for row in _prompt_rows(args, folder, given, method, peer)]
    return [*rows, *_clora_rows(args, given)]


def write_inputs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes random weights and a batch, as both sides read them; returns their paths and the backbone's sizes."""
    config = resolve(PRESET, "linear_probe", settings(args, "classification", PLANNED_TASKS, "fp32"))
    backbone = config.section("backbone", BackboneConfig)
    torch.manual_seed(0)
    model: Any
    model, info = load_backbone(backbone)
    weights = folder / "weights.safetensors"
    prepared = {"mean": json.dumps(info.mean), "std": json.dumps(info.std)}
    save_file(model.state_dict(), weights, metadata=prepared)
    vit = {
        "img_size": args.image_size,
        "patch_size": model.patch_embed.patch_size[0],
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
    }
    return {
        "weights": str(weights),
        "batch": write_batch(folder / "batch.safetensors", args.batch, args.image_size),
        "vit": vit,
        "backbone": backbone.name,
        "kwargs": backbone.kwargs,
        "classes_per_task": CLASSES_PER_TASK,
        "test_batches": TEST_BATCHES,
    }


def write_batch(path: Path, count: int, size: int) -> str:
    """Writes a batch of random images with labels among a task's first classes; returns the path."""
    images = torch.randn((count, 3, size, size), generator=torch_generator(0, "bench", "batch"))
    save_file({"images": images, "labels": torch.arange(count) % CLASSES_PER_TASK}, path)
    return str(path)


def ours(
    args: argparse.Namespace,
    given: Mapping[str, Any],
    method: str,
    work: str,
    sets: tuple[str, ...] = (),
    task: int = 1,
    tasks: int = PLANNED_TASKS,
    precision: str = "fp32",
    start: str | None = None,
) -> Side:
    """Our side: `work` of a method at `task` (from 1) of `tasks`."""
    setup = {
        "preset": PRESET,
        "method": method,
        "sets": [
            *settings(args, "classification", tasks, precision),
            f"backbone.weights={json.dumps(given['weights'])}",
            *sets,
        ],
        "task": task,
        "tasks": tasks,
        "start": start,
        **{key: given[key] for key in ("batch", "batch_size", "classes_per_task")},
    }
    resolve(PRESET, method, setup["sets"])
    return Side(OURS, ADAPTER, work, setup)


def _prompt_rows(
    args: argparse.Namespace, folder: Path, given: Mapping[str, Any], method: str, peer: str
) -> list[Comparison]:
    label, same = LABELS[method], peer == "coda_prompt"
    quirks = (f"method.reference_quirks={json.dumps(QUIRKS[method])}",) if same else ()
    start = str(folder / f"{method}.safetensors") if same else None
    mine = ours(args, given, method, "step", quirks, start=start)
    low = ours(args, given, method, "step", quirks, precision=args.low)
    options = resolve(PRESET, method, settings(args, "classification", PLANNED_TASKS, "fp32")).sections["method"]
    setup = {
        **{key: given[key] for key in ("weights", "batch", "batch_size", "vit", "classes_per_task", "test_batches")},
        "method": method,
        "tasks": PLANNED_TASKS,
        **({"start": start, "param": _public_parameters(method, options), "blocks": BLOCKS[method]} if same else {}),
    }
    theirs = Side(peer, peer, "step", setup, SOURCES[peer])
    evaluated = dataclasses.replace(theirs, work="evaluation")

    def row(kind: str, what: str, target: Target, note: str, **sides: Any) -> Comparison:
        return Comparison(
            **{"name": f"{kind}-{method}-{peer}", "quantity": f"{label} {what}", "ours": mine, "peer": theirs, **sides},
            time=target,
            note=note,
        )

    rows = [
        row(
            "step",
            "training step, fp32",
            Target("at least 1.5x as fast", at_least=1.5),
            SAME if same else OTHER,
            agree="loss" if same else None,
        ),
        row(
            "eval",
            "first evaluation, fp32",
            Target("at least 1.1x", at_least=1.1),
            "ours: test images fetched from the decoded ones; theirs: tensors in memory",
            ours=dataclasses.replace(mine, work="first_evaluation"),
            peer=evaluated,
            unit="images/s",
        ),
        row(
            "eval_later",
            "later evaluation, fp32",
            Target("at least 1.9x", at_least=1.9),
            LATER,
            ours=dataclasses.replace(mine, work="later_evaluation"),
            peer=evaluated,
            unit="images/s",
        ),
        row(
            "fetched",
            "training step with kept query features, fp32",
            Target("at least 1.5x as fast", at_least=1.5),
            "ours: loader included; mirrored views only, whose features by the frozen backbone are kept from one pass",
            ours=dataclasses.replace(mine, work="fetched_step"),
        ),
        row(
            "step_low",
            f"training step, our {args.low}, their fp32",
            Target("at least 3.5x as fast", at_least=3.5),
            IN_MEMORY,
            ours=low,
        ),
    ]
    return rows


def _public_parameters(method: str, config: Any) -> list[float]:
    """`prompt_param` of the public CODA-Prompt code for our options. UserError for options it has no words for."""
    if method == "l2p":
        return [config.pool, config.length, 1 if config.deep else -1]
    if method == "dualprompt":
        return [PLANNED_TASKS, config.expert_length, config.general_length]
    return [config.pool, config.length, config.mu]


def _clora_rows(args: argparse.Namespace, given: Mapping[str, Any]) -> list[Comparison]:
    precision = args.precision

    def clora(work: str = "step", task: int = 2, sets: tuple[str, ...] = (), tasks: int = PLANNED_TASKS) -> Side:
        return ours(args, given, "clora", work, sets, task, tasks, precision)

    options: Any = resolve(PRESET, "clora", settings(args, "classification", PLANNED_TASKS, "fp32")).sections["method"]
    rank = options.rank
    plain = {key: given[key] for key in ("weights", "batch", "backbone", "kwargs", "classes_per_task")}
    plain["precision"] = precision

    def peft(rank: int) -> Side:
        return Side("peft", "peft_lora", "step", {**plain, "rank": rank})

    return [
        Comparison(
            "clora-bare",
            "C-LoRA step (task 2) over the bare backbone's forward and backward to the sites",
            clora(),
            Side("timm", "timm_vit", "pass", {**plain, "trains": "nothing"}),
            time=Target("at most 1.15x", at_most=1.15),
            note="bare: frozen weights, gradient to the input of the first block, no optimiser",
        ),
        Comparison(
            "clora-peft",
            f"C-LoRA step (task 1) over LoRA of rank {rank}",
            clora(task=1),
            peft(rank),
            time=Target("at most 1.0x", at_most=1.0),
            memory=Target("at most 1.0x", at_most=1.0),
            note=f"ours: rank {rank} for each of Q, K and V; peft: rank {rank} for all three, which timm fuses",
        ),
        Comparison(
            "clora-peft_wide",
            f"C-LoRA step (task 1) over LoRA of rank {3 * rank}",
            clora(task=1),
            peft(3 * rank),
            time=NO_TARGET,
            memory=NO_TARGET,
            note="peft's rank is the sum of ours",
        ),
        Comparison(
            "clora-late",
            f"C-LoRA step at task {LATE} over task 1",
            clora(task=LATE, tasks=LATE),
            clora(task=1, tasks=LATE),
            time=Target("at most 1.05x", at_most=1.05),
            memory=Target("at most 1.05x", at_most=1.05),
            against="itself",
        ),
        Comparison(
            "clora-full",
            "C-LoRA step (task 2) over full fine-tuning of Q, K and V",
            clora(),
            Side("timm", "timm_vit", "step", {**plain, "trains": "sites"}),
            memory=Target("at most 0.6x", at_most=0.6),
        ),
        Comparison(
            "l_forget-share",
            "L_forget, forward and backward, over a C-LoRA step (task 2)",
            clora("penalty"),
            clora("step"),
            time=Target("under 0.03x at batch 64", at_most=0.03),
            against="itself",
        ),
        Comparison(
            "l_forget-step",
            "C-LoRA step (task 2) with L_forget over without",
            clora(),
            clora(sets=("method.lambda_=0",)),
            time=NO_TARGET,
            against="itself",
        ),
    ]
