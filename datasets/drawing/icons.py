"""Small coloured pictures for a shirt or a corner of a portrait, and the pen that draws them. No model code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

DARK: Colour = (44, 40, 52)
WHITE: Colour = (250, 250, 248)


def mixed(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with a `share` of `b`."""
    r, g, c = (round((1 - share) * x + share * y) for x, y in zip(a, b, strict=True))
    return (r, g, c)


def shade(colour: Colour, by: float = 0.45) -> Colour:
    """A darker tone of it, for outlines."""
    return mixed(colour, (16, 8, 24), by)


@dataclass(frozen=True)
class Pen:
    """Draws in units of its own: `matrix` (2, 3) maps them to pixels of `on`."""

    on: ImageDraw.ImageDraw
    matrix: NDArray[np.float64]

    @property
    def unit(self) -> float:
        """Pixels per unit."""
        return float(math.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))

    def at(self, x: float, y: float, size: float = 1.0, turn: float = 0.0) -> Pen:
        """A pen whose origin is at (x, y), whose unit is `size` of this one's, turned by `turn` degrees."""
        a = math.radians(turn)
        inner = np.array(
            [[size * math.cos(a), -size * math.sin(a), x], [size * math.sin(a), size * math.cos(a), y], [0, 0, 1]]
        )
        return Pen(self.on, self.matrix @ inner)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        (a, b, c), (d, e, f) = self.matrix.tolist()
        return [(a * x + b * y + c, d * x + e * y + f) for x, y in points]

    def area(self, points: Sequence[Point], fill: Colour, edge: Colour | None = None, width: float = 0.8) -> None:
        """A polygon; `edge` is drawn around it."""
        placed = self._pixels(points)
        if edge is not None:
            self._stroke([*placed, placed[0], placed[1]], width * 2, edge)
        self.on.polygon(placed, fill=fill)

    def oval(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Colour,
        edge: Colour | None = None,
        width: float = 0.8,
        turn: float = 0.0,
    ) -> None:
        """An ellipse turned by `turn` degrees."""
        self.area(arc(x, y, rx, ry, 0, 360, turn), fill, edge, width)

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A line with round ends and joints."""
        self._stroke(self._pixels(points), width, fill)

    def _stroke(self, placed: list[Point], width: float, fill: Colour) -> None:
        thick = max(1.0, width * self.unit)
        self.on.line(placed, fill=fill, width=round(thick), joint="curve")
        half = thick / 2
        for x, y in (placed[0], placed[-1]):
            self.on.ellipse((x - half, y - half, x + half, y + half), fill=fill)


def arc(
    x: float,
    y: float,
    rx: float,
    ry: float,
    start: float = 0,
    stop: float = 360,
    turn: float = 0,
) -> list[Point]:
    """Points of an arc, degrees clockwise from the right as the page's y points down."""
    count = max(6, round(abs(stop - start) / 10))
    a = math.radians(turn)
    cosine, sine = math.cos(a), math.sin(a)
    out = []
    for i in range(count):
        t = math.radians(start + (stop - start) * i / (count - 1))
        u, v = rx * math.cos(t), ry * math.sin(t)
        out.append((x + u * cosine - v * sine, y + u * sine + v * cosine))
    return out


def star(points: int, outer: float, inner: float, x: float = 0, y: float = 0) -> list[Point]:
    """Corners of a star that points up."""
    out = []
    for i in range(2 * points):
        r, a = (outer, inner)[i % 2], math.pi * i / points - math.pi / 2
        out.append((x + r * math.cos(a), y + r * math.sin(a)))
    return out


def heart(r: float = 1.0) -> list[Point]:
    """Outline of a heart about the origin."""
    out = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        x = math.sin(t) ** 3
        y = (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2) / 16
        out.append((x * r, -y * r))
    return out


def smooth(knots: Sequence[Point], steps: int = 6) -> list[Point]:
    """A Catmull-Rom curve through the knots."""
    k = [knots[0], *knots, knots[-1]]
    out: list[Point] = []
    for i in range(len(k) - 3):
        for j in range(steps):
            t = j / steps
            # weights of the four knots around
            w = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            x = sum(v * q[0] for v, q in zip(w, k[i : i + 4], strict=True)) / 2
            y = sum(v * q[1] for v, q in zip(w, k[i : i + 4], strict=True)) / 2
            out.append((x, y))
    return [*out, knots[-1]]


def crescent(r: float = 1.0) -> list[Point]:
    """Outline of a waning moon about the origin."""
    return [*arc(0, 0, r, r, 40, 320), *arc(0.42 * r, 0, 0.72 * r, 0.8 * r, 295, 65)]


# --- emblems: about the origin within a circle of radius 1 ---------------------------------------------------------


def _star(p: Pen) -> None:
    p.area(star(5, 1.0, 0.45, y=0.06), (246, 190, 20))


