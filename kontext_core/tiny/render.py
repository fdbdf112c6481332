"""From a scene to its picture, and to the masks of its parts."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image

from .backdrop import draw_backdrop, draw_weather, light
from .figures import draw_creature, draw_sign
from .looks import apply_grade, apply_look
from .pen import SUPERSAMPLE, Pen, blank, reduced
from .scene import Creature, Scene, Sign, Thing
from .things import draw_thing


@lru_cache(maxsize=8)
def _backdrop(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """Backgrounds of the last few scenes: context and target usually share theirs."""
    return draw_backdrop(scene, size)


def render(
    scene: Scene, size: tuple[int, int] = (128, 128), window: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """The picture of a scene.

    Args:
        scene: what to draw.
        size: (w, h) in pixels, from 32 up; the world's own size is (128, 128).
        window: (left, top, right, bottom) in pixels: only this part of the picture, cheaper. A look is applied
            to the part as if it were a picture, so its patterns fit the whole's if the corner lies on a
            multiple of an eighth of the shorter side, and outlines may miss at its edges.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: if a side is too small to draw on.
    """
    if min(size) < 32:
        raise ValueError(
            f"size is {size}, but both sides must be at least 32 pixels: ask for a larger picture"
        )
    bare = replace(
        scene, things=(), sign=None, creature=None, grade="none", look=replace(scene.look, name="flat")
    )
    canvas = _backdrop(bare, size).copy()
    pen = Pen(canvas, (0.0, 0.0), SUPERSAMPLE, light(scene, front=True))
    if scene.sign is not None:
        draw_sign(pen, scene.sign, size)
    for thing in sorted(scene.things, key=lambda t: (not t.air, t.y)):
        draw_thing(pen, thing, size, scene)
    if scene.creature is not None:
        draw_creature(pen, scene.creature, size)
    if scene.weather in ("rain", "snow") and scene.background != "room":
        draw_weather(canvas, scene, size)
    return apply_look(apply_grade(reduced(canvas, window), scene.grade), scene.look, float(min(size)))


def mask_of(part: Thing | Sign | Creature, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    """Where a part is drawn, without its shadow: float32 (H, W), 1 inside, fractions on the edge."""
    canvas = blank(size, "L")
    pen = Pen(canvas, (0.0, 0.0), SUPERSAMPLE)
    if isinstance(part, Thing):
        draw_thing(pen, part, size)
    elif isinstance(part, Sign):
        draw_sign(pen, part, size)
    else:
        draw_creature(pen, part, size)
    return reduced(canvas).astype(np.float32) / 255
