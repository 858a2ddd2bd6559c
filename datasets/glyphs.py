"""The bundled `glyphs` data set: pictographs in many renditions, a small cousin of ImageNet-R, nothing to download."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.core.settings import positive
from dualcl.datasets.base import ClassData, ImageSet, register_dataset
from dualcl.datasets.drawing.glyphs import STREAM_GLYPHS, draw_images
from dualcl.datasets.reading.drawn import drawn_set
from dualcl.datasets.reading.split import SelectConfig, select


@functools.lru_cache(maxsize=256)
def draw_class(name: str, part: str, count: int, size: int, draw_seed: int) -> NDArray[np.uint8]:
    """The first `count` images of a class and part, (count, size, size, 3); kept, as every run of a comparison asks."""
    generators = [numpy_generator(draw_seed, "glyphs", name, part, i) for i in range(count)]
    images = draw_images(STREAM_GLYPHS[name], generators, size)
    images.setflags(write=False)
    return images


@register_dataset(
    "glyphs",
    domain="classification",
    summary="20 pictographs drawn in many renditions at 32 px; bundled, nothing to download",
    listed=False,
)
class Glyphs:
    """20 pictographs of DejaVu Sans, drawn in memory from a seed; none was in the bundled backbone's pretraining."""

    @dataclass(frozen=True)
    class Config(SelectConfig):
        """The keys below `data.`."""

        train_per_class: int = field(default=60, metadata={"help": "training images drawn per class"})
        test_per_class: int = field(default=20, metadata={"help": "test images drawn per class"})
        size: int = field(default=32, metadata={"help": "side of the drawn images in pixels"})
        draw_seed: int = field(default=0, metadata={"help": "which drawings"})

        def __post_init__(self) -> None:
            super().__post_init__()
            positive("data.train_per_class", self.train_per_class)
            positive("data.test_per_class", self.test_per_class)
            positive("data.size", self.size, 16)
            positive("data.draw_seed", self.draw_seed, 0)

        def names_alone(self) -> Glyphs.Config:
            """One image of each class is drawn; see `SelectConfig.names_alone`."""
            return replace(super().names_alone(), train_per_class=1, test_per_class=1)

    @classmethod
    def load(cls, config: Config) -> ClassData:
        """Draws the images; the same config gives the same pixels with the same Pillow and FreeType.

        A set's fingerprint comes from the sha256 of its pixels; `facts["pixels_sha256"]` is over all that were drawn.
        """
        # classes that are not asked for need not be drawn
        names = tuple(STREAM_GLYPHS)
        wanted = names[: config.classes]
        train = _image_set(wanted, "train", config.train_per_class, config)
        test = _image_set(wanted, "test", config.test_per_class, config)
        pixels = hashlib.sha256((train.fingerprint + test.fingerprint).encode())
        split_name = f"glyphs:{config.train_per_class}+{config.test_per_class}-seed{config.draw_seed}"
        return select("glyphs", names, train, test, split_name, config, facts={"pixels_sha256": pixels.hexdigest()})


def _image_set(names: tuple[str, ...], part: str, count: int, config: Glyphs.Config) -> ImageSet:
    """`count` images of each class."""
    prefix = f"{config.size}px/seed{config.draw_seed}"
    return drawn_set(
        names, part, count, prefix, lambda name: draw_class(name, part, count, config.size, config.draw_seed)
    )