def _heart(p: Pen) -> None:
    p.area(heart(0.95), (222, 32, 54))


def _moon(p: Pen) -> None:
    p.at(0.16, 0).area(crescent(0.95), (52, 84, 190))


def _bolt(p: Pen) -> None:
    p.area([(0.25, -1), (-0.62, 0.2), (-0.05, 0.2), (-0.3, 1), (0.62, -0.25), (0.05, -0.25)], (244, 132, 12))


def _flower(p: Pen) -> None:
    for i in range(5):
        a = 2 * math.pi * i / 5 - math.pi / 2
        p.oval(0.56 * math.cos(a), 0.56 * math.sin(a), 0.42, 0.42, (238, 92, 168))
    p.oval(0, 0, 0.36, 0.36, (250, 216, 60))


def _fish(p: Pen) -> None:
    p.area([(0.35, 0), (1.0, -0.62), (1.0, 0.62)], (20, 150, 168))
    p.oval(-0.2, 0, 0.76, 0.52, (20, 150, 168))
    p.oval(-0.55, -0.1, 0.15, 0.15, WHITE)


def _anchor(p: Pen) -> None:
    navy = (26, 44, 110)
    p.line([(0, -0.5), (0, 0.85)], 0.26, navy)
    p.line([(-0.45, -0.25), (0.45, -0.25)], 0.24, navy)
    p.line(arc(0, 0.15, 0.78, 0.72, 15, 165), 0.28, navy)
    p.oval(0, -0.72, 0.28, 0.28, navy)
    p.oval(0, -0.72, 0.1, 0.1, WHITE)


def _apple(p: Pen) -> None:
    p.oval(-0.3, 0.2, 0.56, 0.68, (106, 184, 40))
    p.oval(0.3, 0.2, 0.56, 0.68, (106, 184, 40))
    p.line([(0, -0.35), (0.08, -0.85)], 0.2, (104, 64, 30))
    p.oval(0.42, -0.7, 0.36, 0.18, (40, 120, 40), turn=-25)


def _mushroom(p: Pen) -> None:
    p.area([(-0.28, 0), (0.28, 0), (0.4, 0.95), (-0.4, 0.95)], (226, 196, 152))
    p.area(arc(0, 0.14, 1.0, 1.05, 180, 360), (208, 36, 36))
    for x, y in ((-0.5, -0.2), (0.1, -0.5), (0.55, -0.12)):
        p.oval(x, y, 0.2, 0.2, WHITE)


def _diamond(p: Pen) -> None:
    p.area([(-0.55, -0.7), (0.55, -0.7), (1.0, -0.15), (0, 0.95), (-1.0, -0.15)], (70, 192, 236))
    p.area([(-0.3, -0.15), (0.3, -0.15), (0, 0.95)], (170, 232, 250))
    p.line([(-0.95, -0.15), (0.95, -0.15)], 0.14, (20, 110, 160))


def _note(p: Pen) -> None:
    p.oval(-0.5, 0.62, 0.38, 0.3, DARK, turn=-15)
    p.oval(0.56, 0.42, 0.38, 0.3, DARK, turn=-15)
    p.line([(-0.2, 0.6), (-0.2, -0.7), (0.84, -0.9), (0.84, 0.4)], 0.2, DARK)
    p.line([(-0.2, -0.62), (0.84, -0.82)], 0.34, DARK)


def _cat(p: Pen) -> None:
    grey = (118, 116, 132)
    p.area([(-0.85, -0.95), (-0.1, -0.4), (-0.85, 0.15)], grey)
    p.area([(0.85, -0.95), (0.1, -0.4), (0.85, 0.15)], grey)
    p.oval(0, 0.2, 0.88, 0.72, grey)
    p.oval(-0.36, 0.08, 0.2, 0.2, (196, 240, 80))
    p.oval(0.36, 0.08, 0.2, 0.2, (196, 240, 80))
    p.area([(-0.16, 0.4), (0.16, 0.4), (0, 0.6)], (250, 150, 170))


def _leaf(p: Pen) -> None:
    shape = [(-0.9, 0.85), (-0.85, -0.1), (-0.2, -0.8), (0.95, -0.95), (0.8, 0.2), (0.1, 0.85)]
    p.area(shape, (34, 138, 62))
    p.line([(-0.85, 0.8), (0.5, -0.5)], 0.16, (190, 232, 160))


def _arrow(p: Pen) -> None:
    p.area(
        [(0, -1), (0.85, -0.05), (0.32, -0.05), (0.32, 0.95), (-0.32, 0.95), (-0.32, -0.05), (-0.85, -0.05)],
        (140, 48, 180),
    )


def _target(p: Pen) -> None:
    for r, colour in ((0.98, (214, 40, 40)), (0.66, WHITE), (0.36, (214, 40, 40))):
        p.oval(0, 0, r, r, colour)


