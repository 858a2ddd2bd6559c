"""The bundled `renditions` data set: pictographs in renditions that its backbone never saw, as in ImageNet-R."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.core.settings import positive
from dualcl.datasets.base import ClassData, ImageSet, register_dataset
from dualcl.datasets.drawing import renditions as drawing
from dualcl.datasets.drawing.glyphs import draw_glyph
from dualcl.datasets.reading.drawn import drawn_set
from dualcl.datasets.reading.split import SelectConfig, select


@functools.lru_cache(maxsize=256)
def _draw_class(
    name: str, part: str, count: int, glyphs: drawing.Glyphs, renditions: drawing.Renditions, size: int, seed: int
) -> NDArray[np.uint8]:
    """The first `count` images of a class and part, (count, size, size, 3); kept, as every run of a comparison asks."""
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for i in range(count):
        rng = numpy_generator(seed, "renditions", renditions, name, part, i)
        images[i] = draw_glyph(drawing.GLYPHS[glyphs][name], drawing.sample_rendition(rng, renditions), size)
    images.setflags(write=False)
    return images


@register_dataset(
    "renditions",
    domain="classification",
    summary="20 pictographs hatched, dotted, speckled or sketched at 48 px; bundled, nothing to download",
)
class Renditions:
    """20 pictographs of DejaVu Sans, drawn in memory from a seed.

    The bundled backbone `renditions-vit` knows other pictographs in other renditions: solid, shaded and in outline.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config(SelectConfig):
        """The keys below `data.`."""

        glyphs: Literal["reported", "tuning"] = field(
            default="reported", metadata={"help": "which classes: tuning are others, to choose settings on"}
        )
        renditions: Literal["new", "known"] = field(
            default="new", metadata={"help": "new ones, or those that renditions-vit was pretrained on"}
        )
        train_per_class: int = field(default=200, metadata={"help": "training images drawn per class"})
        test_per_class: int = field(default=50, metadata={"help": "test images drawn per class"})
        size: int = field(default=48, metadata={"help": "side of the drawn images in pixels"})
        draw_seed: int = field(default=0, metadata={"help": "which drawings"})

        def __post_init__(self) -> None:
            super().__post_init__()
            positive("data.train_per_class", self.train_per_class)
            positive("data.test_per_class", self.test_per_class)
            positive("data.size", self.size, 16)
            positive("data.draw_seed", self.draw_seed, 0)

        def names_alone(self) -> Renditions.Config:
            """One image of each class is drawn; see `SelectConfig.names_alone`."""
            return replace(super().names_alone(), train_per_class=1, test_per_class=1)

    @classmethod
    def load(cls, config: Config) -> ClassData:
        """Draws the images; the same config gives the same pixels with the same Pillow and FreeType.

        A set's fingerprint comes from the sha256 of its pixels; `facts["pixels_sha256"]` is over all that were drawn.
        """
        names = tuple(drawing.GLYPHS[config.glyphs])
        train, test = (
            _image_set("train", config.train_per_class, config),
            _image_set("test", config.test_per_class, config),
        )
        pixels = hashlib.sha256((train.fingerprint + test.fingerprint).encode())
        split_name = (
            f"renditions:{config.glyphs}-{config.renditions}-{config.train_per_class}+{config.test_per_class}"
            f"-seed{config.draw_seed}"
        )
        return select(cls.name, names, train, test, split_name, config, facts={"pixels_sha256": pixels.hexdigest()})


def _image_set(part: str, count: int, config: Renditions.Config) -> ImageSet:
    """`count` images of each class that is asked for."""
    return drawn_set(
        tuple(drawing.GLYPHS[config.glyphs])[: config.classes],
        part,
        count,
        f"{config.size}px/{config.renditions}/seed{config.draw_seed}",
        lambda name: _draw_class(name, part, count, config.glyphs, config.renditions, config.size, config.draw_seed),
    )
