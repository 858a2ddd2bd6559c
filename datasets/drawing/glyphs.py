"""Pictographs of the DejaVu Sans font that matplotlib ships, drawn in many renditions. No model code."""

from __future__ import annotations

import functools
import math
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFont

Colour = tuple[int, int, int]

RENDITIONS = ("solid", "outline", "hatched", "dotted", "gradient", "sketch", "noise")
BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "blobs")
#: share of the drawings whose ink is darker than the paper
DARK_ON_LIGHT = 0.85
COLOURS: dict[str, Colour] = {
    "black": (24, 24, 28),
    "white": (240, 240, 236),
    "grey": (128, 128, 132),
    "red": (204, 40, 44),
    "orange": (236, 132, 30),
    "yellow": (240, 208, 48),
    "green": (52, 150, 66),
    "teal": (36, 156, 160),
    "blue": (44, 84, 196),
    "purple": (128, 56, 168),
    "pink": (236, 128, 176),
    "brown": (122, 78, 44),
}

#: the classes of the stream: readable name -> code point
STREAM_GLYPHS: dict[str, int] = {
    "umbrella": 0x2602,
    "snowman": 0x2603,
    "telephone": 0x260E,
    "teacup": 0x2615,
    "shamrock": 0x2618,
    "skull": 0x2620,
    "king": 0x265A,
    "rook": 0x265C,
    "knight": 0x265E,
    "wheelchair": 0x267F,
    "anchor": 0x2693,
    "swords": 0x2694,
    "scales": 0x2696,
    "alembic": 0x2697,
    "gear": 0x2699,
    "scissors": 0x2702,
    "airplane": 0x2708,
    "envelope": 0x2709,
    "pencil": 0x270F,
    "monkey": 0x1F435,
}

#: held out of the stream and of the pretraining, for concepts to be taught one by one: objects, then faces
CONCEPT_OBJECTS: dict[str, int] = {
    "house": 0x2302,
    "keyboard": 0x2328,
    "cloud": 0x2601,
    "hot springs": 0x2668,
    "black flag": 0x2691,
    "hammer and pick": 0x2692,
    "fleur-de-lis": 0x269C,
    "funeral urn": 0x26B1,
    "victory hand": 0x270C,
    "writing hand": 0x270D,
    "cow": 0x1F42E,
    "mouse": 0x1F42D,
}
CONCEPT_FACES: dict[str, int] = {
    unicodedata.name(chr(c)).lower(): c
    for c in (0x2639, 0x263A, 0x263B, 0x1F431, *range(0x1F600, 0x1F641))
    if c not in (0x1F624, 0x1F62C)  # not in the font
}
CONCEPT_GLYPHS: dict[str, int] = {**CONCEPT_OBJECTS, **CONCEPT_FACES}

# Neither a stream glyph nor a concept in another style (no white umbrella, no other scissors), and one of each
# family that differs in fine detail only (arrows, asterisks, crosses), so that every class has a shape of its own.
_PRETRAINING = """
    2318 2325 2327 232C 2387 23CF 2600 2604 2605 2606 2608 260A 260D 2611 2616 2621 2622 2623 2625 2626 2627 2628 2629
    262A 262B 262C 262D 262E 262F 2630 2633 2637 2638 263D 263F 2640 2642 2643 2644 2645 2646 2647 2648 2649 264A 264B
    264C 264D 264E 264F 2650 2651 2652 2653 265B 265D 265F 2660 2661 2663 2666 2669 266A 266B 266D 266F 2670 267B 267E
    2680 2684 2685 2698 269B 26A0 26A1 26A2 26A7 26B3 26B4 26B5 26B6 26B7 26C1 2707 2711 2714 2717 2720 2721 2723 2733
    2739 273F 2744 2756 2761 2762 2766 2776 2779 27A4 27B2 27B3 27F0 27F3 2B13 1F0A1 1F0B7 1F0CF 1F061
"""
#: the classes that the bundled ViT is pretrained on; disjoint from the stream and from the concepts
PRETRAINING_GLYPHS: dict[str, int] = {
    unicodedata.name(chr(c), f"u+{c:04x}").lower(): c for c in (int(h, 16) for h in _PRETRAINING.split())
}