def _cherries(p: Pen) -> None:
    p.line([(-0.5, 0.4), (0.15, -0.85), (0.5, 0.3)], 0.17, (60, 130, 40))
    p.oval(0.4, -0.75, 0.38, 0.2, (60, 150, 50), turn=15)
    p.oval(-0.52, 0.52, 0.43, 0.43, (190, 16, 70))
    p.oval(0.52, 0.46, 0.43, 0.43, (190, 16, 70))


EMBLEMS: dict[str, Callable[[Pen], None]] = {
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "lightning bolt": _bolt,
    "flower": _flower,
    "fish": _fish,
    "anchor": _anchor,
    "apple": _apple,
    "mushroom": _mushroom,
    "diamond": _diamond,
    "music note": _note,
    "cat": _cat,
    "leaf": _leaf,
    "arrow": _arrow,
    "target": _target,
    "cherry": _cherries,
}


# --- things: about the origin within a circle of radius 1 ----------------------------------------------------------


def _sun(p: Pen) -> None:
    p.area(star(10, 1.0, 0.68), (255, 150, 20), (150, 84, 10), 0.07)
    p.oval(0, 0, 0.58, 0.58, (255, 214, 40))


def _cloud(p: Pen) -> None:
    parts = ((-0.5, 0.2, 0.45, 0.4), (0.5, 0.2, 0.46, 0.4), (0, -0.1, 0.55, 0.55), (0, 0.35, 0.7, 0.28))
    for x, y, rx, ry in parts:
        p.oval(x, y, rx, ry, WHITE, (92, 108, 148), 0.1)
    for x, y, rx, ry in parts:
        p.oval(x, y, rx, ry, WHITE)


def _tree(p: Pen) -> None:
    p.area([(-0.17, 0.2), (0.17, 0.2), (0.2, 1), (-0.2, 1)], (122, 76, 40), (70, 40, 20), 0.07)
    for x, y, r in ((-0.38, 0.02, 0.48), (0.38, 0.02, 0.48), (0, -0.48, 0.5)):
        p.oval(x, y, r, r, (48, 156, 60), (20, 82, 34), 0.08)
    p.oval(0, -0.1, 0.5, 0.4, (48, 156, 60))


def _house(p: Pen) -> None:
    p.area([(-0.7, -0.1), (0.7, -0.1), (0.7, 0.95), (-0.7, 0.95)], (252, 232, 188), (90, 60, 40), 0.08)
    p.area([(-1, 0), (0, -0.95), (1, 0)], (206, 62, 44), (110, 24, 20), 0.08)
    p.area([(-0.2, 0.35), (0.25, 0.35), (0.25, 0.95), (-0.2, 0.95)], (104, 64, 40))


def _balloon(p: Pen) -> None:
    p.line([(0, 0.45), (0.12, 0.7), (-0.05, 1)], 0.1, DARK)
    p.area([(-0.16, 0.62), (0.16, 0.62), (0, 0.36)], (210, 30, 50))
    p.oval(0, -0.25, 0.62, 0.72, (228, 40, 60), (126, 10, 30), 0.08)
    p.oval(-0.22, -0.5, 0.14, 0.2, (255, 190, 196), turn=20)


def _kite(p: Pen) -> None:
    p.line([(0.05, 0.3), (-0.2, 0.6), (0.15, 0.75), (-0.1, 1)], 0.11, (60, 60, 90))
    p.area([(0.2, -1), (0.8, -0.35), (0.05, 0.5), (-0.55, -0.35)], (250, 200, 40), (60, 60, 90), 0.09)
    p.area([(0.2, -1), (0.8, -0.35), (0.16, -0.35)], (40, 130, 220))
    p.area([(0.05, 0.5), (-0.55, -0.35), (0.16, -0.35)], (40, 130, 220))


def _cactus(p: Pen) -> None:
    for colour, extra in (((16, 84, 50), 0.14), ((60, 170, 90), 0.0)):
        p.line([(0, -0.7), (0, 0.55)], 0.42 + extra, colour)
        p.line([(0, 0.25), (-0.6, 0.15), (-0.6, -0.3)], 0.28 + extra, colour)
        p.line([(0, 0.05), (0.6, -0.02), (0.6, -0.5)], 0.28 + extra, colour)
    p.area([(-0.5, 0.45), (0.5, 0.45), (0.36, 1), (-0.36, 1)], (206, 100, 52), (110, 44, 20), 0.08)


def _sailboat(p: Pen) -> None:
    p.area([(0.02, -1), (0.02, 0.35), (-0.8, 0.35)], WHITE, (60, 70, 110), 0.08)
    p.area([(0.14, -0.7), (0.8, 0.35), (0.14, 0.35)], (232, 60, 60), (60, 70, 110), 0.08)
    p.area([(-0.95, 0.5), (0.95, 0.5), (0.6, 0.95), (-0.6, 0.95)], (40, 74, 160), (20, 30, 80), 0.07)


