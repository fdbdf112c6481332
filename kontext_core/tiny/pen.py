"""A pen over Pillow: shapes in local coordinates, drawn large and reduced, so edges are smooth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLE = 3
Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]
_CIRCLE = [(math.cos(2 * math.pi * k / 36), math.sin(2 * math.pi * k / 36)) for k in range(36)]


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with this share of `b`."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))


def lighter(colour: Colour, share: float = 0.3) -> Colour:
    return mix(colour, (255, 255, 255), share)


def darker(colour: Colour, share: float = 0.22) -> Colour:
    """A shade: towards a dark violet, which stays livelier than black."""
    return mix(colour, (40, 20, 60), share)


class Pen:
    """Draws on an image `SUPERSAMPLE` times too large.

    Args:
        image: an RGB canvas, or an L canvas on which everything drawn is 255 (a mask).
        origin: canvas pixels of the local (0, 0).
        scale: canvas pixels of one local unit.
        light: (multiplier, veil colour, veil share) that every colour passes through: the time and weather.
    """

    def __init__(
        self,
        image: Image.Image,
        origin: tuple[float, float] = (0.0, 0.0),
        scale: float = 1.0,
        light: tuple[tuple[float, float, float], Colour, float] | None = None,
    ) -> None:
        self.image = image
        self.origin = origin
        self.scale = scale
        self.light = light
        self._draw = ImageDraw.Draw(image)

    def at(self, x: float, y: float, scale: float) -> Pen:
        """The same canvas with the origin at canvas pixel (x, y)."""
        return Pen(self.image, (x, y), scale, self.light)

    def ink(self, colour: Colour) -> Colour | int:
        """The colour as it lands on the canvas."""
        if self.image.mode == "L":
            return 255
        if self.light is None:
            return colour
        gain, veil, share = self.light
        return mix(tuple(min(255, round(c * g)) for c, g in zip(colour, gain, strict=True)), veil, share)

    def points(self, points: Points) -> list[tuple[float, float]]:
        (ox, oy), s = self.origin, self.scale
        return [(ox + x * s, oy + y * s) for x, y in points]

    def polygon(self, points: Points, colour: Colour) -> None:
        self._draw.polygon(self.points(points), fill=self.ink(colour))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour, turn: float = 0.0) -> None:
        """An ellipse around (x, y), turned clockwise by `turn` radians."""
        c, s = math.cos(turn), math.sin(turn)
        self.polygon([(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in _CIRCLE], colour)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, radius: float = 0.0) -> None:
        """A rectangle, with rounded corners of `radius` if any."""
        if radius <= 0:
            self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)
            return
        corners = [(x1 - radius, y1 - radius), (x0 + radius, y1 - radius)]
        corners += [(x0 + radius, y0 + radius), (x1 - radius, y0 + radius)]
        outline = []
        for quarter, (cx, cy) in enumerate(corners):
            for step in range(6):
                angle = math.pi / 2 * (quarter + step / 5)
                outline.append((cx + radius * math.cos(angle), cy + radius * math.sin(angle)))
        self.polygon(outline, colour)

    def stroke(self, points: Points, width: float, colour: Colour) -> None:
        """A line of this width with round joints and ends."""
        half = width / 2
        for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
            length = math.hypot(x1 - x0, y1 - y0)
            if length == 0:
                continue
            nx, ny = -(y1 - y0) / length * half, (x1 - x0) / length * half
            self.polygon(
                [(x0 + nx, y0 + ny), (x1 + nx, y1 + ny), (x1 - nx, y1 - ny), (x0 - nx, y0 - ny)], colour
            )
        for x, y in points:
            self.ellipse(x, y, half, half, colour)

    def shadow(self, x: float, y: float, rx: float, ry: float, strength: float) -> None:
        """A see-through dark ellipse; nothing on a mask."""
        if self.image.mode == "L":
            return
        (cx, cy), s = self.origin, self.scale
        left, top = math.floor(cx + (x - rx) * s), math.floor(cy + (y - ry) * s)
        width, height = max(2, math.ceil(2 * rx * s)), max(2, math.ceil(2 * ry * s))
        stencil = Image.new("L", (width, height), 0)
        ImageDraw.Draw(stencil).ellipse((0, 0, width - 1, height - 1), fill=round(255 * strength))
        self.image.paste((44, 32, 70), (left, top), stencil)


def arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, steps: int = 10) -> list:
    """Points of an elliptic arc, angles in degrees, clockwise from the right (y points down)."""
    angles = [math.radians(start + (stop - start) * k / steps) for k in range(steps + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def blank(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A canvas for a picture of size (w, h)."""
    return Image.new(mode, (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE))


def reduced(image: Image.Image, window: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """The canvas, or a window (left, top, right, bottom) of it, at its picture's size: uint8."""
    box = None if window is None else tuple(SUPERSAMPLE * edge for edge in window)
    return np.asarray(image.reduce(SUPERSAMPLE, box=box))
