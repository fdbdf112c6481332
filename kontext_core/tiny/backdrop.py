"""The eight backgrounds, the light of day, sunset and night, and rain, snow and fog."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .pen import SUPERSAMPLE, Colour, Pen, blank, darker, lighter, mix
from .scene import Scene

_SKIES: dict[str, tuple[Colour, Colour]] = {
    "day": ((120, 190, 240), (214, 238, 250)),
    "sunset": ((130, 94, 170), (255, 176, 110)),
    "night": ((16, 22, 62), (52, 66, 124)),
}
_VEILS = {"clear": 0.0, "rain": 0.14, "snow": 0.10, "fog": 0.38}
_GREY = {"day": (186, 198, 210), "sunset": (200, 170, 170), "night": (92, 102, 140)}
_GAIN = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.84, 0.74), "night": (0.62, 0.64, 0.88)}
_FRONT_GAIN = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.88, 0.80), "night": (0.80, 0.77, 0.95)}


def light(scene: Scene, *, front: bool = False) -> tuple[tuple[float, float, float], Colour, float]:
    """What time and weather do to a colour: a gain for each channel, then a veil of this colour and share.

    `front`: for things, signs and creatures, which stay a little brighter so that their colours can be told.
    """
    dim = 0.9 if scene.weather == "rain" else 1.0
    gain = tuple(g * dim for g in (_FRONT_GAIN if front else _GAIN)[scene.time])
    return gain, _GREY[scene.time], _VEILS[scene.weather]


def _sky_colours(scene: Scene) -> tuple[Colour, Colour]:
    top, bottom = _SKIES[scene.time]
    grey = _GREY[scene.time]
    share = {"clear": 0.0, "rain": 0.75, "snow": 0.55, "fog": 0.85}[scene.weather]
    return mix(top, darker(grey, 0.15), share), mix(bottom, grey, share)


def gradient(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    """A vertical gradient as an image of size (w, h)."""
    w, h = size
    ramp = np.linspace(0.0, 1.0, max(h, 1))[:, None]
    column = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
    return Image.fromarray(np.rint(column).astype(np.uint8)[:, None, :]).resize(
        (w, h), Image.Resampling.NEAREST
    )


class _Painter:
    """Draws in fractions of width and height, mirrored if the scene says so."""

    def __init__(self, pen: Pen, scene: Scene, size: tuple[int, int]) -> None:
        self.pen, self.scene, self.size = pen, scene, size
        self.unit = min(size)

    def x(self, x: float) -> float:
        return (1 - x if self.scene.mirror else x) * self.size[0]

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.pen.polygon([(self.x(x), y * self.size[1]) for x, y in points], colour)

    def disc(self, x: float, y: float, r: float, colour: Colour, flat: float = 1.0) -> None:
        self.pen.ellipse(self.x(x), y * self.size[1], r * self.unit, r * flat * self.unit, colour)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def hill(self, y: float, swing: float, turns: float, phase: float, colour: Colour) -> None:
        """Ground from a sine line at height y down to the bottom."""
        steps = 32
        line = [
            (k / steps, y + swing * math.sin(2 * math.pi * (turns * k / steps) + phase))
            for k in range(steps + 1)
        ]
        self.polygon([*line, (1, 1.02), (0, 1.02)], colour)

    def pine(self, x: float, base: float, height: float, colour: Colour) -> None:
        wide = height * 0.3
        for level in range(3):
            top = base - height + level * height * 0.26
            spread = wide * (0.55 + 0.25 * level)
            self.polygon(
                [(x - spread, top + height * 0.44), (x, top), (x + spread, top + height * 0.44)], colour
            )


def _meadow(p: _Painter, h: float) -> None:
    p.hill(h - 0.03, 0.05, 0.8, 0.4, (148, 196, 128))
    p.hill(h + 0.05, 0.03, 0.9, 2.6, (172, 214, 120))
    p.hill(h + 0.22, 0.02, 0.7, 0.8, (186, 222, 130))


def _beach(p: _Painter, h: float) -> None:
    p.rect(0, h - 0.10, 1, 1, (74, 168, 206))
    p.rect(0, h - 0.03, 1, 1, (108, 196, 216))
    p.hill(h + 0.07, 0.018, 1.3, 0.3, (236, 246, 246))
    p.hill(h + 0.095, 0.018, 1.3, 0.3, (244, 222, 172))
    p.hill(h + 0.26, 0.015, 0.8, 2.0, (238, 210, 154))


def _desert(p: _Painter, h: float) -> None:
    p.polygon([(0.08, h + 0.05), (0.13, h - 0.15), (0.34, h - 0.15), (0.40, h + 0.05)], (206, 132, 100))
    p.polygon([(0.30, h + 0.05), (0.34, h - 0.08), (0.52, h - 0.08), (0.58, h + 0.05)], (218, 148, 108))
    p.hill(h + 0.02, 0.035, 0.7, 3.4, (236, 190, 128))
    p.hill(h + 0.15, 0.03, 0.8, 0.6, (244, 206, 146))


def _snow(p: _Painter, h: float) -> None:
    p.hill(h - 0.05, 0.05, 0.9, 2.2, (204, 222, 240))
    for x, height in ((0.06, 0.24), (0.16, 0.17), (0.94, 0.2)):
        p.pine(x, h + 0.06, height, (118, 156, 168))
    p.hill(h + 0.05, 0.03, 0.8, 0.2, (226, 236, 247))
    p.hill(h + 0.2, 0.02, 0.7, 2.8, (240, 245, 250))


def _forest(p: _Painter, h: float) -> None:
    for k, height in enumerate((0.42, 0.34, 0.46, 0.36, 0.44)):
        p.pine(0.04 + 0.23 * k, h + 0.04, height, (120, 168, 132))
    for k, height in enumerate((0.3, 0.36, 0.26, 0.32)):
        p.pine(0.16 + 0.235 * k, h + 0.06, height, (92, 146, 112))
    p.hill(h + 0.03, 0.015, 0.8, 0.4, (126, 166, 104))
    p.hill(h + 0.18, 0.02, 0.7, 2.4, (148, 182, 112))


def _city(p: _Painter, h: float) -> None:
    night = p.scene.time == "night"
    walls = ((142, 156, 182), (166, 178, 200), (128, 142, 172))
    pane = (255, 224, 130) if night else (206, 220, 234)
    shade = p.pen.light
    for k, top in enumerate((0.28, 0.14, 0.36, 0.2, 0.32, 0.1)):
        x = k / 6
        p.rect(x, h - top - 0.08, x + 1 / 6, h + 0.05, walls[k % 3])
        p.pen.light = None if night and p.scene.weather != "fog" else shade
        y = h - top - 0.03
        while y < h - 0.06:
            p.rect(x + 0.035, y, x + 0.075, y + 0.05, pane)
            p.rect(x + 0.095, y, x + 0.135, y + 0.05, pane)
            y += 0.095
        p.pen.light = shade
    p.rect(0, h, 1, 1, (196, 198, 206))
    p.rect(0, h, 1, h + 0.035, (222, 222, 226))
    p.rect(0, h + 0.3, 1, 1, (176, 180, 190))


def _room(p: _Painter, h: float) -> None:
    p.rect(0, 0, 1, 1, (246, 226, 202))
    p.rect(0.60, 0.08, 0.94, h - 0.16, (255, 252, 246))
    shade, p.pen.light = p.pen.light, None
    top, bottom = _sky_colours(p.scene)
    middle = (0.11 + h - 0.19) / 2
    p.rect(0.63, 0.11, 0.91, middle, mix(top, bottom, 0.35))
    p.rect(0.63, middle, 0.91, h - 0.19, bottom)
    p.pen.light = shade
    p.rect(0.755, 0.1, 0.785, h - 0.17, (255, 252, 246))
    p.rect(0, h, 1, 1, (214, 172, 132))
    p.rect(0, h - 0.035, 1, h + 0.01, (255, 248, 238))
    p.disc(0.5, h + 0.24, 0.46, (222, 150, 128), 0.24)
    p.disc(0.5, h + 0.24, 0.39, (236, 178, 152), 0.24)


def _mountains(p: _Painter, h: float) -> None:
    for x, top, wide, rock in (
        (0.24, 0.36, 0.34, (150, 164, 196)),
        (0.80, 0.28, 0.32, (164, 176, 206)),
        (0.54, 0.20, 0.28, (134, 150, 186)),
    ):
        peak, base = h - top, h + 0.06
        p.polygon([(x - wide, base), (x, peak), (x + wide, base)], rock)
        cap, s = 0.32, wide * 0.32
        low = peak + (base - peak) * cap
        p.polygon(
            [
                (x - s, low),
                (x, peak),
                (x + s, low),
                (x + s * 0.4, low - 0.025),
                (x, low + 0.02),
                (x - s * 0.4, low - 0.025),
            ],
            (246, 250, 255),
        )
    p.hill(h + 0.03, 0.02, 0.9, 1.0, (150, 196, 160))
    p.hill(h + 0.17, 0.02, 0.7, 3.0, (168, 208, 166))


_DRAW = {
    "meadow": _meadow,
    "beach": _beach,
    "desert": _desert,
    "snow": _snow,
    "forest": _forest,
    "city": _city,
    "room": _room,
    "mountains": _mountains,
}


def _heavens(p: _Painter, h: float) -> None:
    """Sun, moon, stars and clouds, as far as the weather lets them be seen."""
    scene = p.scene
    if scene.weather == "fog":
        return
    if scene.weather == "clear":
        if scene.time == "day":
            p.disc(0.86, 0.13, 0.075, (255, 226, 110))
        elif scene.time == "sunset":
            p.disc(0.66, h - 0.10, 0.17, (255, 196, 122))
            p.disc(0.66, h - 0.10, 0.13, (255, 226, 140))
        else:
            p.disc(0.84, 0.15, 0.085, (250, 244, 206))
            p.disc(0.80, 0.13, 0.075, (24, 30, 74))
            for x, y in ((0.08, 0.10), (0.34, 0.06), (0.30, 0.40), (0.62, 0.20), (0.50, 0.33), (0.94, 0.38)):
                p.disc(x, y, 0.013, (255, 250, 220))
            return
    cloud = {"day": (250, 252, 255), "sunset": (255, 206, 176), "night": (82, 92, 136)}[scene.time]
    if scene.weather != "clear":
        cloud = lighter(_GREY[scene.time], 0.3 if scene.time != "night" else 0.12)
    clouds = (
        ((0.34, 0.10, 0.9), (0.66, 0.32, 0.7))
        if scene.weather == "clear"
        else ((0.16, 0.10, 1.2), (0.52, 0.13, 1.3), (0.88, 0.09, 1.2))
    )
    for x, y, s in clouds:
        for dx, dy, r in ((-0.08, 0.012, 0.048), (0.0, -0.012, 0.066), (0.085, 0.01, 0.05)):
            p.disc(x + dx * s, y + dy * s, r * s, cloud, 0.8)


def draw_backdrop(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """The background of a scene on a canvas (`SUPERSAMPLE` times too large), without things or weather."""
    canvas = blank(size)
    top, bottom = _sky_colours(scene)
    rows = round(scene.horizon * canvas.height)
    canvas.paste(gradient((canvas.width, rows), top, bottom), (0, 0))
    canvas.paste(bottom, (0, rows, canvas.width, canvas.height))
    pen = Pen(canvas, (0.0, 0.0), SUPERSAMPLE, None)
    painter = _Painter(pen, scene, size)
    if scene.background != "room":
        _heavens(painter, scene.horizon)
    pen.light = light(scene)
    _DRAW[scene.background](painter, scene.horizon)
    return canvas


# The R2 sequence: points spread evenly, with no two close together.
_RAIN = [((k * 0.754878 + 0.40) % 1.0, (k * 0.569840 + 0.02) % 1.0) for k in range(22)]
_FLAKES = [((k * 0.754878 + 0.10) % 1.0, (k * 0.569840 + 0.05) % 1.0) for k in range(26)]


def draw_weather(canvas: Image.Image, scene: Scene, size: tuple[int, int]) -> None:
    """Rain or snow in front of everything, always at the same places of the picture."""
    w, h = size
    unit = min(size)
    pen = Pen(canvas, (0.0, 0.0), SUPERSAMPLE, None)
    if scene.weather == "rain":
        drop = (226, 240, 252) if scene.time != "night" else (150, 176, 220)
        for x, y in _RAIN:
            pen.stroke([(x * w, y * h), (x * w - 0.028 * unit, y * h + 0.09 * unit)], 0.014 * unit, drop)
    elif scene.weather == "snow":
        flake = (255, 255, 255) if scene.time != "night" else (214, 222, 244)
        for k, (x, y) in enumerate(_FLAKES):
            r = (0.020 if k % 3 else 0.027) * unit
            pen.ellipse(x * w, y * h, r, r, flake)