def _rocket(p: Pen) -> None:
    p.area([(-0.25, 0.6), (0.25, 0.6), (0, 1.0)], (255, 150, 20))
    p.area([(-0.3, 0.05), (-0.75, 0.65), (-0.2, 0.55)], (214, 40, 50), (110, 10, 24), 0.06)
    p.area([(0.3, 0.05), (0.75, 0.65), (0.2, 0.55)], (214, 40, 50), (110, 10, 24), 0.06)
    p.oval(0, -0.15, 0.4, 0.85, (232, 236, 244), (70, 76, 100), 0.08)
    p.area([(0, -1.02), (0.29, -0.62), (-0.29, -0.62)], (214, 40, 50))
    p.oval(0, -0.2, 0.19, 0.19, (40, 140, 220))


def _umbrella(p: Pen) -> None:
    p.line([(0, -0.2), (0, 0.75), (0.18, 0.9), (0.36, 0.75)], 0.14, (96, 60, 40))
    p.area(arc(0, 0.1, 0.98, 1.0, 180, 360), (150, 60, 190), (70, 20, 100), 0.08)
    p.area(arc(0, 0.1, 0.36, 1.0, 180, 360), (250, 210, 70))


def _rainbow(p: Pen) -> None:
    for r, colour in ((0.98, (224, 50, 50)), (0.8, (248, 160, 30)), (0.62, (250, 226, 60)), (0.44, (60, 180, 80))):
        p.area(arc(0, 0.5, r, r * 1.25, 180, 360), colour)
    p.area(arc(0, 0.5, 0.26, 0.33, 180, 360), (50, 110, 220))
    for x in (-0.75, 0.75):
        p.oval(x, 0.55, 0.26, 0.24, WHITE)


def _mountain(p: Pen) -> None:
    p.area([(-0.1, 0.85), (0.5, -0.35), (1.02, 0.85)], (110, 120, 150), (60, 64, 90), 0.07)
    p.area([(-1.02, 0.85), (-0.25, -0.85), (0.6, 0.85)], (132, 140, 170), (60, 64, 90), 0.08)
    p.area([(-0.25, -0.85), (0.02, -0.3), (-0.2, -0.1), (-0.3, -0.32), (-0.52, -0.22)], WHITE)


def _snowman(p: Pen) -> None:
    p.oval(0, 0.5, 0.58, 0.5, WHITE, (70, 90, 140), 0.09)
    p.oval(0, -0.2, 0.4, 0.38, WHITE, (70, 90, 140), 0.09)
    p.area([(-0.28, -1.0), (0.28, -1.0), (0.28, -0.5), (-0.28, -0.5)], DARK)
    p.line([(-0.46, -0.5), (0.46, -0.5)], 0.14, DARK)
    p.line([(0, -0.15), (0.3, -0.1)], 0.14, (240, 120, 20))
    p.line([(-0.36, 0.12), (0.36, 0.12)], 0.18, (220, 40, 50))


def _clock(p: Pen) -> None:
    p.oval(0, 0, 0.9, 0.9, (255, 252, 236), (150, 84, 30), 0.17)
    p.line([(0, 0), (0, -0.62)], 0.17, DARK)
    p.line([(0, 0), (0.45, 0.2)], 0.17, DARK)


def _butterfly(p: Pen) -> None:
    for side in (-1, 1):
        p.oval(0.48 * side, -0.38, 0.44, 0.52, (64, 120, 236), (20, 30, 100), 0.08, turn=25 * side)
        p.oval(0.42 * side, 0.45, 0.34, 0.42, (250, 140, 40), (110, 40, 10), 0.08, turn=-25 * side)
    p.line([(0, -0.6), (0, 0.7)], 0.2, DARK)


def _planet(p: Pen) -> None:
    p.oval(0, 0, 0.62, 0.62, (236, 150, 80), (120, 60, 30), 0.08)
    p.line(arc(0, 0, 1.0, 0.32, -20, 200, -20), 0.17, (120, 70, 160))
    p.line(arc(0, 0, 0.5, 0.5, 200, 250), 0.14, (255, 206, 150))


THINGS: dict[str, Callable[[Pen], None]] = {
    "sun": _sun,
    "cloud": _cloud,
    "tree": _tree,
    "house": _house,
    "balloon": _balloon,
    "kite": _kite,
    "cactus": _cactus,
    "sailboat": _sailboat,
    "rocket": _rocket,
    "umbrella": _umbrella,
    "rainbow": _rainbow,
    "mountain": _mountain,
    "snowman": _snowman,
    "clock": _clock,
    "butterfly": _butterfly,
    "planet": _planet,
}
