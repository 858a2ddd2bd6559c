"""`dualcl bench input`: batches out of JPEG files, against torchvision's ImageFolder and transforms."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.speed.common import in_process, positive_count
from dualcl.benchmark.speed.pairs import OURS, Comparison, Side, Target, add_pair_arguments, run_comparisons

NAMES = ("train", "train-decoded", "evaluation")
TARGET = Target("at least 2x as fast", at_least=2.0)
#: what is shown of the images
FACTS = (
    "images",
    "cache_size",
    "crop_difference_mean",
    "crop_difference_worst",
    "crop_difference_pixel",
    "evaluation_difference",
)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `dualcl bench input`."""
    parser.description = (
        "Epochs of normalised batches from a folder of JPEG files, from the second epoch on, beside torchvision's "
        "ImageFolder with RandomResizedCrop and RandomHorizontalFlip (training) or Resize and CenterCrop (evaluation). "
        "Also by how much random crops out of images kept at --cache-size differ from crops out of the files."
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="class folders with images; default: made for this")
    parser.add_argument(
        "--photographs", type=Path, metavar="DIR", help="make the images as mosaics of these, at their own resolution"
    )
    parser.add_argument("--count", type=positive_count, default=512, metavar="N", help="made; default %(default)s")
    parser.add_argument("--width", type=positive_count, default=500, metavar="N", help="of those; default %(default)s")
    parser.add_argument("--height", type=positive_count, default=375, metavar="N", help="of those; default %(default)s")
    parser.add_argument("--size", type=positive_count, default=224, metavar="N", help="of views; default %(default)s")
    parser.add_argument(
        "--cache-size", type=positive_count, default=320, metavar="N", help="input.cache_size; default %(default)s"
    )
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bilinear")
    parser.add_argument("--batch", type=positive_count, default=64, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--workers", type=positive_count, default=2, metavar="N", help="on each side; default %(default)s"
    )
    add_pair_arguments(parser, NAMES)
    parser.set_defaults(device="cpu")  # where the batches are wanted from both sides


def main(args: argparse.Namespace) -> int:
    """Makes the images, measures, and deletes them; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        root = (args.root or Path(folder) / "images").expanduser()
        if args.root and not root.is_dir():
            raise UserError(f"--root={root} is no folder; give one with class folders of images")
        settings = {
            "root": str(root.resolve()),
            "size": args.size,
            "resize": round(args.size * 256 / 224),
            "interpolation": args.interpolation,
            "batch": args.batch,
            "workers": args.workers,
            **IMAGENET,
        }
        job = {
            **settings,
            "make": None if args.root else [args.count, args.width, args.height],
            "photographs": str(args.photographs.expanduser().resolve()) if args.photographs else None,
            "cache_size": args.cache_size,
        }
        found = in_process("dualcl.benchmark.speed.input_work", "the images", job)
        facts = {name: found[name] for name in FACTS}
        shown = {k: settings[k] for k in ("size", "resize", "interpolation", "batch", "workers")}
        return run_comparisons(args, "input", comparisons(args, settings, folder, facts), {**shown, **facts})


def comparisons(
    args: argparse.Namespace, settings: dict[str, Any], folder: str, facts: dict[str, Any]
) -> list[Comparison]:
    """The rows, with the cache in `folder`."""
    own = {**settings, "cache": str(Path(folder) / "cache"), "gib": 64}
    peer = Side("torchvision", "torchvision_input", "train", settings)

    def side(of: Side, work: str) -> Side:
        return Side(of.peer, of.adapter, work, of.setup)

    kept = Side(OURS, "dualcl_input", "train", {**own, "cache_size": args.cache_size})
    decoded = Side(OURS, "dualcl_input", "train", {**own, "cache_size": None})
    crops = "training batches (random crop, mirror), after the first epoch"
    return [
        Comparison(
            NAMES[0],
            f"{crops}, input.cache_size={args.cache_size}",
            kept,
            peer,
            time=TARGET,
            unit="images/s",
            note=f"crops differ from those of the whole image by {facts['crop_difference_mean']:.2f} of 255 levels on "
            f"average, the most different by {facts['crop_difference_worst']:.2f}",
        ),
        Comparison(
            NAMES[2],
            "evaluation batches, after the first evaluation",
            side(kept, "evaluation"),
            side(peer, "evaluation"),
            time=TARGET,
            unit="images/s",
            agree="magnitude",
            note=f"pixels differ by at most {facts['evaluation_difference']:.4f} of 255 levels",
        ),
        Comparison(
            NAMES[1],
            "training batches, decoded from the file each time (the default)",
            decoded,
            peer,
            time=Target("", None),
            unit="images/s",
            note="bit for bit the crops of the whole image",
        ),
    ]
