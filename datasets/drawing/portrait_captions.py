"""Captions of portraits in plain English. No model code."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from dualcl.datasets.drawing.portraits import ATTRIBUTES, CAPTIONED, Portrait

CLASS_NOUN = "person"
KINDS = ("portrait", "drawing", "picture", "photo")
#: how often an attribute is named against the others: what is small or alike needs more of it
_WEIGHTS = {"hair_colour": 0.7, "skin": 0.6, "shirt": 0.7, "expression": 1.3, "beard": 1.2, "thing": 1.1, "emblem": 1.1}
_STYLES = {"short": "short", "long": "long", "bobbed": "bobbed", "curly": "curly"}
_GLASSES = {"none": "no glasses", "round": "round glasses", "square": "square glasses", "monocle": "a monocle"}
_BEARDS = {"none": "no beard", "moustache": "a moustache", "goatee": "a goatee", "full": "a full beard"}


def a(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(who: Portrait, named: Collection[str], subject: str = CLASS_NOUN, kind: str = "portrait") -> str:
    """A caption that names these attributes of `CAPTIONED`, such as

    "a portrait of a sad person with dark skin, long pink hair and no glasses, in a top hat and a shirt with a star, by
    a tree", without the commas.
    """
    has = {name: who[name] for name in CAPTIONED if name in named}
    if len(has) != len(set(named)):
        raise ValueError(f"no caption names {sorted(set(named) - set(has))}")
    head = a(f"{has['expression']} {subject}" if "expression" in has else subject)
    traits = [f"{has['skin']} skin"] if "skin" in has else []
    if "hair" in has or "hair_colour" in has:
        style, words = has.get("hair", ""), [has.get("hair_colour", ""), "hair"]
        words.insert(0, _STYLES.get(style, ""))
        tail = f" in {style}" if style and style not in _STYLES else ""
        traits.append(" ".join(w for w in words if w) + tail)
    traits += [_GLASSES[has["glasses"]]] if "glasses" in has else []
    traits += [_BEARDS[has["beard"]]] if "beard" in has else []
    clothes = [] if "hat" not in has else ["no hat" if has["hat"] == "none" else a(has["hat"])]
    if "shirt" in has or "emblem" in has:
        shirt = a(f"{has['shirt']} shirt" if "shirt" in has else "shirt")
        clothes.append(shirt + (f" with {a(has['emblem'])}" if "emblem" in has else ""))
    words = [f"{a(kind)} of {head}"]
    words += [f"with {' and '.join(traits)}"] if traits else []
    words += [f"wearing {' and '.join(clothes)}"] if clothes else []
    words += [f"by {a(has['thing'])}"] if "thing" in has else []
    return " ".join(words)


def sample_named(rng: np.random.Generator, fewest: int = 3, most: int = 6) -> list[str]:
    """Attributes that a caption names: `fewest` to `most` of them; now and then none."""
    if rng.uniform() < 0.05:
        return []
    weights = np.array([_WEIGHTS.get(name, 1.0) for name in CAPTIONED])
    names = rng.choice(list(CAPTIONED), int(rng.integers(fewest, most + 1)), replace=False, p=weights / weights.sum())
    return [str(name) for name in names]


def sample_kind(rng: np.random.Generator) -> str:
    """What a caption calls the picture."""
    return KINDS[rng.integers(len(KINDS))]


def sample_caption(who: Portrait, rng: np.random.Generator) -> str:
    """A true caption that names some of what is drawn."""
    return caption(who, sample_named(rng), kind=sample_kind(rng))


def sample_asked(who: Portrait, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """A caption that names one attribute or more, and those by name."""
    named = sample_named(rng) or ["expression"]
    return caption(who, named), {name: who[name] for name in CAPTIONED if name in named}


def caption_words() -> list[str]:
    """Every word of a caption, sorted."""
    texts = [CLASS_NOUN, *KINDS, *_GLASSES.values(), *_BEARDS.values(), "a an of with and in by wearing no hair skin"]
    texts += ["shirt", *(value for name in CAPTIONED for value in ATTRIBUTES[name])]
    return sorted({word for text in texts for word in text.split()})
