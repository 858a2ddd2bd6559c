"""The bundled `glyphs` data set: pictographs in many renditions, a small cousin of ImageNet-R, nothing to download."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dualcl.benchmark.config import positive
from dualcl.benchmark.errors import UserError
from dualcl.benchmark.seeding import numpy_generator
from dualcl.datasets.base import ClassData, ImageSet, split_hash
from dualcl.datasets.glyph_drawing import STREAM_GLYPHS, draw_images
from dualcl.datasets.registry import register_dataset


@dataclass(frozen=True)
class _Pixels:
    """Picklable access to images (N, H, W, 3) in memory."""

    images: NDArray[np.uint8]

    def __call__(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i])


@functools.lru_cache(maxsize=256)
def _draw_class(name: str, part: str, count: int, size: int, draw_seed: int) -> NDArray[np.uint8]:
    """The first `count` images of a class and part, (count, size, size, 3); kept, as every run of a comparison asks."""
    generators = [numpy_generator(draw_seed, "glyphs", name, part, i) for i in range(count)]
    images = draw_images(STREAM_GLYPHS[name], generators, size)
    images.setflags(write=False)
    return images


@register_dataset(
    "glyphs",
    domain="classification",
    summary="20 pictographs drawn in many renditions at 32 px; bundled, nothing to download",
)
class Glyphs:
    """20 pictographs of DejaVu Sans, drawn in memory from a seed; none was in the bundled backbone's pretraining."""

    @dataclass(frozen=True)
    class Config:
        """The keys below `data.`."""

        train_per_class: int = field(default=60, metadata={"help": "training images drawn per class"})
        test_per_class: int = field(default=20, metadata={"help": "test images drawn per class"})
        size: int = field(default=32, metadata={"help": "side of the drawn images in pixels"})
        draw_seed: int = field(default=0, metadata={"help": "which drawings"})
        holdout: float = field(
            default=0.0, metadata={"help": "test on this fraction of the training images instead (for tuning)"}
        )
        limit: int | None = field(default=None, metadata={"help": "only the first so many training images per class"})
        classes: int = field(default=len(STREAM_GLYPHS), metadata={"help": "only the first so many classes"})

        def __post_init__(self) -> None:
            positive("data.train_per_class", self.train_per_class)
            positive("data.test_per_class", self.test_per_class)
            positive("data.size", self.size, 16)
            positive("data.draw_seed", self.draw_seed, 0)
            positive("data.limit", self.limit)
            positive("data.classes", self.classes)
            if self.classes > len(STREAM_GLYPHS):
                raise UserError(f"data.classes is {self.classes}, but glyphs has {len(STREAM_GLYPHS)} classes")
            if not 0 <= self.holdout < 1:
                raise UserError(f"data.holdout must be at least 0 and below 1, got {self.holdout}")
            if self.holdout and self.train_per_class < 2:
                raise UserError("data.holdout needs data.train_per_class of at least 2")

    @classmethod
    def load(cls, config: Config) -> ClassData:
        """Draws the images; the same config gives the same pixels with the same Pillow and FreeType.

        Each set's fingerprint is the sha256 of its pixels; `facts["pixels_sha256"]` joins the two.
        """
        names = tuple(STREAM_GLYPHS)[: config.classes]
        count = config.train_per_class
        held = min(count - 1, max(1, round(count * config.holdout))) if config.holdout else 0
        train = np.arange(count - held)[: config.limit]
        train_set = _image_set(names, "train", train, config)
        if held:
            # drawings are independent of one another, so the last ones are as random a choice as any
            test_set = _image_set(names, "train", np.arange(count - held, count), config)
        else:
            test_set = _image_set(names, "test", np.arange(config.test_per_class), config)
        split_name = f"glyphs:seed{config.draw_seed}:{count}+{config.test_per_class}"
        if held:
            split_name += f"+holdout-{config.holdout:.0%}"
        if config.limit is not None:
            split_name += f"+limit-{config.limit}"
        pixels = hashlib.sha256((train_set.fingerprint + test_set.fingerprint).encode())
        return ClassData(
            name="glyphs",
            class_names=names,
            train=train_set,
            test=test_set,
            split_name=split_name,
            split_hash=split_hash(train_set.ids, train_set.labels.tolist(), test_set.ids, test_set.labels.tolist()),
            facts={"pixels_sha256": pixels.hexdigest()},
        )


def _image_set(names: tuple[str, ...], part: str, chosen: NDArray[np.int64], config: Glyphs.Config) -> ImageSet:
    """The images `chosen` of each class; the ids carry all that the pixels depend on."""
    count = int(chosen[-1]) + 1
    drawn = [_draw_class(name, part, count, config.size, config.draw_seed)[chosen] for name in names]
    images = np.concatenate(drawn)
    images.setflags(write=False)
    prefix = f"{config.size}px/seed{config.draw_seed}"
    return ImageSet(
        ids=tuple(f"{prefix}/{name}/{part}/{i}" for name in names for i in chosen),
        labels=np.repeat(np.arange(len(names), dtype=np.int64), len(chosen)),
        load=_Pixels(images),
        fingerprint=hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest(),
    )
