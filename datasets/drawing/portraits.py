"""Portraits: people in a plain style, 48 px, drawn four times as large and reduced. No model code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dualcl.datasets.drawing.icons import (
    DARK,
    EMBLEMS,
    THINGS,
    WHITE,
    Colour,
    Pen,
    Point,
    arc,
    mixed,
    shade,
    smooth,
    star,
)

SIZE = 48
#: drawn so many times as large
ZOOM = 4

HAIR_COLOURS: dict[str, Colour] = {
    "black": (40, 36, 46),
    "white": (236, 236, 240),
    "blond": (246, 212, 92),
    "ginger": (216, 98, 28),
    "pink": (244, 128, 184),
    "purple": (128, 66, 180),
    "blue": (52, 116, 220),
    "green": (70, 168, 84),
}
SKINS: dict[str, Colour] = {
    "pale": (255, 226, 208),
    "tan": (232, 184, 138),
    "brown": (176, 120, 80),
    "dark": (134, 90, 64),
}
SHIRTS: dict[str, Colour] = {
    "red": (212, 46, 50),
    "orange": (244, 140, 36),
    "yellow": (248, 216, 64),
    "green": (56, 158, 80),
    "blue": (50, 96, 208),
    "purple": (136, 66, 176),
    "white": (244, 244, 242),
    "black": (48, 46, 56),
}
BACKDROPS: tuple[Colour, ...] = (
    (190, 220, 246),
    (206, 236, 204),
    (250, 230, 184),
    (246, 208, 214),
    (220, 210, 242),
    (214, 218, 222),
    (180, 228, 226),
    (250, 214, 184),
)

#: what captions may name -> its values
CAPTIONED: dict[str, tuple[str, ...]] = {
    "hair": ("short", "long", "bobbed", "curly", "pigtails", "plaits"),
    "hair_colour": tuple(HAIR_COLOURS),
    "skin": tuple(SKINS),
    "glasses": ("none", "round", "square", "monocle"),
    "hat": ("none", "cap", "top hat", "crown", "beanie", "wizard hat"),
    "beard": ("none", "moustache", "goatee", "full"),
    "expression": ("smiling", "laughing", "sad", "surprised", "angry"),
    "shirt": tuple(SHIRTS),
    "emblem": tuple(EMBLEMS),
    "thing": tuple(THINGS),
}
#: what no caption names
HIDDEN: dict[str, tuple[str, ...]] = {
    "face": ("round", "long", "square", "pointed"),
    "eyes": ("round", "narrow", "sleepy", "dots"),
    "nose": ("button", "long", "wide", "pointed"),
    "mark": ("freckles", "mole", "scar", "blush"),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {**CAPTIONED, **HIDDEN}
#: what stays the same in all pictures of one person
IDENTITY = ("hair", "hair_colour", "skin", "glasses", "hat", "beard", "emblem", *HIDDEN)

Portrait = Mapping[str, str]


@dataclass(frozen=True)
class Setting:
    """How a portrait is set: nothing that a caption names. Shifts in pixels, turn in degrees."""

    #: which half the person stands in: -1 left, 1 right
    side: int
    shift: Point
    scale: float
    turn: float
    backdrop: Colour
    #: brightness, and what red and blue are multiplied with
    light: float
    warmth: float


def sample_attributes(rng: np.random.Generator) -> dict[str, str]:
    """Every attribute at random, all values equally often."""
    return {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}


def sample_setting(rng: np.random.Generator) -> Setting:
    """A random pose, backdrop and light."""
    backdrop = BACKDROPS[rng.integers(len(BACKDROPS))]
    r, g, b = (int(np.clip(v + rng.integers(-8, 9), 0, 255)) for v in backdrop)
    return Setting(
        side=int(rng.choice((-1, 1))),
        shift=(float(rng.uniform(-1, 1)), float(rng.uniform(-0.6, 0.6))),
        scale=float(rng.uniform(0.96, 1.04)),
        turn=float(rng.uniform(-4, 4)),
        backdrop=(r, g, b),
        light=float(rng.uniform(0.92, 1.06)),
        warmth=float(rng.uniform(-0.04, 0.04)),
    )


def draw_portrait(who: Portrait, setting: Setting) -> NDArray[np.uint8]:
    """Draws a portrait: uint8 RGB (48, 48, 3). `who` has a value for each of `ATTRIBUTES`."""
    side = SIZE * ZOOM
    paper = np.array(setting.backdrop) * np.linspace(1, 0.45, side)[:, None, None]
    paper = paper + np.array(WHITE) * np.linspace(0, 0.55, side)[:, None, None]  # lighter downwards
    page = Image.fromarray(np.broadcast_to(np.rint(paper), (side, side, 3)).astype(np.uint8))
    on = ImageDraw.Draw(page)
    pen = Pen(on, np.array([[ZOOM, 0, 0], [0, ZOOM, 0.0]]))
    corner = pen.at(24 - 16 * setting.side + 0.6 * setting.shift[0], 9 + setting.shift[1], 7.0)
    THINGS[who["thing"]](corner)
    person = pen.at(24 + 5 * setting.side + setting.shift[0], 24 + setting.shift[1], setting.scale)
    body = person.at(0, -24)
    head = person.at(0, 12, 1.0, setting.turn).at(0, -36)  # turns about the neck
    _draw_hair_behind(head, who)
    _draw_body(body, who)
    _draw_head(head, who)
    small = np.asarray(page.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    tint = setting.light * np.array([1 + setting.warmth, 1, 1 - setting.warmth], dtype=np.float32)
    return np.clip(np.rint(small * tint), 0, 255).astype(np.uint8)


# --- parts; units are pixels of the picture, x from the middle of the person ---------------------------------------


def _draw_body(p: Pen, who: Portrait) -> None:
    skin, shirt = SKINS[who["skin"]], SHIRTS[who["shirt"]]
    p.area([(-4, 30), (4, 30), (4.6, 39), (-4.6, 39)], mixed(skin, shade(skin), 0.3))
    sleeves = [(-17.5, 50), (-17, 43), (-14.5, 38.8), (-6, 36.2), (6, 36.2), (14.5, 38.8), (17, 43), (17.5, 50)]
    p.area(sleeves, shirt, shade(shirt), 0.45)
    p.area(arc(0, 35.6, 5.4, 2.6, 0, 180), skin, shade(shirt), 0.3)
    p.line([(-12, 44), (-12, 50)], 0.6, shade(shirt, 0.3))
    p.line([(12, 44), (12, 50)], 0.6, shade(shirt, 0.3))
    p.oval(0, 42.7, 5.9, 5.2, WHITE, mixed(shade(shirt), WHITE, 0.3), 0.3)
    EMBLEMS[who["emblem"]](p.at(0, 42.7, 4.5))


#: face shape -> half the width at the temples, at the cheeks and at the jaw, and the chin's y
_FACES: dict[str, tuple[float, float, float, float]] = {
    "round": (10.4, 11.6, 9.2, 34.4),
    "long": (8.6, 8.6, 6.8, 37.0),
    "square": (10.2, 10.2, 10.0, 34.6),
    "pointed": (11.6, 9.6, 4.6, 36.0),
}


def _face_half(shape: str) -> list[Point]:
    """The right edge of a face from the top of the skull to the chin."""
    temple, cheek, jaw, chin = _FACES[shape]
    flat = {"round": 0.5, "long": 0.55, "square": 0.78, "pointed": 0.3}[shape]
    knots = [
        (0.0, 8.5),
        (temple * 0.62, 9.4),
        (temple * 0.96, 13.5),
        (temple, 18.0),
        (cheek, 24.0),
        (jaw, 24 + 0.68 * (chin - 24)),
        (jaw * flat, 24 + 0.95 * (chin - 24)),
        (0.0, chin),
    ]
    return smooth(knots)


def _draw_hair_behind(p: Pen, who: Portrait) -> None:
    hair = HAIR_COLOURS[who["hair_colour"]]
    edge, style = shade(hair), who["hair"]
    if style == "long":
        half = smooth([(0, 6.6), (9, 8), (12.6, 14), (13.2, 24), (13.8, 36), (15, 46), (9, 47)])
        p.area([*half, *((-x, y) for x, y in half[::-1])], hair, edge, 0.45)
        for x in (-11.5, 11.5):
            p.line([(x, 22), (x * 1.04, 44)], 0.5, edge)
    elif style == "bobbed":
        half = smooth([(0, 6.6), (9, 7.6), (13, 13), (14.6, 22), (15.4, 31), (14, 33.4), (7, 33.4)])
        p.area([*half, *((-x, y) for x, y in half[::-1])], hair, edge, 0.45)
    elif style == "curly":
        spots = [(13.2 * math.sin(a), 17.5 - 10.5 * math.cos(a)) for a in np.radians(np.linspace(-132, 132, 13))]
        for x, y in spots:
            p.oval(x, y, 3.9, 3.9, hair, edge, 0.5)
        for x, y in spots:
            p.oval(x, y, 3.4, 3.4, hair)
            p.line(arc(x, y, 1.7, 1.7, 200, 380), 0.45, edge)
    elif style == "pigtails":
        for side in (-1, 1):
            p.oval(15.2 * side, 15.5, 4.2, 5.6, hair, edge, 0.45, turn=-24 * side)
            p.oval(11.4 * side, 13.2, 1.6, 1.8, (228, 60, 90))
    elif style == "plaits":
        for side in (-1, 1):
            for i in range(5):
                p.oval((11.4 + 0.5 * i) * side, 24.5 + 4.2 * i, 2.9, 2.6, hair, edge, 0.45)
            p.oval(13.8 * side, 44.2, 1.7, 1.5, (228, 60, 90))


def _draw_head(p: Pen, who: Portrait) -> None:
    skin, hair = SKINS[who["skin"]], HAIR_COLOURS[who["hair_colour"]]
    edge = shade(skin, 0.5)
    half = _face_half(who["face"])
    temple, cheek, _, _ = _FACES[who["face"]]
    for side in (-1, 1):
        p.oval((temple + cheek) / 2 * side + 0.8 * side, 21.5, 2.0, 2.8, mixed(skin, edge, 0.12), edge, 0.4)
    outline = [*half, *((-x, y) for x, y in half[::-1])]
    p.area(outline, skin, edge, 0.5)
    _draw_mark(p, who)
    _draw_beard(p, who, half)
    _draw_mouth(p, who)
    if who["beard"] == "moustache":
        for side in (-1, 1):
            lip = smooth([(0, 27.2), (3 * side, 26.7), (5.4 * side, 28.2), (7.4 * side, 26.8)])
            back = smooth([(7.4 * side, 26.8), (6.2 * side, 29.8), (3 * side, 29.8), (0, 28.9)])
            p.area([*lip, *back], hair, shade(hair), 0.35)
    _draw_eyes(p, who)
    _draw_nose(p, who)
    _draw_brows(p, who)
    _draw_glasses(p, who)
    _draw_hair_above(p, who, temple)
    _draw_hat(p, who)


def _draw_mark(p: Pen, who: Portrait) -> None:
    skin = SKINS[who["skin"]]
    dark = who["skin"] == "dark"
    deep = shade(skin, 0.7 if dark else 0.55)
    x = {"long": 5.9, "round": 7.6, "square": 7.0, "pointed": 6.4}[who["face"]]
    kind = who["mark"]
    if kind == "freckles":
        for side in (-1, 1):
            for dx, dy in ((-1.7, -0.8), (0.0, 1.1), (1.7, -0.6)):
                p.oval(x * side + dx * side, 25.2 + dy, 0.8, 0.8, deep)
    elif kind == "mole":
        p.oval(-x + 0.2, 26, 1.45, 1.45, mixed(deep, (20, 10, 14), 0.55))
    elif kind == "scar":
        red = (244, 150, 140) if dark else (190, 40, 50)
        p.line([(x + 1.2, 22.4), (x - 1.2, 28.2)], 1.0, red)
        for y in (24.2, 26.4):
            p.line([(x - 1.6, y - 0.7), (x + 1.7, y + 0.6)], 0.7, red)
    else:
        for side in (-1, 1):
            p.oval(x * side, 25.4, 2.5, 2.0, mixed(skin, (248, 60, 130), 0.62))


def _draw_beard(p: Pen, who: Portrait, half: list[Point]) -> None:
    hair = HAIR_COLOURS[who["hair_colour"]]
    chin = half[-1][1]
    if who["beard"] == "full":
        low = [(x * 1.03, y + (0.9 if y > 30 else 0)) for x, y in half if y > 25]
        inner = smooth([(low[0][0] - 1.2, low[0][1]), (low[0][0] * 0.74, 28.3), (4, 27.6), (0, 27.2)])
        right = [*low, (0, chin + 1.2)]
        left = [(-x, y) for x, y in right[::-1]]
        p.area([*right, *left, *((-x, y) for x, y in inner), *inner[::-1]], hair, shade(hair), 0.4)
        p.oval(0, 31.0, 5.6, 2.9, SKINS[who["skin"]], shade(hair), 0.25)
    elif who["beard"] == "goatee":
        p.area(
            smooth([(-3.8, 33.4), (0, 34.0), (3.8, 33.4), (3.0, chin), (0, chin + 3.2), (-3.0, chin), (-3.8, 33.4)]),
            hair,
            shade(hair),
            0.35,
        )


def _draw_mouth(p: Pen, who: Portrait) -> None:
    lips = (150, 30, 44) if who["skin"] in ("pale", "tan") else (72, 12, 26)
    inside = (104, 20, 34)
    mood = who["expression"]
    if mood == "smiling":
        p.line(arc(0, 28.6, 4.6, 3.2, 20, 160), 1.15, lips)
    elif mood == "laughing":
        p.area(arc(0, 29.4, 4.8, 3.9, 0, 180), inside, lips, 0.4)
        p.area([(-4.3, 29.4), (4.3, 29.4), (3.8, 30.8), (-3.8, 30.8)], WHITE)
        p.oval(0, 32.4, 1.7, 0.8, (236, 110, 120))
    elif mood == "sad":
        p.line(arc(0, 33.0, 4.2, 3.2, 205, 335), 1.15, lips)
    elif mood == "surprised":
        p.oval(0, 31.0, 2.2, 2.6, inside, lips, 0.5)
    else:
        p.area([(-4.4, 29.8), (4.4, 29.8), (4.4, 32.4), (-4.4, 32.4)], WHITE, lips, 0.6)
        for x in (-2.2, 0, 2.2):
            p.line([(x, 29.8), (x, 32.4)], 0.4, lips)


_EYE = 4.5


def _draw_eyes(p: Pen, who: Portrait) -> None:
    skin = SKINS[who["skin"]]
    kind = who["eyes"]
    for side in (-1, 1):
        x = _EYE * side
        if kind == "round":
            p.oval(x, 19.6, 2.7, 2.7, WHITE, DARK, 0.4)
            p.oval(x, 19.8, 1.35, 1.35, DARK)
        elif kind == "narrow":
            p.area([*arc(x, 20.0, 3.3, 1.7, 180, 360), *arc(x, 19.6, 3.3, 1.5, 0, 180)], WHITE, DARK, 0.35)
            p.oval(x, 19.7, 1.1, 1.1, DARK)
        elif kind == "sleepy":
            p.oval(x, 19.6, 2.7, 2.7, WHITE, DARK, 0.4)
            p.oval(x, 20.4, 1.3, 1.3, DARK)
            p.area([*arc(x, 19.6, 2.9, 2.9, 180, 360), (x + 3.0, 19.9), (x - 3.0, 19.9)], shade(skin, 0.25), DARK, 0.3)
        else:
            p.oval(x, 19.8, 1.6, 1.9, DARK)


def _draw_nose(p: Pen, who: Portrait) -> None:
    skin = SKINS[who["skin"]]
    tone, edge = mixed(skin, (226, 90, 76), 0.38), shade(skin, 0.66)
    kind = who["nose"]
    if kind == "button":
        p.oval(0, 24.5, 2.5, 2.3, mixed(skin, (232, 56, 60), 0.75), edge, 0.45)
    elif kind == "long":
        p.area(
            smooth([(-0.9, 18.6), (-1.2, 23.4), (-1.9, 26), (0, 27.2), (1.9, 26), (1.2, 23.4), (0.9, 18.6)]),
            tone,
            edge,
            0.45,
        )
    elif kind == "wide":
        p.oval(0, 24.8, 4.6, 2.0, tone, edge, 0.5)
        for x in (-2.1, 2.1):
            p.oval(x, 25.1, 1.0, 0.9, shade(skin, 0.85))
    else:
        p.area([(-0.8, 18.8), (4.6, 26), (-1.4, 26.4)], tone, edge, 0.5)


def _draw_brows(p: Pen, who: Portrait) -> None:
    colour = mixed(HAIR_COLOURS[who["hair_colour"]], (30, 20, 24), 0.72)
    # ends of the right brow, inner then outer
    inner, outer = {
        "smiling": (15.2, 15.2),
        "laughing": (14.6, 15.0),
        "sad": (13.9, 16.4),
        "surprised": (13.6, 13.6),
        "angry": (16.8, 13.9),
    }[who["expression"]]
    lift = 0.8 if who["expression"] in ("smiling", "laughing", "surprised") else 0.0
    for side in (-1, 1):
        middle = (inner + outer) / 2 - lift
        p.line(smooth([(2.2 * side, inner), (4.6 * side, middle), (7.2 * side, outer)]), 1.1, colour)


def _draw_glasses(p: Pen, who: Portrait) -> None:
    kind = who["glasses"]
    if kind == "round":
        for side in (-1, 1):
            p.line([*arc(_EYE * side, 19.7, 3.9, 3.9)], 0.9, DARK)
            p.line([(8.2 * side, 19.4), (10.6 * side, 18.6)], 0.8, DARK)
        p.line([(-0.8, 19.2), (0.8, 19.2)], 0.9, DARK)
    elif kind == "square":
        red = (204, 30, 60)
        for side in (-1, 1):
            x = _EYE * side
            p.line([(x - 3.7, 16.4), (x + 3.7, 16.4), (x + 3.7, 23), (x - 3.7, 23), (x - 3.7, 16.4)], 1.2, red)
            p.line([(8.2 * side, 18.4), (10.6 * side, 18.2)], 1.0, red)
        p.line([(-0.8, 18.6), (0.8, 18.6)], 1.1, red)
    elif kind == "monocle":
        gold = (230, 170, 20)
        p.line([*arc(_EYE, 19.7, 4.1, 4.1)], 1.3, gold)
        p.line(smooth([(8.2, 21.4), (9.6, 27), (8.6, 34), (9.4, 38)]), 0.8, gold)


def _draw_hair_above(p: Pen, who: Portrait, temple: float) -> None:
    hair = HAIR_COLOURS[who["hair_colour"]]
    edge, style = shade(hair), who["hair"]
    w = temple + 0.9
    top = smooth([(-w, 19), (-w - 0.2, 13), (-w * 0.66, 7.4), (0, 5.8), (w * 0.66, 7.4), (w + 0.2, 13), (w, 19)])
    fringe: list[Point]
    if style == "short":
        fringe = [(w - 1.6, 16), (w - 2, 12.4), (4, 11), (0, 13), (-4, 10.6), (-w + 2, 12.4), (-w + 1.6, 16)]
    elif style in ("long", "plaits"):  # parted in the middle
        fringe = smooth(
            [(w - 1.2, 18), (w - 2.2, 13.6), (3.5, 10.8), (0, 8.4), (-3.5, 10.8), (-w + 2.2, 13.6), (-w + 1.2, 18)]
        )
    elif style == "bobbed":
        fringe = [(w - 1.2, 19), (w - 1.6, 13.2), (-w + 1.6, 13.2), (-w + 1.2, 19)]
    elif style == "curly":
        fringe = smooth(
            [(w - 1, 17), (w - 2.2, 12.8), (w * 0.5, 11.6), (0, 12.8), (-w * 0.5, 11.6), (-w + 2.2, 12.8), (-w + 1, 17)]
        )
    else:
        fringe = smooth([(w - 1.4, 16), (w - 2.2, 12.6), (0, 10.6), (-w + 2.2, 12.6), (-w + 1.4, 16)])
    p.area([*top, *fringe], hair, edge, 0.4)


def _draw_hat(p: Pen, who: Portrait) -> None:
    kind = who["hat"]
    if kind == "cap":
        red = (220, 50, 46)
        p.area([*arc(0, 11.6, 11.6, 8.6, 180, 360)], red, shade(red), 0.45)
        p.area(smooth([(-2, 10.4), (10, 9.8), (16.6, 12.4), (10, 13.2), (-2, 12.6)]), shade(red, 0.2), shade(red), 0.4)
        p.oval(0, 3.2, 1.2, 0.9, WHITE)
    elif kind == "top hat":
        p.area([(-8, 0.6), (8, 0.6), (7.4, 10.4), (-7.4, 10.4)], (50, 48, 60), (20, 18, 28), 0.4)
        p.area([(-7.6, 7.4), (7.6, 7.4), (7.4, 10.2), (-7.4, 10.2)], (206, 50, 60))
        p.oval(0, 11, 13, 1.9, (50, 48, 60), (20, 18, 28), 0.4)
    elif kind == "crown":
        gold = (250, 200, 40)
        teeth = [(-9.6, 11.6), (-10.8, 2.6), (-5.6, 6.6), (0, 1.2), (5.6, 6.6), (10.8, 2.6), (9.6, 11.6)]
        p.area(teeth, gold, shade(gold, 0.55), 0.45)
        for x, colour in ((-5.4, (220, 40, 60)), (0.0, (40, 120, 230)), (5.4, (220, 40, 60))):
            p.oval(x, 9.2, 1.4, 1.4, colour)
    elif kind == "beanie":
        blue = (48, 150, 190)
        p.oval(0, 2.2, 2.8, 2.4, WHITE, (120, 140, 160), 0.3)
        p.area(arc(0, 11.4, 11.2, 8.4, 180, 360), blue, shade(blue), 0.45)
        p.area([(-11.6, 9.0), (11.6, 9.0), (11.6, 12.6), (-11.6, 12.6)], WHITE, (120, 140, 160), 0.35)
        for x in range(-9, 10, 3):
            p.line([(x, 9.4), (x, 12.2)], 0.5, (150, 170, 190))
    elif kind == "wizard hat":
        violet = (92, 54, 168)
        p.area(smooth([(-8.6, 11), (-4.6, 4), (2.6, -1), (4.0, 3), (8.6, 11)]), violet, shade(violet), 0.45)
        p.oval(0, 11, 14, 2.2, violet, shade(violet), 0.4)
        for x, y, r in ((-2.8, 7.4, 2.0), (3.2, 6.6, 1.7), (0.6, 2.6, 1.4)):
            p.area(star(5, r, r * 0.45, x, y), (255, 220, 70))
