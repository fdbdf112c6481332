"""What each token of a picture shows, as class numbers: the truth that the trainer's supervision reads.

A token is 16×16 pixels. Parts are laid over each other as `render` paints them, each as the box around it.
"""

from __future__ import annotations

import numpy as np

from .figures import ADVANCE, CAP, SIGN_HALF, SIGN_Y, creature_box, letter_centres
from .letters import ALPHABET
from .scene import (
    BACKGROUNDS,
    BOARDS,
    BODIES,
    COLOURS,
    EYES,
    GRADES,
    INKS,
    LOOKS,
    PATTERNS,
    POSES,
    SHAPES,
    TIMES,
    TONES,
    TOPS,
    WEARS,
    WEATHERS,
    Scene,
)
from .things import centre, half_extent

TOKEN = 16

PARTS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "board": tuple(BOARDS),
    "letter": tuple(ALPHABET),
    "ink": tuple(INKS),
    "body": BODIES,
    "body colour": tuple(COLOURS),
    "eyes": EYES,
    "top": TOPS,
    "pattern": PATTERNS,
    "wear": WEARS,
    "wear colour": tuple(COLOURS),
    "pose": POSES,
}
"""What a token may show a piece of; class 0 is none of it, class 1 + k the k-th name."""
WHOLE: dict[str, tuple[str, ...]] = {
    "background": BACKGROUNDS,
    "time": TIMES,
    "weather": WEATHERS,
    "grade": GRADES,
    "look": LOOKS,
    "tone": tuple(TONES),
}
"""What every token of a picture has in common; class k is the k-th name."""
CLASSES: dict[str, int] = {
    **{name: 1 + len(values) for name, values in PARTS.items()},
    **{name: len(values) for name, values in WHOLE.items()},
}
"""Field -> number of classes, in the order of the columns."""
_COLUMN = {name: k for k, name in enumerate(CLASSES)}


def token_labels(scene: Scene, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    """Class numbers (N, fields) uint8 of the tokens of a picture of size (w, h), row by row.

    Raises:
        ValueError: a side is no multiple of 16.
    """
    w, h = size
    if w % TOKEN or h % TOKEN:
        raise ValueError(f"size is {w}x{h}, but labels need sides that are multiples of {TOKEN}")
    labels = np.zeros((h // TOKEN, w // TOKEN, len(CLASSES)), np.uint8)

    def fill(cx: float, cy: float, rx: float, ry: float, **values: int) -> None:
        """Give the tokens of which the box covers a third or more these classes."""
        covered = np.outer(_overlap(cy, ry, h), _overlap(cx, rx, w)) >= 1 / 3
        for name, value in values.items():
            labels[covered, _COLUMN[name.replace("_", " ")]] = value

    whole = {
        "background": scene.background,
        "time": scene.time,
        "weather": scene.weather,
        "grade": scene.grade,
        "look": scene.look.name,
        "tone": scene.look.tone,
    }
    for name, value in whole.items():
        labels[:, :, _COLUMN[name]] = WHOLE[name].index(value)
    unit = min(size)
    if scene.sign is not None:
        sign = scene.sign
        fill(
            w / 2,
            SIGN_Y[sign.kind] * h,
            SIGN_HALF[0] * unit,
            SIGN_HALF[1] * unit,
            board=_number("board", sign.board),
        )
        for letter, (x, y) in zip(sign.word, letter_centres(sign, size), strict=True):
            classes = {"letter": _number("letter", letter), "ink": _number("ink", sign.ink)}
            fill(x, y, ADVANCE / 2 * unit, CAP / 2 * unit, **classes)
    for thing in sorted(scene.things, key=lambda thing: (not thing.air, thing.y)):
        half = half_extent(thing) * unit
        classes = {"shape": _number("shape", thing.shape), "colour": _number("colour", thing.colour)}
        fill(*centre(thing, size), half, half, **classes)
    if scene.creature is not None:
        creature = scene.creature
        cx, cy, half = creature_box(creature, size)
        fill(
            cx,
            cy,
            0.8 * half,
            half,
            body=_number("body", creature.body),
            body_colour=_number("body colour", creature.colour),
            eyes=_number("eyes", creature.eyes),
            top=_number("top", creature.top),
            pattern=_number("pattern", creature.pattern),
            wear=_number("wear", creature.wear),
            wear_colour=_number("wear colour", creature.wear_colour),
            pose=_number("pose", creature.pose),
        )
    return labels.reshape(-1, len(CLASSES))


def _number(field: str, value: str) -> int:
    return 1 + PARTS[field].index(value)


def _overlap(middle: float, half: float, side: int) -> np.ndarray:
    """The share of each of the side's tokens that lies within `half` pixels of `middle`."""
    low = np.arange(0, side, TOKEN)
    shared = np.minimum(low + TOKEN, middle + half) - np.maximum(low, middle - half)
    return np.clip(shared, 0, None) / TOKEN
