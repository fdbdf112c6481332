"""How each thing looks. Local coordinates: x and y from -1 to 1, y downwards, the base at y = 1."""

from __future__ import annotations

import math

from .pen import Colour, Pen, darker, lighter, mix
from .scene import COLOURS, Scene, Thing

BROWN = (128, 82, 52)
CREAM = (255, 240, 214)
DARK = (56, 50, 66)
GLASS = (206, 234, 250)
GOLD = (255, 202, 64)


def _trim(colour: Colour, usual: Colour, other: Colour) -> Colour:
    """The usual colour of a trimming, or the other one where the usual would not be seen."""
    near = sum((a - b) ** 2 for a, b in zip(colour, usual, strict=True)) < 90**2
    return other if near else usual


def _ball(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0, 0, 1, 1, darker(colour))
    pen.ellipse(-0.07, -0.08, 0.9, 0.9, colour)
    band = _trim(colour, COLOURS["white"], COLOURS["red"])
    pen.polygon(
        [
            (-0.95, 0.05),
            (-0.4, 0.22),
            (0.3, 0.2),
            (0.97, -0.05),
            (0.95, 0.24),
            (0.3, 0.5),
            (-0.4, 0.5),
            (-0.9, 0.36),
        ],
        band,
    )
    pen.ellipse(-0.36, -0.46, 0.26, 0.18, lighter(colour, 0.6), turn=-0.6)


def _box(pen: Pen, colour: Colour) -> None:
    ribbon = _trim(colour, GOLD, COLOURS["red"])
    pen.rect(-0.82, -0.3, 0.82, 1, colour, 0.06)
    pen.rect(0.36, -0.3, 0.82, 1, darker(colour, 0.16), 0.06)
    pen.rect(-0.95, -0.5, 0.95, -0.08, lighter(colour, 0.15), 0.08)
    pen.rect(-0.19, -0.5, 0.19, 1, ribbon)
    pen.ellipse(-0.36, -0.68, 0.36, 0.22, ribbon, turn=0.45)
    pen.ellipse(0.36, -0.68, 0.36, 0.22, ribbon, turn=-0.45)
    pen.ellipse(0, -0.54, 0.17, 0.15, darker(ribbon, 0.15))


def _mushroom(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.26, -0.1), (0.26, -0.1), (0.36, 0.9), (0.2, 1), (-0.2, 1), (-0.36, 0.9)], CREAM)
    pen.polygon([(0.08, -0.1), (0.26, -0.1), (0.36, 0.9), (0.2, 1), (0.08, 1)], mix(CREAM, BROWN, 0.25))
    cap = [(math.cos(math.pi * k / 24), math.sin(math.pi * k / 24)) for k in range(25)]
    pen.polygon([(x * 1.0, 0.14 - y * 1.1) for x, y in cap], colour)
    pen.ellipse(0, 0.12, 1.0, 0.15, darker(colour))
    spot = _trim(colour, COLOURS["white"], COLOURS["red"])
    pen.ellipse(-0.45, -0.28, 0.2, 0.18, spot)
    pen.ellipse(0.1, -0.58, 0.22, 0.19, spot)
    pen.ellipse(0.55, -0.2, 0.17, 0.16, spot)


def _tree(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.13, 0), (0.13, 0), (0.15, 0.8), (0.26, 1), (-0.26, 1), (-0.15, 0.8)], BROWN)
    pen.stroke([(0, 0.55), (0.3, 0.2)], 0.13, BROWN)
    shade = darker(colour, 0.2)
    for x, y, r in ((-0.44, -0.06, 0.37), (0.46, -0.04, 0.37), (0.02, -0.1, 0.4)):
        pen.ellipse(x, y, r, r, shade)
    for x, y, r in (
        (-0.46, -0.2, 0.35),
        (0.44, -0.2, 0.35),
        (-0.24, -0.58, 0.36),
        (0.26, -0.58, 0.36),
        (0, -0.3, 0.4),
    ):
        pen.ellipse(x, y, r, r, colour)
    pen.ellipse(-0.3, -0.66, 0.18, 0.15, lighter(colour, 0.4), turn=-0.4)
    pen.ellipse(0.24, -0.32, 0.14, 0.11, lighter(colour, 0.3), turn=-0.4)


def _house(pen: Pen, colour: Colour) -> None:
    roof = _trim(colour, (122, 62, 58), (122, 62, 58))
    pen.rect(0.4, -0.86, 0.66, -0.3, darker(roof, 0.2))
    pen.rect(-0.8, -0.2, 0.8, 1, colour)
    pen.rect(0.52, -0.2, 0.8, 1, darker(colour, 0.14))
    pen.polygon([(-1.05, -0.12), (0, -1), (1.05, -0.12)], roof)
    pen.rect(-0.18, 0.36, 0.26, 1, BROWN, 0.06)
    pen.rect(-0.66, 0.1, -0.3, 0.5, GLASS)
    pen.rect(0.38, 0.1, 0.7, 0.5, GLASS)


def _flower(pen: Pen, colour: Colour) -> None:
    stem = (70, 140, 70)
    pen.stroke([(0, -0.1), (0, 1)], 0.15, stem)
    pen.ellipse(0.33, 0.62, 0.36, 0.15, stem, turn=-0.5)
    pen.ellipse(-0.33, 0.74, 0.36, 0.15, stem, turn=0.5)
    for k in range(6):
        angle = math.pi / 3 * k + math.pi / 6
        petal = colour if k % 2 else darker(colour, 0.1)
        pen.ellipse(0.47 * math.cos(angle), -0.32 + 0.43 * math.sin(angle), 0.34, 0.25, petal, turn=angle)
    pen.ellipse(0, -0.32, 0.26, 0.25, _trim(colour, GOLD, (150, 84, 40)))


