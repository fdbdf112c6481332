"""How alike two pictures are in look, whatever they show: palette, texture and outline in one distance.

A picture's look is described by some thirty numbers (`describe`). What of them is look and what is content is
learnt once from the world's own training scenes, drawn in every look, some of them slightly blurred: linear
discriminant analysis gives the few directions in which looks differ most beside what scenes differ, in units
of the latter. The distance of two pictures is Euclidean in these. It knows neither truth nor instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from . import holdout
from .dice import Dice
from .edits import draft_style
from .looks import luma
from .measures import as_floats, blurred
from .render import render
from .scene import LOOKS, TONES, Look

SAMPLES = 7  # scenes for each look and tone
DIRECTIONS = 14
_UNIT = 128
_CELLS = 24  # squares of a mosaic along the shorter side


def _at_unit(picture: np.ndarray) -> np.ndarray:
    """The picture with its shorter side at 128 pixels."""
    h, w = picture.shape[:2]
    if min(h, w) == _UNIT:
        return picture
    scale = _UNIT / min(h, w)
    image = Image.fromarray(np.rint(picture * 255).astype(np.uint8))
    return as_floats(np.asarray(image.resize((round(w * scale), round(h * scale)), Image.Resampling.BICUBIC)))


def _extreme(plane: np.ndarray, reduce: np.ufunc) -> np.ndarray:
    """The largest or smallest value in 5 x 5 pixels around each."""
    h, w = plane.shape
    padded = np.pad(plane, 2, mode="edge")
    rows = reduce.reduce([padded[k : k + h] for k in range(5)])
    return reduce.reduce([rows[:, k : k + w] for k in range(5)])


def _log(value: float, floor: float = 3e-4) -> float:
    """Logarithm with a floor below which a difference is noise."""
    return float(np.log(max(value, 0.0) + floor))


@lru_cache(maxsize=4)
def _waves(shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Cosine and sine, (2, H * W), of the dots' and hatches' four directions of repetition."""
    y, x = np.mgrid[: shape[0], : shape[1]] * (2 * np.pi * 16 / _UNIT)
    phases = (x, y, x + y, x - y)
    return tuple(np.stack([np.cos(p), np.sin(p)]).reshape(2, -1).astype(np.float32) for p in phases)


def describe(picture: np.ndarray) -> np.ndarray:
    """The numbers that describe a picture's look: palette, then texture, then outline. Float RGB in [0, 1]."""
    p = _at_unit(picture)
    bright = luma(p)
    pixels = p.reshape(-1, 3)
    low, high = np.quantile(bright[::2, ::2], (0.04, 0.84))
    darkest, lightest = p[bright <= low], p[bright >= high]
    chroma = p.max(-1) - p.min(-1)
    spread = np.linalg.eigvalsh(np.cov(p[::2, ::2].reshape(-1, 3).T))
    palette = [
        *darkest.mean(0),
        *lightest.mean(0),
        *pixels.mean(0),
        chroma.mean(),
        chroma.std(),
        bright.std(),
    ]
    palette += [
        _log(float(spread[1] / (spread[2] + 1e-6)), 0.01),
        _log(float(spread[0] / (spread[2] + 1e-6)), 0.01),
    ]

    soft = [bright, *(blurred(bright, sigma) for sigma in (0.8, 1.6, 3.2))]
    texture = [
        _log(float(((fine - coarse) ** 2).mean())) for fine, coarse in zip(soft, soft[1:], strict=False)
    ]
    down, up = bright[1:, 1:] - bright[:-1, :-1], bright[1:, :-1] - bright[:-1, 1:]
    across, along = np.abs(bright[:, 1:] - bright[:, :-1]), np.abs(bright[1:] - bright[:-1])
    texture.append(_log(float((down**2).mean())) - _log(float((up**2).mean())))
    flat = (bright - soft[3]).ravel()
    texture += [_log(float(np.hypot(*(waves @ flat)) / len(flat))) for waves in _waves(bright.shape)]
    for steps, axis in ((across, 1), (along, 0)):
        edge = np.diff(np.floor((np.arange(bright.shape[axis]) + 0.5) * _CELLS / _UNIT)) > 0
        profile = steps.mean(1 - axis)
        on, off = float(profile[edge].mean()), float(profile[~edge].mean())
        texture.append((on - off) / (on + off + 1e-3))

    dark_lines = _extreme(_extreme(bright, np.maximum), np.minimum) - bright
    light_lines = bright - _extreme(_extreme(bright, np.minimum), np.maximum)
    outline = [_log(float(dark_lines.mean())), _log(float(light_lines.mean()))]
    inked = dark_lines > max(0.08, float(np.quantile(dark_lines, 0.93)))
    outline += list(p[inked].mean(0)) if inked.any() else list(pixels.mean(0))
    lit = light_lines > max(0.08, float(np.quantile(light_lines, 0.93)))
    outline.append(float(chroma[lit].mean()) if lit.any() else 0.0)
    return np.asarray(palette + texture + outline, dtype=np.float64)


