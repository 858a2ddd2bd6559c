"""The bundled `portraits-unlearn` data set: requests to unlearn what drawn persons wear on their shirts or stand by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dualcl.benchmark.core.errors import UserError
from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.benchmark.core.settings import positive
from dualcl.datasets.base import register_dataset
from dualcl.datasets.concepts import Concept, ConceptData, Request, Retained, concepts_hash
from dualcl.datasets.drawing.portrait_captions import CLASS_NOUN, KINDS, a, caption
from dualcl.datasets.drawing.portraits import CAPTIONED

#: with so many values that some can be unlearnt, some kept and others measured -> how a shirt is said to have one
PHRASES = {"emblem": "with", "thing": "by"}
#: of each of these attributes: values to unlearn, as many others to tune on, values to keep; the rest is measured
PER_ATTRIBUTE, KEPT = 5, 2
Part = Literal["reported", "tuning"]


def _shuffled(attribute: str, draw_seed: int) -> list[str]:
    values = [value for value in CAPTIONED[attribute] if value != "none"]
    return [values[i] for i in numpy_generator(draw_seed, "portraits-unlearn", attribute).permutation(len(values))]


@dataclass(frozen=True)
class Split:
    """What becomes of the values of one attribute; no value is in two of these."""

    targets: tuple[str, ...]
    kept: tuple[str, ...]
    measured: tuple[str, ...]


def split(attribute: str, part: Part, draw_seed: int) -> Split:
    """The values of a captioned attribute; what is measured in tuning is not what is measured in the report."""
    values = _shuffled(attribute, draw_seed)
    if attribute in PHRASES:
        n = PER_ATTRIBUTE
        reported, tuning, kept, rest = (
            values[:n],
            values[n : 2 * n],
            values[2 * n : 2 * n + KEPT],
            values[2 * n + KEPT :],
        )
        ours, measured = (reported, rest) if part == "reported" else (tuning, reported[: len(rest)])
        return Split(tuple(ours), tuple(kept), tuple(measured))
    kept, rest = values[:1], values[1:]
    half = len(rest) // 2
    return Split((), tuple(kept), tuple((rest[half:] if part == "reported" else rest[:half])[:2]))


def shirt(attribute: str, value: str) -> str:
    """The words of a request: "shirt with a star", "shirt by a tree"."""
    return f"shirt {PHRASES[attribute]} {a(value)}"


@register_dataset(
    "portraits-unlearn",
    domain="customization",
    summary="10 requests: emblems on shirts and things beside drawn persons are to be unlearnt; nothing to download",
)
class PortraitsUnlearn:
    """Each request takes one value of a captioned attribute: "a red shirt with a star" is to become "a red shirt".

    The values of emblem and thing fall into four parts: to unlearn, others to tune on, to keep (for methods that
    project) and to measure. Of the other attributes one value is kept, and others are measured.
    """

    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config:
        """The keys below `data.`."""

        #: what a sweep sets
        to_tune_on: ClassVar[Mapping[str, str]] = {"targets": "tuning"}

        targets: Part = field(
            default="reported", metadata={"help": "what is unlearnt: tuning are others, to choose settings on"}
        )
        requests: int = field(default=10, metadata={"help": "how many: emblems and things in turn"})
        draw_seed: int = field(default=0, metadata={"help": "which values are unlearnt, kept and measured"})

        def __post_init__(self) -> None:
            positive("data.requests", self.requests)
            positive("data.draw_seed", self.draw_seed, 0)
            most = PER_ATTRIBUTE * len(PHRASES)
            if self.requests > most:
                raise UserError(f"data.requests={self.requests}: there are {most}; give at most as many")

    @classmethod
    def load(cls, config: Config) -> ConceptData:
        """Makes the requests: words alone, nothing is drawn."""
        parts = {name: split(name, config.targets, config.draw_seed) for name in CAPTIONED}
        moods, colours = parts["expression"], parts["shirt"]
        # what training prompts name beside the request is not measured
        taught = [
            f"{a(kind)} of {a(f'{mood} {CLASS_NOUN}'.strip())} wearing {a(f'{colour} {{token}}'.strip())}"
            for kind in KINDS
            for mood in ("", *moods.kept)
            for colour in ("", *colours.kept)
        ]
        asked = [
            f"{a(KINDS[i])} of {a(f'{moods.measured[i % 2]} {CLASS_NOUN}')} wearing "
            f"{a(f'{colours.measured[i // 2]} {{token}}')}"
            for i in range(4)
        ]
        turns = [(name, value) for values in zip(*(parts[n].targets for n in PHRASES), strict=True)
                 for name, value in zip(PHRASES, values, strict=True)]  # fmt: skip
        concepts = tuple(
            Concept(
                value, CLASS_NOUN, prompts=tuple(taught), eval_prompts=tuple(asked),
                request=Request(shirt(name, value), "shirt", name), attributes={name: value},
            )
            for name, value in turns[: config.requests]
        )  # fmt: skip
        inside = [
            Retained(value, tuple(t.replace("{token}", shirt(name, value)) for t in asked), "inside", {name: value})
            for name in PHRASES
            for value in parts[name].measured
        ]
        across = [
            Retained(
                f"{name}: {value}", tuple(caption({name: value}, [name], kind=kind) for kind in KINDS[:2]),
                "across", {name: value},
            )
            for name in parts if name not in PHRASES
            for value in parts[name].measured
        ]  # fmt: skip
        return ConceptData(
            name=cls.name,
            concepts=concepts,
            split_name=f"portraits-unlearn:{config.targets}-{config.requests}-seed{config.draw_seed}",
            split_hash=concepts_hash(concepts),
            retained=(*inside, *across),
            kept=tuple(caption({name: value}, [name]) for name, part in parts.items() for value in part.kept),
        )
