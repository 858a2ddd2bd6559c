"""Captioned glyphs: drawings whose caption says rendition, ink, glyph and paper. No model code."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from dualcl.datasets.drawing.glyphs import COLOURS, PRETRAINING_GLYPHS, Colour, Look

#: rendition -> the word for it in a caption; solid goes without saying
RENDITION_WORDS = {"solid": "", "outline": "outlined", "hatched": "striped", "dotted": "dotted"}
_RENDITION_SHARES = (0.82, 0.06, 0.06, 0.06)
#: the noun that stands for any glyph
CLASS_NOUN = "symbol"
KINDS = ("drawing", "picture", "photo")


def _luma(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def _stand_apart(a: Colour, b: Colour) -> bool:
    far = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
    return far > 110 and abs(_luma(a) - _luma(b)) > 35


#: (ink, paper) names that can be told apart
INK_AND_PAPER = tuple((i, p) for i, a in COLOURS.items() for p, b in COLOURS.items() if i != p and _stand_apart(a, b))


def _plain_name(name: str) -> str:
    """A Unicode name without its colour words, which captions need for inks and papers."""
    words = [w for w in name.replace("white", "hollow").replace("-", " ").split() if w != "black"]
    return " ".join(words)


@functools.cache
def caption_names() -> dict[str, int]:
    """Glyph name as captions say it -> code point, for all pretraining glyphs."""
    names = {_plain_name(name): code for name, code in PRETRAINING_GLYPHS.items()}
    if len(names) != len(PRETRAINING_GLYPHS):
        raise RuntimeError("two pretraining glyphs have one caption name")
    return names


@dataclass(frozen=True)
class Scene:
    """What a captioned drawing shows."""

    name: str
    ink: str
    paper: str
    rendition: str = "solid"

    def caption(self, kind: str = "drawing") -> str:
        """The full caption, e.g. "a drawing of a striped red comet on white"."""
        words = [RENDITION_WORDS[self.rendition], self.ink, self.name]
        return f"a {kind} of a {' '.join(w for w in words if w)} on {self.paper}"


def near(colour: Colour, rng: np.random.Generator, by: int = 12) -> Colour:
    """`colour` with each channel moved by at most `by`."""
    moved = [int(np.clip(v + rng.integers(-by, by + 1), 0, 255)) for v in colour]
    return (moved[0], moved[1], moved[2])


def pose(rng: np.random.Generator) -> dict[str, float | tuple[float, float]]:
    """Fields of a `Look`: a mild turn, scale and shift."""
    return {
        "angle": float(rng.normal(0, 3)),
        "scale": float(rng.uniform(0.82, 0.92)),
        "stretch": float(np.exp(rng.normal(0, 0.02))),
        "shift": (float(rng.uniform(-0.02, 0.02)), float(rng.uniform(-0.02, 0.02))),
    }


def sample_scene(name: str, rng: np.random.Generator) -> Scene:
    """A random scene with the glyph `name`."""
    ink, paper = INK_AND_PAPER[rng.integers(len(INK_AND_PAPER))]
    return Scene(name, ink, paper, list(RENDITION_WORDS)[rng.choice(len(_RENDITION_SHARES), p=_RENDITION_SHARES)])


def sample_look(scene: Scene, rng: np.random.Generator) -> Look:
    """A drawing of the scene: colours near the named ones, a pose, now and then a paper that shades off."""
    paper = near(COLOURS[scene.paper], rng)
    ink = near(COLOURS[scene.ink], rng)
    shade = 28 if sum(paper) < 380 else -28
    second = tuple(int(np.clip(v + shade, 0, 255)) for v in paper)
    return Look(
        rendition=scene.rendition,
        ink=ink,
        second_ink=ink,
        background="gradient" if rng.uniform() < 0.2 else "plain",
        paper=paper,
        second_paper=(second[0], second[1], second[2]),
        detail_seed=int(rng.integers(0, 2**31)),
        **pose(rng),  # type: ignore[arg-type]
    )


def sample_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption that may leave things unsaid: the ink, the paper, or which glyph it is ("a photo of a symbol")."""
    kind = KINDS[rng.choice(3, p=(0.5, 0.2, 0.3))]
    noun = CLASS_NOUN if rng.uniform() < 0.08 else scene.name
    said = rng.uniform()
    ink = "" if said < 0.18 else scene.ink
    words = " ".join(w for w in (RENDITION_WORDS[scene.rendition], ink, noun) if w)
    paper = "" if said < 0.12 or said > 0.93 else f" on {scene.paper}"
    return f"a {kind} of a {words}{paper}"
