"""The bundled `glyph-concepts` data set: held-out pictographs, each with a look of its own, to be taught one by one."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.core.settings import positive
from dualcl.datasets.base import ArrayImages, ImageSet, register_dataset
from dualcl.datasets.concepts import Concept, ConceptData, concepts_hash
from dualcl.datasets.drawing.captions import CLASS_NOUN, INK_AND_PAPER, RENDITION_WORDS, near, pose
from dualcl.datasets.drawing.glyphs import COLOURS, CONCEPT_GLYPHS, Colour, Look, draw_glyph

Kind = Literal["mixed", "objects", "faces"]

#: in the order in which they are used
OBJECTS = (
    "hammer and pick",
    "cow",
    "black flag",
    "fleur-de-lis",
    "victory hand",
    "house",
    "mouse",
    "funeral urn",
    "cloud",
    "hot springs",
    "keyboard",
    "writing hand",
)
#: faces that differ visibly at 32 px, neighbours the most
FACES = (
    "smiling face with sunglasses",
    "cat face",
    "face screaming in fear",
    "black smiling face",
    "smiling face with halo",
    "face with medical mask",
    "smiling face with horns",
    "astonished face",
    "fearful face",
    "grinning face",
    "sleeping face",
    "smiling face with heart-shaped eyes",
    "white frowning face",
    "loudly crying face",
    "face with stuck-out tongue",
    "dizzy face",
    "neutral face",
    "smiling cat face with heart-shaped eyes",
    "confounded face",
    "face with tears of joy",
    "confused face",
    "face throwing a kiss",
    "face with open mouth",
    "weary cat face",
)
#: inks with enough papers to be seen on; grey is near too many colours
INKS = ("black", "white", "red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown")
#: glyphs with areas of ink get another rendition; thin lines, hatched or dotted, would be past recognition at 32 px
BROAD = ("hammer and pick", "black flag", "house", "funeral urn", "cloud")
TILTS = (-10.0, -5.0, 0.0, 5.0, 10.0)


@dataclass(frozen=True)
class Appearance:
    """What all images of a concept share: glyph, ink (a name of `COLOURS`), rendition, and tilt in degrees."""

    glyph: str
    ink: str
    rendition: str
    tilt: float

    @property
    def name(self) -> str:
        """The glyph's name without its colour word, which is not that of the ink."""
        return self.glyph.removeprefix("black ").removeprefix("white ")


def concept_glyphs(kind: Kind) -> tuple[str, ...]:
    """Names of all glyphs of a kind, in order; "mixed" takes objects and faces in turn, as many of each."""
    if kind == "mixed":
        return tuple(name for pair in zip(OBJECTS, FACES, strict=False) for name in pair)
    return OBJECTS if kind == "objects" else FACES


def appearances(kind: Kind, draw_seed: int) -> tuple[Appearance, ...]:
    """The appearance of every concept of a kind; of any len(INKS) in a row, no two share an ink."""
    rng = numpy_generator(draw_seed, "glyph-concepts", kind)
    inks = rng.permutation(len(INKS))
    renditions = [r for r in RENDITION_WORDS if r != "solid"]
    out = []
    for i, glyph in enumerate(concept_glyphs(kind)):
        rendition = renditions[rng.integers(len(renditions))]
        tilt = TILTS[rng.integers(len(TILTS))]
        out.append(Appearance(glyph, INKS[inks[i % len(inks)]], rendition if glyph in BROAD else "solid", tilt))
    return tuple(out)