def _car(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.66, 0.12), (-0.42, -0.42), (0.36, -0.42), (0.74, 0.12)], darker(colour, 0.12))
    pen.polygon([(-0.48, 0.08), (-0.32, -0.28), (-0.06, -0.28), (-0.06, 0.08)], GLASS)
    pen.polygon([(0.08, 0.08), (0.08, -0.28), (0.3, -0.28), (0.54, 0.08)], GLASS)
    pen.rect(-1.12, 0.04, 1.12, 0.72, colour, 0.2)
    pen.rect(-1.06, 0.5, 1.06, 0.72, darker(colour, 0.2), 0.1)
    pen.ellipse(1.0, 0.3, 0.12, 0.12, _trim(colour, GOLD, CREAM))
    for x in (-0.6, 0.6):
        pen.ellipse(x, 0.7, 0.31, 0.31, DARK)
        pen.ellipse(x, 0.7, 0.13, 0.13, (214, 214, 222))


def _star(pen: Pen, colour: Colour) -> None:
    def points(radius: float, inner: float) -> list[tuple[float, float]]:
        tips = [(radius if k % 2 == 0 else inner, math.pi / 5 * k - math.pi / 2) for k in range(10)]
        return [(r * math.cos(a), 0.06 + r * math.sin(a)) for r, a in tips]

    pen.polygon(points(1.06, 0.5), darker(colour, 0.16))
    pen.polygon(points(0.86, 0.4), colour)
    pen.ellipse(-0.12, -0.2, 0.16, 0.12, lighter(colour, 0.55), turn=-0.5)


def _heart(pen: Pen, colour: Colour) -> None:
    def points(size: float) -> list[tuple[float, float]]:
        steps = [2 * math.pi * k / 40 for k in range(40)]
        return [
            (
                size * math.sin(t) ** 3,
                -size * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16
                - 0.08,
            )
            for t in steps
        ]

    pen.polygon(points(1.03), darker(colour, 0.16))
    pen.polygon([(x - 0.03, y - 0.03) for x, y in points(0.88)], colour)
    pen.ellipse(-0.46, -0.42, 0.2, 0.14, lighter(colour, 0.6), turn=-0.7)


def _balloon(pen: Pen, colour: Colour) -> None:
    pen.stroke([(0, 0.5), (0.07, 0.7), (-0.05, 0.86), (0.02, 1.05)], 0.07, DARK)
    pen.polygon([(-0.14, 0.6), (0, 0.36), (0.14, 0.6)], darker(colour))
    pen.ellipse(0, -0.25, 0.72, 0.78, darker(colour, 0.14))
    pen.ellipse(-0.06, -0.3, 0.63, 0.69, colour)
    pen.ellipse(-0.3, -0.6, 0.15, 0.21, lighter(colour, 0.62), turn=0.5)


def _kite(pen: Pen, colour: Colour) -> None:
    tail = _trim(colour, COLOURS["yellow"], COLOURS["red"])
    pen.stroke([(0, 0.42), (-0.16, 0.66), (0.12, 0.84), (-0.06, 1.02)], 0.09, tail)
    pen.polygon([(0, -1), (0.74, -0.28), (0, 0.5), (-0.74, -0.28)], colour)
    pen.polygon([(0, -1), (0.74, -0.28), (0, -0.28)], darker(colour, 0.2))
    pen.polygon([(0, 0.5), (-0.74, -0.28), (0, -0.28)], lighter(colour, 0.34))


_DRAW = {
    "ball": _ball,
    "box": _box,
    "mushroom": _mushroom,
    "tree": _tree,
    "house": _house,
    "flower": _flower,
    "car": _car,
    "star": _star,
    "heart": _heart,
    "balloon": _balloon,
    "kite": _kite,
}
# Half height and half width as shares of `size`: a tree is tall, a ball is small, a car is low and wide.
_HALF = {
    "ball": 0.40,
    "box": 0.42,
    "tree": 0.56,
    "house": 0.48,
    "balloon": 0.56,
    "kite": 0.54,
    "car": 0.47,
    "mushroom": 0.46,
    "flower": 0.52,
    "star": 0.46,
    "heart": 0.43,
}


def half_extent(thing: Thing) -> float:
    """Local unit of a thing in units of the picture (its drawing reaches from -1 to 1, a car to 1.12)."""
    return thing.size * _HALF[thing.shape]


def centre(thing: Thing, size: tuple[int, int]) -> tuple[float, float]:
    """The centre of its drawing in pixels of a picture of size (w, h)."""
    w, h = size
    lift = 0.0 if thing.air else half_extent(thing) * min(w, h)
    return thing.x * w, thing.y * h - lift


def draw_thing(pen: Pen, thing: Thing, size: tuple[int, int], scene: Scene | None = None) -> None:
    """Draws a thing, and its shadow if it stands.

    Args:
        pen: a pen whose origin is the picture's corner and whose scale is canvas pixels a picture pixel.
        size: the picture's (w, h).
        scene: gives the shadow's strength; None for day.
    """
    cx, cy = centre(thing, size)
    half = half_extent(thing) * min(size)
    local = pen.at(cx * pen.scale, cy * pen.scale, half * pen.scale)
    if not thing.air:
        strength = 0.30 if scene is None or scene.time != "night" else 0.4
        local.shadow(0.06, 0.96, 1.02, 0.17, strength)
    _DRAW[thing.shape](local, COLOURS[thing.colour])
