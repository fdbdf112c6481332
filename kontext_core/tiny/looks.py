"""The styles of drawing: each turns the plain picture into another look. Float RGB in [0, 1], (H, W, 3)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from .scene import TONES, Look

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def luma(picture: np.ndarray) -> np.ndarray:
    """Brightness (H, W) of float RGB."""
    return picture @ _LUMA


def _filtered(plane: np.ndarray, kernel: ImageFilter.Filter) -> np.ndarray:
    """A Pillow filter over a float plane in [0, 1], at 8 bits."""
    image = Image.fromarray(np.clip(plane * 255 + 0.5, 0, 255).astype(np.uint8))
    return np.asarray(image.filter(kernel), dtype=np.float32) / 255


def edges(picture: np.ndarray, low: float = 0.06, high: float = 0.16) -> np.ndarray:
    """Where neighbouring colours differ: (H, W) in [0, 1], lines about two pixels wide."""
    across = np.abs(picture[:, 2:] - picture[:, :-2]).max(-1)
    down = np.abs(picture[2:] - picture[:-2]).max(-1)
    strength = np.zeros(picture.shape[:2], dtype=np.float32)
    strength[:, 1:-1] = across
    strength[1:-1] = np.maximum(strength[1:-1], down)
    return np.clip((strength - low) / (high - low), 0, 1)


def _grown(plane: np.ndarray, unit: float) -> np.ndarray:
    """Lines made thicker by a pixel of 128, and smooth."""
    size = 2 * max(0, round(0.5 * unit / 128)) + 1
    plane = _filtered(plane, ImageFilter.MaxFilter(size)) if size > 1 else plane
    return _filtered(plane, ImageFilter.GaussianBlur(0.5 * unit / 128))


def _tone(look: Look) -> tuple[np.ndarray, np.ndarray]:
    ink, paper = TONES[look.tone]
    return np.asarray(ink, np.float32) / 255, np.asarray(paper, np.float32) / 255


@lru_cache(maxsize=4)
def _diagonals(shape: tuple[int, int], pitch: float, slope: int) -> np.ndarray:
    """Triangle waves in [0, 1] along a diagonal, with this distance in pixels from line to line."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    phase = ((x + slope * y) / (pitch * 1.41421356)) % 1.0
    return np.abs(phase * 2 - 1)


def _outline(picture: np.ndarray, look: Look, unit: float) -> np.ndarray:
    ink, _ = _tone(look)
    flat = np.round(picture * 5) / 5 * 0.5 + picture * 0.5
    line = _grown(edges(picture), unit)[..., None]
    return flat * (1 - line) + ink * line


def _mosaic(picture: np.ndarray, look: Look, unit: float) -> np.ndarray:
    cell = unit / 24
    h, w = picture.shape[:2]
    small = Image.fromarray(np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)).resize(
        (max(1, round(w / cell)), max(1, round(h / cell))), Image.Resampling.BOX
    )
    large = np.asarray(small.resize((w, h), Image.Resampling.NEAREST), dtype=np.float32) / 255
    return np.clip((large - 0.5) * 1.12 + 0.5, 0, 1)


def _hatching(picture: np.ndarray, look: Look, unit: float) -> np.ndarray:
    ink, paper = _tone(look)
    dark = 1 - luma(picture)
    base = picture * 0.6 + paper * 0.4
    waves = _diagonals(dark.shape, 0.0442 * unit, 1)
    line = np.clip((dark * 1.1 - waves) * 3 + 0.1, 0, 1) * 0.75
    line = np.maximum(line, _grown(edges(picture, 0.1, 0.25), unit) * 0.8)[..., None]
    return base * (1 - line) + ink * line


@lru_cache(maxsize=4)
def _wash(shape: tuple[int, int], unit: float) -> np.ndarray:
    """Slow waves in [-1, 1], as pigment settles on paper."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32) / np.float32(unit)
    return np.sin(x * 19 + 2.2 * np.sin(y * 13)) * np.sin(y * 17 + 2.0 * np.sin(x * 11))


def _watercolour(picture: np.ndarray, look: Look, unit: float) -> np.ndarray:
    _, paper = _tone(look)
    sigma = 1.2 * unit / 128
    soft = np.stack([_filtered(picture[..., c], ImageFilter.GaussianBlur(sigma)) for c in range(3)], axis=-1)
    wash = _wash(picture.shape[:2], unit)
    rim = _filtered(edges(soft, 0.03, 0.4), ImageFilter.GaussianBlur(sigma * 0.7))[..., None]
    pale = soft * 0.74 + paper * 0.26 + 0.04 * wash[..., None]
    return np.clip(pale * (1 - 0.3 * rim), 0, 1)


def _duotone(picture: np.ndarray, look: Look, unit: float) -> np.ndarray:
    ink, paper = _tone(look)
    bright = np.clip((luma(picture) - 0.25) / 0.70, 0, 1)[..., None]
    steps = np.floor(bright**1.3 * 3.999) / 3
    line = _grown(edges(picture, 0.08, 0.3), unit)[..., None]
    return ink + (paper - ink) * (0.75 * steps + 0.25 * bright) * (1 - 0.8 * line)


@lru_cache(maxsize=4)
def _from_dots(shape: tuple[int, int], pitch: float) -> np.ndarray:
    """Each pixel's distance to the middle of its cell of a square grid, in cells."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    across, down = (x + 0.5) / pitch % 1 - 0.5, (y + 0.5) / pitch % 1 - 0.5
    return np.sqrt(across * across + down * down)