@dataclass(frozen=True)
class Look:
    """How one image of a glyph is drawn; lengths and shifts in fractions of the image side, angles in degrees."""

    rendition: str
    ink: Colour
    second_ink: Colour
    background: str
    paper: Colour
    second_paper: Colour
    angle: float = 0.0
    scale: float = 0.8
    stretch: float = 1.0
    shear: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    clutter: int = 0
    #: seeds the details: hatching angle, noise, clutter
    detail_seed: int = 0


def _contrast(a: Colour, b: Colour) -> float:
    """Perceived distance of two colours, 0..1: brightness counts most, as it does for the eye."""
    r, g, b_ = (x - y for x, y in zip(a, b, strict=True))
    luma = abs(0.3 * r + 0.59 * g + 0.11 * b_) / 255
    return 0.7 * luma + 0.3 * math.sqrt((r * r + g * g + b_ * b_) / 3) / 255


def _jitter(colour: Colour, rng: np.random.Generator, by: int = 26) -> Colour:
    shifted = [min(max(v + int(rng.integers(-by, by + 1)), 0), 255) for v in colour]
    return (shifted[0], shifted[1], shifted[2])


def _mixed(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with a `share` of `b`, small enough that ink and paper never swap."""
    mixed = [round((1 - share) * x + share * y) for x, y in zip(a, b, strict=True)]
    return (mixed[0], mixed[1], mixed[2])


def sample_look(rng: np.random.Generator) -> Look:
    """A random look: rendition, colours that stand apart, background, pose, scale and clutter."""
    palette = list(COLOURS.values())
    paper = _jitter(palette[rng.integers(len(palette))], rng)
    ink = paper
    while _contrast(ink, paper) < 0.22:
        ink = _jitter(palette[rng.integers(len(palette))], rng)
    # most drawings are dark on light
    if (sum(ink) > sum(paper)) == (rng.uniform() < DARK_ON_LIGHT):
        ink, paper = paper, ink
    return Look(
        rendition=RENDITIONS[rng.integers(len(RENDITIONS))],
        ink=ink,
        second_ink=_mixed(ink, palette[rng.integers(len(palette))], rng.uniform(0.2, 0.4)),
        background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        paper=paper,
        second_paper=_mixed(paper, palette[rng.integers(len(palette))], rng.uniform(0.1, 0.35)),
        angle=float(rng.normal(0, 14)),
        scale=float(rng.uniform(0.66, 0.98)),
        stretch=float(np.exp(rng.normal(0, 0.10))),
        shear=float(rng.normal(0, 0.10)),
        shift=(float(rng.uniform(-0.08, 0.08)), float(rng.uniform(-0.08, 0.08))),
        clutter=int(rng.integers(0, 4)),
        detail_seed=int(rng.integers(0, 2**31)),
    )


def in_black_on_white(look: Look) -> Look:
    """The same pose, solid black on plain white."""
    black, white = (0, 0, 0), (255, 255, 255)
    return replace(
        look,
        rendition="solid",
        background="plain",
        ink=black,
        second_ink=black,
        paper=white,
        second_paper=white,
        clutter=0,
    )


@functools.lru_cache(maxsize=1)
def font_path() -> Path:
    """The DejaVu Sans file inside matplotlib's own data folder."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.lru_cache(maxsize=4)
def _font(points: int) -> ImageFont.FreeTypeFont:
    # the basic layout engine is in every Pillow build, raqm is not
    return ImageFont.truetype(str(font_path()), points, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=1024)
def glyph_mask(codepoint: int, side: int) -> Image.Image:
    """The glyph as an 8-bit mask (side, side): cropped to its ink, the longer side filling the square, centred."""
    font = _font(2 * side)
    left, top, right, bottom = (round(v) for v in font.getbbox(chr(codepoint)))
    ink = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(ink).text((1 - left, 1 - top), chr(codepoint), fill=255, font=font)
    ink = ink.crop(ink.getbbox() or (0, 0, 1, 1))
    ratio = side / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * ratio)), max(1, round(ink.height * ratio))), Image.Resampling.LANCZOS)
    mask = Image.new("L", (side, side))
    mask.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return mask


