"""`dualcl bench customization`: training steps and sampling of Stable Diffusion against diffusers' own code."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from dualcl.benchmark.speed.common import in_process, positive_count
from dualcl.benchmark.speed.pairs import OURS, Comparison, Side, Target, add_pair_arguments, run_comparisons

SOURCE = "https://github.com/huggingface/diffusers"
#: what differs from Stable Diffusion 1.x, part by part; quarter: half the channels of every part
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "quarter": {
        "unet": {"block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 384},
        "vae": {"block_out_channels": (64, 128, 256, 256)},
        "text_encoder": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6},
    },
    "tiny": {
        "unet": {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
        },
        "vae": {
            "block_out_channels": (32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
        },
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    },
}
#: side of the latents in `--size`
LATENTS = {"full": 64, "quarter": 32, "tiny": 8}
NAMES = ("custom-diffusion", "dreambooth-lora", "sampling-one-by-one", "sampling-batched")
RANK = 16
#: of the images of the class beside the concept's
CLASS_IMAGES = CONCEPT_IMAGES = 4

STEP = Target("at least 1.5x as fast", at_least=1.5)
MEMORY = Target("at most 0.7x", at_most=0.7)
SAMPLING = Target("at least 1.3x", at_least=1.3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dualcl bench customization`."""
    parser.description = (
        "Training steps and sampling on a Stable Diffusion with random weights and random images, beside diffusers' "
        "example scripts, run from a checkout as they are, and its StableDiffusionPipeline. Speed does not depend on "
        "the weights; nothing is downloaded."
    )
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="quarter", help="quarter: half of all channels; default %(default)s"
    )
    parser.add_argument("--latents", type=positive_count, metavar="N", help="side of the latents; an image has 8 times")
    parser.add_argument(
        "--batch", type=positive_count, default=2, metavar="N", help="images of a training step; default %(default)s"
    )
    parser.add_argument("--images", type=positive_count, default=4, metavar="N", help="sampled; default %(default)s")
    parser.add_argument(
        "--steps", type=positive_count, default=8, metavar="N", help="denoising steps; default %(default)s"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default %(default)s")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    add_pair_arguments(parser, NAMES)


def main(args: argparse.Namespace) -> int:
    """Makes the model and the images, measures, and deletes them; returns the exit code."""
    latents = args.latents or LATENTS[args.size]
    with tempfile.TemporaryDirectory() as folder:
        job = {"folder": folder, "parts": parts(args.size, latents), "images": [CONCEPT_IMAGES, CLASS_IMAGES]}
        made = in_process("dualcl.benchmark.speed.customization_work", "the model", job)
        facts = {
            "model": f"Stable Diffusion 1.x, {args.size} size, random weights",
            "parameters": ", ".join(f"{k} {v / 1e6:.1f} M" for k, v in made["parameters"].items()),
            "image_size": made["image_size"],
            **{k: getattr(args, k) for k in ("batch", "precision", "images", "steps", "gradient_checkpointing")},
        }
        return run_comparisons(args, "customization", comparisons(args, folder, latents), facts)


def parts(size: str, latents: int) -> dict[str, dict[str, Any]]:
    """What differs from Stable Diffusion 1.x in each part."""
    own = {name: dict(SIZES[size].get(name, {})) for name in ("unet", "vae", "text_encoder", "scheduler")}
    own["scheduler"]["steps_offset"] = 1
    own["unet"]["sample_size"] = latents
    own["vae"]["sample_size"] = 2 ** (len(own["vae"].get("block_out_channels", range(4))) - 1) * latents
    return own


def comparisons(args: argparse.Namespace, folder: str, latents: int) -> list[Comparison]:
    """The rows, on the model and the images in `folder`."""
    at = {key: str(Path(folder) / key) for key in ("model", "concept", "class")}
    size = parts(args.size, latents)["vae"]["sample_size"]
    step = {**at, "batch": args.batch, "precision": args.precision, "resolution": size}
    step.update(gradient_checkpointing=args.gradient_checkpointing, rank=RANK)
    draw = {"model": at["model"], "precision": args.precision}
    draw.update({key: getattr(args, key) for key in ("images", "steps")})

    def training(method: str, script: str) -> tuple[Side, Side]:
        return (
            Side(OURS, "dualcl_customization", "step", {**step, "method": method}),
            Side("diffusers", "diffusers_training", "step", {**step, "script": script}, SOURCE),
        )

    def sampling(name: str, work: str, quantity: str) -> Comparison:
        return Comparison(
            name,
            quantity,
            Side(OURS, "dualcl_customization", "sample", {**draw, "method": "lora"}),
            Side("StableDiffusionPipeline", "diffusers_sampling", work, draw),
            time=SAMPLING,
            unit="images/s",
            agree="brightness",
            note=f"{args.images} images of one prompt, {args.steps} DDIM steps with guidance, decoding included",
        )

    encoded = "ours encodes each image once per task, before its steps; the script in every step"
    ours, peer = training("custom_diffusion", "custom_diffusion")
    ours_lora, peer_lora = training("lora", "dreambooth_lora")
    return [
        Comparison(
            NAMES[0],
            "training step, Custom Diffusion with prior images",
            ours,
            peer,
            time=STEP,
            memory=MEMORY,
            note=f"{args.batch} images of the concept and {args.batch} of its class; {encoded}; its whole token table "
            "is in AdamW, here the new rows are",
        ),
        Comparison(
            NAMES[1],
            f"training step, LoRA of rank {RANK}",
            ours_lora,
            peer_lora,
            time=STEP,
            memory=MEMORY,
            note=f"{encoded}; the script adapts all projections of the attentions and no word, ours K and V of the "
            "cross-attentions and the concept's word",
        ),
        sampling(NAMES[2], "one_by_one", "sampling, a pipeline call per image"),
        sampling(NAMES[3], "batched", "sampling, all images in one pipeline call"),
    ]