def _halftone(picture: np.ndarray, look: Look, unit: float) -> np.ndarray:
    _, paper = _tone(look)
    pitch = unit / 16
    distance = _from_dots(picture.shape[:2], pitch)
    soft = _filtered(luma(picture), ImageFilter.GaussianBlur(1.0 * unit / 128))
    radius = 0.30 + 0.36 * (1 - soft)
    dot = np.clip((radius - distance) * pitch / 1.2 + 0.5, 0, 1)[..., None]
    grey = luma(picture)[..., None]
    vivid = np.clip(grey + (picture - grey) * 1.25 - 0.04, 0, 1)
    return (paper * 0.6 + 0.4) * (1 - dot) + vivid * dot


def _neon(picture: np.ndarray, look: Look, unit: float) -> np.ndarray:
    ink, _ = _tone(look)
    peak = picture.max(-1, keepdims=True)
    bright = np.clip(picture / np.maximum(peak, 0.05), 0, 1)
    grey = bright.mean(-1, keepdims=True)
    vivid = np.clip(grey + (bright - grey) * 1.7, 0, 1)
    line = _grown(edges(picture, 0.08, 0.2), unit)
    glow = _filtered(line, ImageFilter.GaussianBlur(2.6 * unit / 128))
    return np.clip(ink * 0.28 + vivid * 0.14 + vivid * np.maximum(line, 0.75 * glow)[..., None], 0, 1)


def _sketch(picture: np.ndarray, look: Look, unit: float) -> np.ndarray:
    ink, paper = _tone(look)
    line = _grown(edges(picture, 0.05, 0.22), unit)
    tone = (1 - luma(picture)) * 0.35
    shade = np.maximum(line * 0.85, tone)[..., None]
    return (paper * 0.35 + 0.65) * (1 - shade) + ink * shade


_APPLY = {
    "outline": _outline,
    "mosaic": _mosaic,
    "hatching": _hatching,
    "watercolour": _watercolour,
    "duotone": _duotone,
    "halftone": _halftone,
    "neon": _neon,
    "sketch": _sketch,
}


def apply_look(picture: np.ndarray, look: Look, unit: float | None = None) -> np.ndarray:
    """The plain picture drawn in another look.

    Args:
        picture: uint8 (H, W, 3).
        look: which; "flat" leaves the picture as it is.
        unit: the whole picture's shorter side, when this is only a part of it.
    """
    if look.name == "flat":
        return picture
    unit = float(min(picture.shape[:2])) if unit is None else unit
    out = _APPLY[look.name](picture.astype(np.float32) / 255, look, unit)
    return np.clip(np.rint(out * 255), 0, 255).astype(np.uint8)


def apply_grade(picture: np.ndarray, grade: str) -> np.ndarray:
    """The whole picture's palette changed: black and white, sepia, warm, cool or pastel. uint8 in and out."""
    if grade == "none":
        return picture
    p = picture.astype(np.float32) / 255
    grey = luma(p)[..., None]
    if grade == "black and white":
        out = np.repeat(grey, 3, axis=-1)
    elif grade == "sepia":
        out = grey * np.array([1.06, 0.88, 0.62], np.float32) + np.array([0.06, 0.03, 0.0], np.float32)
    elif grade == "warm":
        out = p * np.array([0.94, 0.84, 0.60], np.float32) + np.array([0.12, 0.06, 0.02], np.float32)
    elif grade == "cool":
        out = p * np.array([0.62, 0.82, 0.94], np.float32) + np.array([0.0, 0.05, 0.12], np.float32)
    else:
        out = (grey + (p - grey) * 0.6) * 0.52 + 0.46
    return np.clip(np.rint(out * 255), 0, 255).astype(np.uint8)