def draw_glyph(codepoint: int, look: Look, size: int = 32) -> NDArray[np.uint8]:
    """Draws a glyph with a look: uint8 RGB, shape (size, size, 3). The same arguments give the same pixels."""
    rng = np.random.Generator(np.random.PCG64(look.detail_seed))
    side = 2 * size
    page = _draw_background(look, side, rng)
    behind = look.clutter // 2
    _draw_clutter(page, look, behind, rng)
    mask = _posed(glyph_mask(codepoint, side), look)
    _draw_ink(page, mask, look, rng)
    _draw_clutter(page, look, look.clutter - behind, rng)
    return np.asarray(page.resize((size, size), Image.Resampling.BOX))


def draw_images(codepoint: int, generators: list[np.random.Generator], size: int = 32) -> NDArray[np.uint8]:
    """One image with a random look from each generator: uint8, shape (len(generators), size, size, 3)."""
    out = np.empty((len(generators), size, size, 3), dtype=np.uint8)
    for i, rng in enumerate(generators):
        out[i] = draw_glyph(codepoint, sample_look(rng), size)
    return out


def _posed(mask: Image.Image, look: Look) -> Image.Image:
    """Rotated, scaled, stretched, sheared and shifted; PIL wants the map from output to input."""
    side = mask.width
    turn = math.radians(look.angle)
    rotate = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    forward = rotate @ np.array([[1.0, look.shear], [0.0, 1.0]])
    forward = forward @ np.diag([look.scale * look.stretch, look.scale / look.stretch])
    back = np.linalg.inv(forward)
    centre = np.array([side / 2, side / 2])
    offset = centre - back @ (centre + side * np.array(look.shift))
    data = (back[0, 0], back[0, 1], offset[0], back[1, 0], back[1, 1], offset[1])
    return mask.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)


def _ramp(side: int, angle: float) -> NDArray[np.floating]:
    """Distance along a direction in fractions of the side, about -0.7..0.7, shape (side, side)."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    return axis[None, :] * np.float32(math.cos(angle)) + axis[:, None] * np.float32(math.sin(angle))


def _mask_of(values: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))


def _smooth_noise(side: int, cells: int, rng: np.random.Generator) -> NDArray[np.floating]:
    """Noise in 0..1 that changes over side / cells pixels, shape (side, side)."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _draw_background(look: Look, side: int, rng: np.random.Generator) -> Image.Image:
    page = Image.new("RGB", (side, side), look.paper)
    if look.background == "plain":
        return page
    angle = rng.uniform(0, math.pi)
    if look.background == "gradient":
        share = _ramp(side, angle) + 0.5
    elif look.background == "stripes":
        share = np.sin(_ramp(side, angle) * (2 * math.pi * rng.uniform(3, 7))) > 0
    elif look.background == "checks":
        waves = 2 * math.pi * rng.uniform(2, 4)
        share = np.sin(_ramp(side, angle) * waves) * np.sin(_ramp(side, angle + math.pi / 2) * waves) > 0
    else:
        share = _smooth_noise(side, int(rng.integers(3, 8)), rng)
    page.paste(look.second_paper, mask=_mask_of(share))
    return page


