"""The bundled `portraits` data set: drawn persons in families that look alike, to be taught one by one."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.core.settings import positive
from dualcl.datasets.base import ArrayImages, ImageSet, register_dataset
from dualcl.datasets.concepts import Captioned, Concept, ConceptData, concepts_hash
from dualcl.datasets.drawing.people import NAMES, Person, people, sample_person
from dualcl.datasets.drawing.portrait_captions import CLASS_NOUN, sample_asked
from dualcl.datasets.drawing.portraits import ATTRIBUTES, IDENTITY, SIZE, draw_portrait, sample_setting


@functools.lru_cache(maxsize=256)
def _draw_person(person: Person, count: int, seed: int) -> NDArray[np.uint8]:
    """The first `count` pictures of a person, (count, 48, 48, 3); kept, as every run of a comparison asks."""
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for i in range(count):
        rng = numpy_generator(seed, "portraits", "picture", repr(person.looks), i)
        images[i] = draw_portrait(person.picture(rng), sample_setting(rng))
    images.setflags(write=False)
    return images


@register_dataset(
    "portraits",
    domain="customization",
    summary="10 drawn persons in families that look alike, 8 pictures at 48 px; bundled, nothing to download",
)
class Portraits:
    """Persons drawn in memory from a seed; the bundled model has seen none of them.

    All pictures of a person agree in hair, skin, glasses, hat, beard, emblem, face, eyes, nose and mark; expression,
    the shirt's colour and what is around change. Relatives differ in three or all of hair, glasses, hat and beard, but
    for look-alikes, who differ in emblem, face, eyes, nose and mark.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config:
        """The keys below `data.`."""

        #: what a sweep sets
        to_tune_on: ClassVar[Mapping[str, str]] = {"people": "tuning"}

        people: Literal["reported", "tuning"] = field(
            default="reported", metadata={"help": "whom: tuning are others, to choose settings on"}
        )
        concepts: int = field(default=10, metadata={"help": "how many persons"})
        per_concept: int = field(default=8, metadata={"help": "pictures of each"})
        draw_seed: int = field(default=0, metadata={"help": "which persons and which pictures"})
        prior_captions: int = field(
            default=48, metadata={"help": "captions of strangers, to see what is left of the pretrained model; 0: none"}
        )

        def __post_init__(self) -> None:
            positive("data.prior_captions", self.prior_captions, 0)
            positive("data.concepts", self.concepts)
            positive("data.per_concept", self.per_concept)
            positive("data.draw_seed", self.draw_seed, 0)
            if self.concepts > (most := len(NAMES[self.people])):
                raise UserError(f"data.concepts={self.concepts}: there are {most} persons; give at most as many")

    @classmethod
    def load(cls, config: Config) -> ConceptData:
        """Draws the pictures; the same config gives the same pixels with the same Pillow.

        A concept's fingerprint is the sha256 of its pixels; `facts["looks"]` has its attributes, and its family.
        """
        chosen = people(config.people, config.concepts, config.draw_seed)
        concepts = tuple(Concept(p.name, CLASS_NOUN, _image_set(p, config), attributes=dict(p.looks)) for p in chosen)
        pixels = hashlib.sha256("".join(c.images.fingerprint for c in concepts).encode())
        return ConceptData(
            name=cls.name,
            concepts=concepts,
            split_name=f"portraits:{config.people}-{config.concepts}x{config.per_concept}-seed{config.draw_seed}",
            split_hash=concepts_hash(concepts),
            prior=tuple(_stranger(config, i) for i in range(config.prior_captions)),
            facts={
                "pixels_sha256": pixels.hexdigest(),
                "attributes": {name: list(ATTRIBUTES[name]) for name in IDENTITY},
                "looks": {p.name: {"family": p.family, **dict(p.looks)} for p in chosen},
            },
        )


def _stranger(config: Portraits.Config, i: int) -> Captioned:
    """A caption as the pretrained model learnt from, of a person who is in no stream."""
    rng = numpy_generator(config.draw_seed, "portraits", "captions", config.people, i)
    return Captioned(*sample_asked(sample_person(rng, "pretraining"), rng))


def _image_set(person: Person, config: Portraits.Config) -> ImageSet:
    """The pictures of a person; the ids carry all that the pixels depend on."""
    images = _draw_person(person, config.per_concept, config.draw_seed)
    looks = "-".join(value.replace(" ", "") for _, value in person.looks)
    return ImageSet(
        ids=tuple(f"{SIZE}px/seed{config.draw_seed}/{looks}/{i}" for i in range(len(images))),
        labels=np.zeros(len(images), dtype=np.int64),
        load=ArrayImages(images),
        fingerprint=hashlib.sha256(images.tobytes()).hexdigest(),
    )
