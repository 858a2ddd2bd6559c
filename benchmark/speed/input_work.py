"""Makes what `dualcl bench input` reads, and compares pixels, in a process of its own: JSON on stdin and stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import dualcl.benchmark.core.compat  # noqa: F401 - before torchvision

# isort: split
from torchvision import datasets, transforms

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.speed.step_work import answer
from dualcl.datasets.reading.folders import SUFFIXES
from dualcl.datasets.reading.views import View, decode_image, evaluation_view, random_resized_crop, reduced

#: images whose crops are compared, and crops of each
COMPARED, CROPS = 32, 8


def photograph_like(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """An image whose spectrum falls as that of photographs (1/f), with sharp edges and a grain."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falling = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height))
    grey = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) * falling, (height, width)) for _ in range(3)]
    planes = np.stack([0.8 * grey[0] + 0.2 * plane for plane in grey], axis=-1)
    planes = 128 + 45 * (planes - planes.mean()) / planes.std()
    y, x = np.mgrid[:height, :width]
    for _ in range(6):  # things in front of others
        angle, reach = rng.uniform(0, np.pi), rng.uniform(0.05, 0.3) * width
        across = (x - rng.uniform(0, width)) * np.cos(angle) + (y - rng.uniform(0, height)) * np.sin(angle)
        planes = np.where((np.abs(across) < reach)[..., None], 0.5 * planes + rng.uniform(0, 128, 3), planes)
    return Image.fromarray(np.clip(planes + rng.normal(0, 3, planes.shape), 0, 255).astype(np.uint8))


def mosaic(photographs: list[Path], first: int, width: int, height: int) -> Image.Image:
    """Photographs side by side at their own resolution, beginning with the `first`."""
    out = Image.new("RGB", (width, height))
    top = 0
    while top < height:
        left, row = 0, 1
        while left < width:
            image = decode_image(photographs[first % len(photographs)])
            out.paste(image, (left, top))
            left, row, first = left + image.width, max(row, image.height), first + 1
        top += row
    return out


def write_images(root: Path, count: int, width: int, height: int, photographs: str | None) -> None:
    """`count` JPEG files of quality 90 in two class folders."""
    found: list[Path] = []
    if photographs is not None:
        found = sorted(p for p in Path(photographs).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"--photographs: {photographs} holds no images")
    for k in range(count):
        path = root / f"class{k % 2}" / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = mosaic(found, 7 * k, width, height) if found else photograph_like(width, height, numpy_generator(0, k))
        image.save(path, quality=90)


def differences(job: dict[str, Any]) -> dict[str, Any]:
    """How many images there are, and in levels of 255: crops kept against whole, evaluation against torchvision."""
    mode = transforms.InterpolationMode(job["interpolation"])
    views = [transforms.Resize(job["resize"], interpolation=mode), transforms.CenterCrop(job["size"])]
    images = datasets.ImageFolder(job["root"], transforms.Compose([*views, transforms.ToTensor()]))
    shared = {"size": job["size"], "resize": job["resize"], "interpolation": job["interpolation"]}
    whole = View(**shared, augment="crop_flip")
    kept = View(**shared, augment="crop_flip", cache_size=job["cache_size"])
    crops, largest, evaluation = [], 0, 0.0
    for k in np.linspace(0, len(images) - 1, min(COMPARED, len(images))).astype(int):
        image = decode_image(images.samples[k][0])
        ours = transforms.functional.to_tensor(evaluation_view(image, whole))
        evaluation = max(evaluation, 255 * float((ours - images[k][0]).abs().max()))
        source = reduced(image, kept)
        for crop in range(CROPS):
            exact, near = (
                np.asarray(random_resized_crop(of, view, numpy_generator(0, int(k), crop)), dtype=np.int16)
                for of, view in ((image, whole), (source, kept))
            )
            difference = np.abs(exact - near)
            crops.append(float(difference.mean()))
            largest = max(largest, int(difference.max()))
    return {
        "images": len(images),
        "cache_size": job["cache_size"],
        "crop_difference_mean": float(np.mean(crops)),
        "crop_difference_worst": max(crops),
        "crop_difference_pixel": largest,
        "evaluation_difference": evaluation,
    }


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the images where they are to be made, and measures the differences."""
    torch.set_num_threads(1)
    if job["make"] is not None:
        count, width, height = job["make"]
        write_images(Path(job["root"]), count, width, height, job["photographs"])
    return differences(job)


def main() -> int:
    """Answers the job on stdin."""
    job = json.load(sys.stdin)
    return answer(lambda: work(job))


if __name__ == "__main__":
    sys.exit(main())