def _draw_clutter(page: Image.Image, look: Look, pieces: int, rng: np.random.Generator) -> None:
    """Short strokes, rings and dots in colours of their own."""
    if not pieces:
        return
    side = page.width
    draw = ImageDraw.Draw(page)
    palette = list(COLOURS.values())
    for _ in range(pieces):
        colour = palette[rng.integers(len(palette))]
        x, y = rng.uniform(0, side, 2)
        reach = rng.uniform(0.05, 0.16) * side
        width = max(1, round(side / 32 * rng.uniform(0.6, 1.6)))
        kind = rng.integers(3)
        if kind == 0:
            turn = rng.uniform(0, math.pi)
            dx, dy = 2 * reach * math.cos(turn), 2 * reach * math.sin(turn)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=colour, width=width)
        elif kind == 1:
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=width)
        else:
            draw.ellipse((x - reach / 2, y - reach / 2, x + reach / 2, y + reach / 2), fill=colour)


def _outline(mask: Image.Image) -> Image.Image:
    """Where the mask changes: the brightest of a pixel and its eight neighbours, less the darkest."""
    values = np.asarray(mask)
    return Image.fromarray(_of_nine(np.maximum, values) - _of_nine(np.minimum, values))


def _of_nine(function: np.ufunc, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`function` of every value and its eight neighbours, shape as `values`; beyond an edge the edge goes on."""
    wide = np.pad(values, 1, mode="edge")
    rows = function(function(wide[:-2], wide[1:-1]), wide[2:])
    found: NDArray[np.uint8] = function(function(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    return found


def _draw_ink(page: Image.Image, mask: Image.Image, look: Look, rng: np.random.Generator) -> None:
    side = page.width
    if look.rendition == "solid":
        page.paste(look.ink, mask=mask)
    elif look.rendition == "outline":
        page.paste(look.ink, mask=_outline(mask))
    elif look.rendition == "hatched":
        waves = 2 * math.pi * rng.uniform(8, 12)
        lines = _mask_of(0.5 + 0.9 * np.sin(_ramp(side, rng.uniform(0, math.pi)) * waves))
        page.paste(look.ink, mask=ImageChops.multiply(mask, lines))
        page.paste(look.ink, mask=_outline(mask).point(lambda v: v * 0.6))
    elif look.rendition == "dotted":
        angle, waves = rng.uniform(0, math.pi), 2 * math.pi * rng.uniform(8, 11)
        lattice = np.cos(_ramp(side, angle) * waves) + np.cos(_ramp(side, angle + math.pi / 2) * waves)
        dots = _mask_of(0.75 + lattice)
        page.paste(look.ink, mask=ImageChops.multiply(mask, dots))
    elif look.rendition == "gradient":
        page.paste(look.ink, mask=mask)
        share = _mask_of(_ramp(side, rng.uniform(0, 2 * math.pi)) * 1.4 + 0.5)
        page.paste(look.second_ink, mask=ImageChops.multiply(mask, share))
    elif look.rendition == "sketch":
        # several shaky strokes over one another, as a pencil draws a contour
        edge = np.asarray(_outline(mask), dtype=np.float32) / 255
        rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
        for _ in range(2):
            shake = side / 64 * rng.uniform(2.0, 4.5)
            r = np.clip(rows + shake * (_smooth_noise(side, 6, rng) - 0.5) * 2, 0, side - 1).astype(np.int64)
            c = np.clip(columns + shake * (_smooth_noise(side, 6, rng) - 0.5) * 2, 0, side - 1).astype(np.int64)
            page.paste(look.ink, mask=_mask_of(edge[r, c] * 0.75))
    elif look.rendition == "noise":
        grain = rng.uniform(0, 1, (side // 2, side // 2)) > rng.uniform(0.2, 0.45)
        specks = Image.fromarray((grain * 255).astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
        page.paste(look.ink, mask=ImageChops.multiply(mask, specks))
    else:
        raise ValueError(f"no rendition is called {look.rendition!r}")