def _luma(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def concept_look(appearance: Appearance, index: int, draw_seed: int) -> Look:
    """How image `index` of a concept is drawn: the papers in turn, plain or shading off, and a pose."""
    papers = [paper for ink, paper in INK_AND_PAPER if ink == appearance.ink]
    turn = numpy_generator(draw_seed, "glyph-concepts", appearance.name, "papers").permutation(len(papers))
    rng = numpy_generator(draw_seed, "glyph-concepts", appearance.name, index)
    ink = COLOURS[appearance.ink]
    paper = near(COLOURS[papers[turn[index % len(papers)]]], rng)
    # away from the ink, so that it stands apart from both ends
    shade = 28 if _luma(paper) > _luma(ink) else -28
    second = [int(np.clip(v + shade, 0, 255)) for v in paper]
    posed = pose(rng)
    posed["angle"] = appearance.tilt + float(rng.normal(0, 4))
    return Look(
        rendition=appearance.rendition,
        ink=ink,
        second_ink=ink,
        background="gradient" if rng.uniform() < 0.4 else "plain",
        paper=paper,
        second_paper=(second[0], second[1], second[2]),
        detail_seed=int(rng.integers(0, 2**31)),
        **posed,  # type: ignore[arg-type]
    )


@functools.lru_cache(maxsize=256)
def _draw_concept(appearance: Appearance, count: int, size: int, draw_seed: int) -> NDArray[np.uint8]:
    """The first `count` images of a concept, (count, size, size, 3); kept, as every run of a comparison asks."""
    code = CONCEPT_GLYPHS[appearance.glyph]
    images = np.stack([draw_glyph(code, concept_look(appearance, i, draw_seed), size) for i in range(count)])
    images.setflags(write=False)
    return images


@register_dataset(
    "glyph-concepts",
    domain="customization",
    summary="10 pictographs, each in its own ink and rendition, 8 images at 32 px; bundled, nothing to download",
    listed=False,
)
class GlyphConcepts:
    """Pictographs of DejaVu Sans drawn in memory from a seed; none was in the bundled models' pretraining.

    A concept is a glyph with one ink, one rendition and one tilt, over changing papers and poses.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config:
        """The keys below `data.`."""

        concepts: int = field(default=10, metadata={"help": "how many concepts"})
        per_concept: int = field(default=8, metadata={"help": "images drawn per concept"})
        kind: Kind = field(default="mixed", metadata={"help": "mixed: an object, a face, an object, ..."})
        skip: int = field(default=0, metadata={"help": "leave out the first so many concepts: to tune on others"})
        size: int = field(default=32, metadata={"help": "side of the drawn images in pixels"})
        draw_seed: int = field(default=0, metadata={"help": "which looks and which drawings"})

        def __post_init__(self) -> None:
            positive("data.concepts", self.concepts)
            positive("data.per_concept", self.per_concept)
            positive("data.skip", self.skip, 0)
            positive("data.size", self.size, 16)
            positive("data.draw_seed", self.draw_seed, 0)
            there = len(concept_glyphs(self.kind))
            if self.skip + self.concepts > there:
                raise UserError(
                    f"data.skip={self.skip} and data.concepts={self.concepts} need {self.skip + self.concepts} "
                    f"concepts, but data.kind={self.kind} has {there}; lower one of them"
                )

    @classmethod
    def load(cls, config: Config) -> ConceptData:
        """Draws the images; the same config gives the same pixels with the same Pillow and FreeType.

        A concept's fingerprint is the sha256 of its pixels; `facts["pixels_sha256"]` is over all of them.
        """
        chosen = appearances(config.kind, config.draw_seed)[config.skip : config.skip + config.concepts]
        concepts = tuple(Concept(a.name, CLASS_NOUN, _image_set(a, config)) for a in chosen)
        pixels = hashlib.sha256("".join(c.images.fingerprint for c in concepts).encode())
        split_name = f"glyph-concepts:{config.kind}-{config.concepts}x{config.per_concept}-seed{config.draw_seed}"
        return ConceptData(
            name=cls.name,
            concepts=concepts,
            split_name=split_name + (f"+skip-{config.skip}" if config.skip else ""),
            split_hash=concepts_hash(concepts),
            facts={
                "pixels_sha256": pixels.hexdigest(),
                "looks": {a.name: {"ink": a.ink, "rendition": a.rendition, "tilt": a.tilt} for a in chosen},
            },
        )


def _image_set(appearance: Appearance, config: GlyphConcepts.Config) -> ImageSet:
    """The images of a concept; the ids carry all that the pixels depend on."""
    images = _draw_concept(appearance, config.per_concept, config.size, config.draw_seed)
    prefix = f"{config.size}px/seed{config.draw_seed}/{config.kind}/{appearance.name}"
    return ImageSet(
        ids=tuple(f"{prefix}/{i}" for i in range(len(images))),
        labels=np.zeros(len(images), dtype=np.int64),
        load=ArrayImages(images),
        fingerprint=hashlib.sha256(images.tobytes()).hexdigest(),
    )