@dataclass(frozen=True)
class LookSpace:
    """Directions (numbers, DIRECTIONS) in which looks differ, scaled so that scenes of one look vary by one.

    `centres`: where each look and tone lies, by look.
    """

    directions: np.ndarray
    centres: dict[str, np.ndarray]

    def place(self, picture: np.ndarray) -> np.ndarray:
        """A picture's look as a point (DIRECTIONS,)."""
        return describe(picture) @ self.directions

    def nearest(self, point: np.ndarray) -> str:
        """The look whose centre is nearest."""
        gaps = {name: np.linalg.norm(centres - point, axis=1).min() for name, centres in self.centres.items()}
        return min(gaps, key=gaps.__getitem__)


@lru_cache(maxsize=1)
def look_space() -> LookSpace:
    """Learns the directions; takes some seconds, once a process."""
    groups: dict[str, list[np.ndarray]] = {}
    for name in LOOKS:
        samples = [_samples(Look(name=name, tone=tone)) for tone in TONES]
        groups[name] = [np.concatenate(samples)] if name in ("flat", "mosaic") else samples
    # Every look counts alike, so that the directions also forgive what wear does to the most fragile one.
    within = sum(np.mean([np.cov(g.T, bias=True) for g in look], axis=0) for look in groups.values()) / len(
        groups
    )
    within = within + 0.02 * np.diag(np.diag(within) + 1e-6)
    between = np.cov(np.stack([g.mean(0) for look in groups.values() for g in look]).T)
    values, vectors = np.linalg.eigh(within)
    whiten = vectors / np.sqrt(values)
    _, rotate = np.linalg.eigh(whiten.T @ between @ whiten)
    directions = whiten @ rotate[:, -DIRECTIONS:]
    centres = {name: np.stack([g.mean(0) for g in look]) @ directions for name, look in groups.items()}
    return LookSpace(directions, centres)


def _worn(picture: np.ndarray, seed: int) -> np.ndarray:
    """A picture somewhat blurred and noisy, as an autoencoder gives it back."""
    bits = np.random.PCG64(seed).random_raw(picture.size) >> np.uint64(40)
    noise = (bits / 2.0**24 - 0.5).reshape(picture.shape) * 0.07
    return np.clip(blurred(picture, 0.5 + 0.1 * (seed % 6)) + noise, 0, 1).astype(np.float32)


def _samples(look: Look) -> np.ndarray:
    """Descriptions of training scenes in a look: every other one blurred as an autoencoder would."""
    dice = Dice("looks", look.name, look.tone)
    rows = []
    while len(rows) < SAMPLES:
        draft = draft_style(dice)
        if draft is None or not holdout.admissible("train", None, draft.after, set(), False):
            continue
        picture = as_floats(render(replace(draft.after, look=look)))
        rows.append(describe(_worn(picture, len(rows)) if len(rows) % 2 else picture))
    return np.stack(rows)
