"""Capital letters drawn as strokes, so that no font file is needed and signs look the same everywhere."""

from __future__ import annotations

from .pen import Colour, Pen, arc

# Each letter is a list of polylines in a box 4 wide and 6 high, y downwards. Strokes stay bold and counters
# open at a cap height of 20 pixels; letters that are easily confused (O Q, I J, V U, B R) differ in size.
WIDTH, HEIGHT = 4.0, 6.0
STROKE = 1.05
NARROW = 0.76  # letters are condensed, to stand in the cells of a board

_BOW_TOP = [(0, 0), (2.2, 0), *arc(2.2, 1.5, 1.6, 1.5, -90, 90, 8), (0, 3)]
GLYPHS: dict[str, list[list[tuple[float, float]]]] = {
    "A": [[(0, 6), (2, 0), (4, 6)], [(0.75, 4.1), (3.25, 4.1)]],
    "B": [[(0, 0), (2, 0), *arc(2, 1.45, 1.6, 1.45, -90, 90, 8), (0, 2.9)],
          [(2, 2.9), *arc(2.2, 4.45, 1.8, 1.55, -90, 90, 8), (0, 6), (0, 0)]],
    "C": [arc(2.2, 3, 2.2, 3, -42, -318, 14)],
    "D": [[(0, 0), (1.4, 0), *arc(1.4, 3, 2.6, 3, -90, 90, 12), (0, 6), (0, 0)]],
    "E": [[(3.8, 0), (0, 0), (0, 6), (3.8, 6)], [(0, 2.9), (3.1, 2.9)]],
    "F": [[(3.8, 0), (0, 0), (0, 6)], [(0, 2.9), (3.1, 2.9)]],
    "G": [[*arc(2.2, 3, 2.2, 3, -42, -360, 15), (4.2, 3.3), (2.5, 3.3)]],
    "H": [[(0, 0), (0, 6)], [(4, 0), (4, 6)], [(0, 3), (4, 3)]],
    "I": [[(0.6, 0), (3.4, 0)], [(2, 0), (2, 6)], [(0.6, 6), (3.4, 6)]],
    "J": [[(3.6, 0), *arc(1.9, 4.3, 1.7, 1.7, 0, 165, 8)]],
    "K": [[(0, 0), (0, 6)], [(3.9, 0), (0, 3.4)], [(1.4, 2.3), (4, 6)]],
    "L": [[(0.2, 0), (0.2, 6), (3.9, 6)]],
    "M": [[(-0.2, 6), (-0.2, 0), (2, 3.6), (4.2, 0), (4.2, 6)]],
    "N": [[(0, 6), (0, 0), (4, 6), (4, 0)]],
    "O": [arc(2, 3, 2.15, 3, 0, 360, 20)],
    "P": [[*_BOW_TOP[:-1], (0, 3)], [(0, 0), (0, 6)]],
    "Q": [arc(2, 2.9, 2.15, 2.9, 0, 360, 20), [(2.3, 4.2), (4.3, 6.4)]],
    "R": [[*_BOW_TOP[:-1], (0, 3)], [(0, 0), (0, 6)], [(1.8, 3), (4, 6)]],
    "S": [[*arc(2, 1.5, 1.85, 1.5, -25, -270, 12), *arc(2, 4.5, 1.95, 1.5, -90, 155, 12)]],
    "T": [[(-0.1, 0), (4.1, 0)], [(2, 0), (2, 6)]],
    "U": [[(0, 0), *arc(2, 4, 2, 2, 180, 0, 12), (4, 0)]],
    "V": [[(-0.1, 0), (2, 6), (4.1, 0)]],
    "W": [[(-0.5, 0), (0.8, 6), (2, 1.8), (3.2, 6), (4.5, 0)]],
    "X": [[(0, 0), (4, 6)], [(4, 0), (0, 6)]],
    "Y": [[(-0.1, 0), (2, 3), (4.1, 0)], [(2, 3), (2, 6)]],
    "Z": [[(0.1, 0), (3.9, 0), (0.1, 6), (3.9, 6)]],
}  # fmt: skip
ALPHABET = "".join(sorted(GLYPHS))


def draw_letter(pen: Pen, letter: str, x: float, y: float, cap: float, colour: Colour) -> None:
    """Draws one letter centred on (x, y), its cap height `cap` from stroke to stroke's outer edge."""
    unit = cap / (HEIGHT + STROKE)
    for line in GLYPHS[letter]:
        points = [(x + (u - WIDTH / 2) * unit * NARROW, y + (v - HEIGHT / 2) * unit) for u, v in line]
        pen.stroke(points, STROKE * unit, colour)
