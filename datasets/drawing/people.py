"""Who is drawn: which persons are kept for streams, families that look alike, their pictures. No model code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dualcl.benchmark.core.seeding import numpy_generator
from dualcl.datasets.drawing.portraits import ATTRIBUTES, HIDDEN, IDENTITY, Portrait, sample_attributes

Part = Literal["reported", "tuning", "pretraining"]

#: of the hidden attributes in order; none is 0 modulo 5, so whoever is of one class differs in two of them or in none
_WEIGHTS = (1, 2, 3, 4)
#: what captions name and relatives may differ in, beside the emblem; hair colour and skin run in the family
CHANGED = ("hair", "glasses", "hat", "beard")
#: how many persons a family has
FAMILY = 10
#: who in a family is the look-alike of the one before: three pairs and four others
LOOK_ALIKES = (2, 5, 8)
#: a sweep's persons and those reported share no name, so that a record tells who was tuned on
NAMES: dict[Part, tuple[str, ...]] = {
    "reported": (
        *("Ada", "Bruno", "Cleo", "Dario", "Edith", "Felix", "Greta", "Hugo", "Iris", "Jonas", "Kira", "Leo", "Mona"),
        *("Nils", "Olga", "Pablo", "Quinn", "Rosa", "Sven", "Tilda", "Ugo", "Vera", "Wanda", "Xaver", "Yara", "Zeno"),
        *("Alma", "Boris", "Carla", "Dunja", "Emil", "Flora", "Goran", "Hanna", "Ivo", "Juno", "Klara", "Lasse"),
        *("Mira", "Nora", "Otto", "Paula", "Ravi", "Selma", "Theo", "Ulla", "Viktor", "Willa", "Yusuf", "Zora"),
    ),
    "tuning": (
        *("Agnes", "Bernd", "Clara", "Dora", "Erik", "Fiona", "Gustav", "Heidi", "Ines", "Jakob", "Karim", "Lena"),
        *("Malte", "Nadia", "Oskar", "Petra", "Ronja", "Simon", "Tara", "Urs", "Vito", "Wilma", "Yann", "Zita"),
        *("Anton", "Bella", "Cyril", "Daria", "Elsa", "Fabio", "Gesa", "Henry", "Ilja", "Jana", "Konrad", "Linus"),
        *("Maja", "Noah", "Oda", "Philip", "Runa", "Sami", "Thea", "Uwe", "Valerie", "Wendel", "Ylva", "Zacharias"),
        *("Arne", "Birte"),
    ),
}


def part_of(who: Portrait) -> Part:
    """Where a person may appear: a function of the hidden attributes, so that a combination is in one part alone."""
    places = (values.index(who[name]) for name, values in HIDDEN.items())
    kind = sum(weight * place for weight, place in zip(_WEIGHTS, places, strict=True)) % 5
    return "reported" if kind == 0 else "tuning" if kind == 1 else "pretraining"


def sample_person(rng: np.random.Generator, part: Part) -> dict[str, str]:
    """Every attribute at random, among those who may appear in this part."""
    while True:
        who = sample_attributes(rng)
        if part_of(who) == part:
            return who


@dataclass(frozen=True)
class Person:
    """One identity: a name, the number of the family, and a value for each attribute of `IDENTITY`."""

    name: str
    family: int
    looks: tuple[tuple[str, str], ...]

    def picture(self, rng: np.random.Generator) -> dict[str, str]:
        """All attributes of one picture: what is not of the identity at random."""
        return {**sample_attributes(rng), **dict(self.looks)}


def distance(a: Portrait, b: Portrait, among: Sequence[str] = IDENTITY) -> int:
    """In how many attributes of identity two persons differ."""
    return sum(a[name] != b[name] for name in among)


def people(part: Literal["reported", "tuning"], count: int, seed: int = 0) -> tuple[Person, ...]:
    """The first `count` persons of a part, family by family, in each three pairs of look-alikes.

    Each of a family wears an emblem of their own. Look-alikes differ in it and in every hidden attribute, in nothing
    else; any other two differ in three of `CHANGED` or more, some in hidden attributes too.
    """
    rng, names = numpy_generator(seed, "emblems", part), NAMES[part]
    colours = [str(colour) for colour in rng.permutation(ATTRIBUTES["hair_colour"])]  # another for each family
    out: list[Person] = []
    emblems: list[str] = []
    while len(out) < count:
        number, place = divmod(len(out), FAMILY)
        others = [dict(person.looks) for person in out]
        family = others[len(others) - place :]
        if not place:
            emblems = [str(emblem) for emblem in rng.permutation(ATTRIBUTES["emblem"])]
        if place in LOOK_ALIKES:
            who = _look_alike(others.pop(), rng, part)
        elif family:
            who = _relative(family[rng.integers(len(family))], rng, part)
        else:
            who = _identity({**sample_person(rng, part), "hair_colour": colours[number % len(colours)]})
        who["emblem"] = emblems[place]
        if any(distance(who, other, CHANGED) < 3 if other in family else distance(who, other) < 5 for other in others):
            continue
        out.append(Person(names[len(out) % len(names)], number, tuple(who.items())))
    return tuple(out)


def _unlike(who: dict[str, str], names: Iterable[str], rng: np.random.Generator) -> dict[str, str]:
    """`who`, with another value of each of these attributes."""
    other = dict(who)
    for name in names:
        values = [value for value in ATTRIBUTES[name] if value != who[name]]
        other[name] = values[rng.integers(len(values))]
    return other


def _look_alike(who: dict[str, str], rng: np.random.Generator, part: Part) -> dict[str, str]:
    """Someone of this part who differs from `who` in every hidden attribute and in no other."""
    while True:
        if part_of(other := _unlike(who, HIDDEN, rng)) == part:
            return other


def _identity(who: Portrait) -> dict[str, str]:
    return {name: who[name] for name in IDENTITY}


def _relative(base: dict[str, str], rng: np.random.Generator, part: Part) -> dict[str, str]:
    """Someone of this part: three captioned attributes are not those of `base`, half the time two hidden ones too."""
    unlike = rng.uniform() < 0.5
    while True:
        changed = list(rng.choice(CHANGED, 3, replace=False))
        if unlike:
            changed += list(rng.choice(list(HIDDEN), 2, replace=False))
        if part_of(who := _unlike(base, map(str, changed), rng)) == part:
            return who
