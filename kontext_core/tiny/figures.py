"""Signs with words, and the invented creatures."""

from __future__ import annotations

import math

from .letters import draw_letter
from .pen import Colour, Pen, darker, lighter
from .scene import BOARDS, COLOURS, INKS, Creature, Sign

# A sign is a letter board: SLOTS cells side by side, words from the first one on. At 128 pixels a cell is one of the
# transformer's tokens wide and two high, so that a letter is the same tokens wherever it stands.
SLOTS = 6
ADVANCE = 0.125  # from cell to cell, in units
SLOT_HALF = (0.055, 0.115)  # half width and height of a cell, in units
CAP = 0.178  # the letters' height, in units: 23 pixels of 128
SIGN_Y = {"billboard": 0.375, "shop": 0.25, "poster": 0.375}
SIGN_HALF = (0.455, 0.165)  # half width and height of the board, in units


def slot_centres(sign: Sign, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Pixel centres of the board's cells in a picture of size (w, h)."""
    w, h = size
    step = ADVANCE * min(size)
    return [(w / 2 + step * (k - (SLOTS - 1) / 2), SIGN_Y[sign.kind] * h) for k in range(SLOTS)]


def letter_centres(sign: Sign, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Pixel centres of the word's letters in a picture of size (w, h).

    Raises:
        ValueError: the word is longer than the board has cells.
    """
    if len(sign.word) > SLOTS:
        raise ValueError(f"{sign.word!r} has {len(sign.word)} letters, but a board has {SLOTS} cells")
    return slot_centres(sign, size)[: len(sign.word)]


def draw_sign(pen: Pen, sign: Sign, size: tuple[int, int]) -> None:
    """The sign, its supports and its word. The pen's origin is the picture's corner, its scale per pixel."""
    w, h = size
    unit = min(size)
    board = BOARDS[sign.board]
    rim = darker(board, 0.35) if sum(board) > 300 else lighter(board, 0.35)
    p = pen.at(w / 2 * pen.scale, SIGN_Y[sign.kind] * h * pen.scale, unit * pen.scale)
    wide, high = SIGN_HALF
    ground = (0.84 - SIGN_Y[sign.kind]) * h / unit
    if sign.kind == "billboard":
        for x in (-0.28, 0.28):
            p.rect(x - 0.025, 0, x + 0.025, ground, (120, 88, 66))
        p.rect(-wide, -high, wide, high, rim, 0.03)
        p.rect(-wide + 0.022, -high + 0.022, wide - 0.022, high - 0.022, board, 0.02)
    elif sign.kind == "shop":
        top = -SIGN_Y[sign.kind] * h / unit
        for x in (-0.3, 0.3):
            p.rect(x - 0.012, top, x + 0.012, -high, (84, 76, 92))
        p.rect(-wide, -high, wide, high, rim, 0.12)
        p.rect(-wide + 0.022, -high + 0.022, wide - 0.022, high - 0.022, board, 0.105)
    else:
        for x in (-0.3, 0.3):
            p.stroke([(x, 0), (x * 1.14, ground)], 0.04, (120, 88, 66))
        p.rect(-wide, -high - 0.01, wide, high + 0.03, board)
        p.rect(-wide, high - 0.012, wide, high + 0.03, rim)
        for x in (-wide + 0.035, wide - 0.035):
            p.ellipse(x, -high + 0.028, 0.022, 0.022, (214, 70, 70))
    slot = darker(board, 0.09) if sum(board) > 300 else lighter(board, 0.09)
    for x, y in slot_centres(sign, size):
        cell = pen.at(x * pen.scale, y * pen.scale, unit * pen.scale)
        cell.rect(-SLOT_HALF[0], -SLOT_HALF[1], SLOT_HALF[0], SLOT_HALF[1], slot, 0.02)
    for letter, (x, y) in zip(sign.word, letter_centres(sign, size), strict=True):
        draw_letter(pen, letter, x, y, CAP * unit, INKS[sign.ink])


_BODY_HALF = {
    "round": (0.72, 0.66),
    "tall": (0.52, 0.80),
    "square": (0.64, 0.66),
    "pear": (0.74, 0.76),
    "ghost": (0.60, 0.76),
}


def _body(p: Pen, kind: str, cx: float, cy: float, colour: Colour, grow: float = 1.0) -> None:
    """The outline of a body around (cx, cy); the creature's shade and its body are the same outline twice."""
    rx, ry = (half * grow for half in _BODY_HALF[kind])
    if kind in ("round", "tall"):
        p.ellipse(cx, cy, rx, ry, colour)
    elif kind == "square":
        p.rect(cx - rx, cy - ry, cx + rx, cy + ry, colour, 0.24)
    elif kind == "pear":
        outline = []
        for k in range(40):
            a = 2 * math.pi * k / 40
            narrow = 1 - 0.34 * (1 - math.sin(a)) / 2 * (1.15 if math.sin(a) < 0 else 1)
            outline.append((cx + rx * math.cos(a) * narrow, cy + ry * math.sin(a)))
        p.polygon(outline, colour)
    else:
        dome = [
            (cx + rx * math.cos(a), cy - ry + rx + rx * math.sin(a) * 1.0)
            for a in (math.pi + math.pi * k / 16 for k in range(17))
        ]
        hem = [
            (cx + rx - 2 * rx * k / 12, cy + ry - (0.16 if k % 4 == 2 else 0.05 if k % 2 else 0.0))
            for k in range(13)
        ]
        p.polygon([*dome, *hem], colour)


def _half_width(kind: str, dy: float) -> float:
    """Half the body's width at height dy (-1 top, 1 bottom), roughly."""
    rx, _ = _BODY_HALF[kind]
    if kind == "square":
        return rx
    if kind == "ghost":
        return rx if dy > -0.2 else rx * math.sqrt(max(0.0, 1 - (dy + 0.2) ** 2))
    narrow = 1.0 if kind != "pear" else 1 - 0.34 * (1 - dy) / 2 * 1.1
    return rx * narrow * math.sqrt(max(0.0, 1 - dy * dy))


def _top(p: Pen, kind: str, y: float, spread: float, colour: Colour) -> None:
    inner = lighter(colour, 0.5)
    for side in (-1, 1):
        x = side * spread
        if kind == "cat ears":
            p.polygon([(x - 0.24, y + 0.26), (x + side * 0.14, y - 0.30), (x + 0.24, y + 0.26)], colour)
            p.polygon([(x - 0.1, y + 0.14), (x + side * 0.1, y - 0.14), (x + 0.12, y + 0.14)], inner)
        elif kind == "bunny ears":
            p.ellipse(x * 0.8, y - 0.20, 0.15, 0.44, colour, turn=side * 0.16)
            p.ellipse(x * 0.8, y - 0.20, 0.07, 0.30, inner, turn=side * 0.16)
        elif kind == "horns":
            p.polygon(
                [(x - 0.15, y + 0.2), (x + side * 0.26, y - 0.34), (x + 0.15, y + 0.2)], (250, 236, 200)
            )
        elif kind == "antennae":
            p.stroke([(x * 0.6, y + 0.2), (x * 0.95, y - 0.3)], 0.09, darker(colour, 0.35))
            p.ellipse(x * 0.95, y - 0.34, 0.14, 0.14, (255, 214, 70))
    if kind == "spikes":
        for k in (-1, 0, 1):
            x = k * spread * 0.9
            lift = 0.0 if k == 0 else 0.1
            p.polygon(
                [(x - 0.2, y + 0.28 + lift), (x, y - 0.28 + lift), (x + 0.2, y + 0.28 + lift)],
                darker(colour, 0.4),
            )


def _pattern(p: Pen, creature: Creature, cy: float, colour: Colour) -> None:
    kind = creature.body
    rx, ry = _BODY_HALF[kind]
    if creature.pattern == "belly":
        p.ellipse(0, cy + 0.44 * ry, 0.58 * rx, 0.44 * ry, lighter(colour, 0.62))
    elif creature.pattern == "spots":
        for dx, dy, r in ((-0.5, 0.32, 0.13), (0.05, 0.56, 0.15), (0.52, 0.22, 0.12), (-0.3, 0.75, 0.09)):
            wide = _half_width(kind, dy) * 0.8
            p.ellipse(dx / 0.55 * wide * 0.8, cy + dy * ry, r, r, darker(colour, 0.34))
    elif creature.pattern == "stripes":
        for dy in (0.28, 0.54, 0.79):
            wide = _half_width(kind, dy) - 0.015
            p.rect(-wide, cy + dy * ry - 0.065, wide, cy + dy * ry + 0.065, darker(colour, 0.34))


def _eyes(p: Pen, creature: Creature, y: float) -> None:
    white, pupil = (255, 255, 252), (36, 30, 48)
    wide = _half_width(creature.body, -0.25)
    places = {
        "one eye": [(0.0, 0.27)],
        "two eyes": [(-0.45 * wide, 0.19), (0.45 * wide, 0.19)],
        "three eyes": [(-0.62 * wide, 0.145), (0.0, 0.145), (0.62 * wide, 0.145)],
    }[creature.eyes]
    for x, r in places:
        if creature.pose == "sleeping":
            p.stroke(
                [(x - r, y), (x - r * 0.5, y + r * 0.45), (x + r * 0.5, y + r * 0.45), (x + r, y)],
                0.085,
                pupil,
            )
        else:
            p.ellipse(x, y, r, r, white)
            p.ellipse(x + 0.02, y + 0.02, r * 0.55, r * 0.55, pupil)


def _wear(p: Pen, creature: Creature, cy: float, top: float) -> None:
    colour = COLOURS[creature.wear_colour]
    _, ry = _BODY_HALF[creature.body]
    if creature.wear == "hat":
        p.rect(-0.27, top - 0.44, 0.27, top + 0.12, colour, 0.05)
        p.rect(-0.27, top - 0.08, 0.27, top + 0.05, darker(colour, 0.45))
        p.rect(-0.46, top + 0.03, 0.46, top + 0.17, colour, 0.06)
    elif creature.wear == "crown":
        p.polygon(
            [
                (-0.34, top + 0.16),
                (-0.38, top - 0.32),
                (-0.17, top - 0.1),
                (0, top - 0.4),
                (0.17, top - 0.1),
                (0.38, top - 0.32),
                (0.34, top + 0.16),
            ],
            colour,
        )
        p.rect(-0.34, top + 0.04, 0.34, top + 0.16, darker(colour, 0.25))
    elif creature.wear == "scarf":
        y = cy + 0.2 * ry
        wide = _half_width(creature.body, 0.2) + 0.04
        p.rect(-wide, y - 0.12, wide, y + 0.13, colour, 0.11)
        p.rect(0.12, y, 0.40, y + 0.5, darker(colour, 0.16), 0.06)
    elif creature.wear == "bow":
        y = cy + 0.2 * ry
        p.polygon([(0, y), (-0.36, y - 0.22), (-0.36, y + 0.22)], colour)
        p.polygon([(0, y), (0.36, y - 0.22), (0.36, y + 0.22)], colour)
        p.ellipse(0, y, 0.12, 0.12, darker(colour, 0.3))


CREATURE_XS = (0.375, 0.5, 0.625)  # where a creature may stand: at 128 pixels a token apart
JUMP = 0.125  # how high it jumps, in units: a token too


def creature_box(creature: Creature, size: tuple[int, int]) -> tuple[float, float, float]:
    """Pixel (x, y) of the creature's drawing centre and the pixels of its local unit (it spans about ±1)."""
    w, h = size
    unit = min(size)
    half = creature.size / 2 * unit
    lift = JUMP * unit if creature.pose == "jumping" else 0.0
    return creature.x * w, creature.y * h - half - lift, half


def draw_creature(pen: Pen, creature: Creature, size: tuple[int, int]) -> None:
    """The creature and its shadow. The pen's origin is the picture's corner, its scale per pixel."""
    cx, cy, half = creature_box(creature, size)
    ground = creature.y * size[1]
    colour = COLOURS[creature.colour]
    p = pen.at(cx * pen.scale, ground * pen.scale, half * pen.scale)
    wide = 0.55 if creature.pose == "jumping" else 0.8
    p.shadow(0.04, -0.01, wide, 0.12, 0.32)
    p = pen.at(cx * pen.scale, cy * pen.scale, half * pen.scale)
    _, ry = _BODY_HALF[creature.body]
    middle = 0.94 - ry  # feet show below the body
    top = middle - ry
    spread = {"square": 0.42, "tall": 0.26, "pear": 0.30, "round": 0.40, "ghost": 0.34}[creature.body]
    limb = darker(colour, 0.25)
    feet = 0.30 if creature.pose != "jumping" else 0.42
    for side in (-1, 1):
        p.ellipse(side * feet, 0.92, 0.2, 0.11, limb)
        arm = _half_width(creature.body, 0.15)
        raised = creature.pose == "jumping" or (creature.pose == "waving" and side == 1)
        hand = (side * (arm + 0.22), middle - 0.42) if raised else (side * (arm + 0.14), middle + 0.36)
        p.stroke([(side * (arm - 0.08), middle + 0.06), hand], 0.17, limb)
    _top(p, creature.top, top, spread, colour)
    _body(p, creature.body, 0, middle, darker(colour, 0.18))
    _body(p, creature.body, -0.03, middle - 0.03, colour, 0.94)
    _pattern(p, creature, middle, colour)
    _eyes(p, creature, middle - 0.28 * ry)
    mouth = middle + 0.06 * ry
    p.stroke([(-0.13, mouth), (-0.06, mouth + 0.06), (0.06, mouth + 0.06), (0.13, mouth)], 0.06, (60, 34, 50))
    _wear(p, creature, middle, top)
