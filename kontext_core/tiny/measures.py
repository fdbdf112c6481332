"""Distances between pictures that the scorer is made of. Pictures are float32 RGB in [0, 1], (H, W, 3)."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

VISIBLE = 12 / 255  # a difference in a channel that the eye, and the scorer, counts as a change


def as_floats(picture: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A picture as float32 in [0, 1].

    Args:
        picture: uint8, or floats in [0, 1]; (H, W, 3).
        shape: the shape it must have.

    Raises:
        ValueError: for another shape, another dtype, or floats out of range.
    """
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[-1] != 3 or (shape is not None and picture.shape != shape):
        wanted = "(H, W, 3)" if shape is None else str(shape)
        raise ValueError(f"the picture's shape is {picture.shape}, but must be {wanted}: resize it first")
    if picture.dtype == np.uint8:
        return picture.astype(np.float32) / 255
    if not np.issubdtype(picture.dtype, np.floating):
        raise ValueError(f"the picture's dtype is {picture.dtype}, but must be uint8 or floats in [0, 1]")
    if not np.isfinite(picture).all() or picture.min() < -1e-3 or picture.max() > 1 + 1e-3:
        raise ValueError(
            f"the picture's values go from {picture.min():.3g} to {picture.max():.3g}, but floats must be in"
            " [0, 1]: rescale or clip them first"
        )
    return np.clip(picture, 0, 1).astype(np.float32)


def mse(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Mean squared difference, over the mask (bool (H, W)) if one is given; 0 for an empty mask."""
    error = ((a - b) ** 2).mean(-1)
    if mask is not None:
        error = error[mask]
    return float(error.mean()) if error.size else 0.0


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB over the mask; 99 where there is no difference."""
    return float(min(99.0, -10 * np.log10(max(mse(a, b, mask), 1e-12))))


def worst_tile(a: np.ndarray, b: np.ndarray, mask: np.ndarray, tile: int) -> float:
    """The lowest PSNR of any square of `tile` pixels, counting masked pixels only.

    A square with few masked pixels cannot be bad by itself: its error is spread over at least a quarter of it.
    """
    error = ((a - b) ** 2).mean(-1) * mask
    h, w = error.shape
    rows, columns = np.arange(0, h, tile), np.arange(0, w, tile)
    total = np.add.reduceat(np.add.reduceat(error, rows, axis=0), columns, axis=1)
    count = np.add.reduceat(np.add.reduceat(mask.astype(np.float32), rows, axis=0), columns, axis=1)
    worst = float((total / np.maximum(count, tile * tile / 4)).max())
    return float(min(99.0, -10 * np.log10(max(worst, 1e-12))))


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur, through 8 bits; of uint8 or floats in [0, 1], (H, W, 3) or (H, W), to floats."""
    if picture.dtype != np.uint8:
        picture = np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)), dtype=np.float32) * np.float32(1 / 255)


def gap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The largest difference of any channel at each pixel, (H, W)."""
    apart = np.abs(a - b)
    return np.maximum(np.maximum(apart[..., 0], apart[..., 1]), apart[..., 2])


def differing(a: np.ndarray, b: np.ndarray, threshold: float = VISIBLE) -> np.ndarray:
    """Pixels where some channel differs by more than the threshold; bool (H, W)."""
    return gap(a, b) > threshold


def preference(picture: np.ndarray, truth: np.ndarray, other: np.ndarray) -> float:
    """How much nearer a picture is to the truth than to another picture, where these two differ.

    1 for the truth itself, 0 in the middle, -1 for the other. A blur or noise moves it little, as it takes the
    picture away from both alike. 1 if the two do not differ visibly.
    """
    where = differing(truth, other)
    if not where.any():
        return 1.0
    right, wrong = mse(picture, truth, where), mse(picture, other, where)
    return (wrong - right) / (wrong + right) if wrong + right > 0 else 0.0


def crispness(picture: np.ndarray, truth: np.ndarray) -> float:
    """How steep a picture's steepest edges are beside the truth's, wherever they lie: 1 is as sharp, 0 flat."""

    def steep(p: np.ndarray) -> float:
        return float(np.quantile(gap(p[:, 1:], p[:, :-1]), 0.98))

    return steep(picture) / max(steep(truth), 1e-6)


def grain(picture: np.ndarray) -> float:
    """Noise in the picture's calm parts: the median difference to its own blur."""
    return float(np.median(gap(picture, blurred(picture, 1.0))))
