"""The loss over the steps as a small picture, with nothing but Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT, LINE = (252, 251, 248), (50, 46, 60), (214, 210, 204), (46, 110, 180)


def running_mean(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Each value's mean with those before it, over a share of them all."""
    width = max(1, round(len(values) * share))
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - width) : end]
        means.append(sum(part) / len(part))
    return means


def draw_loss(rows: Sequence[dict], size: tuple[int, int] = (640, 320)) -> Image.Image:
    """Loss (faint) and its running mean over the steps.

    Args:
        rows: of log.jsonl, each with `step` and `loss`; those that are not finite are left out.
        size: (width, height) in pixels.
    """
    width, height = size
    left, right, top, bottom = 62, width - 16, 34, height - 34
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    rows = [row for row in rows if math.isfinite(row["loss"])]
    if not rows:
        draw.text((left, top), "nothing logged yet", fill=INK, font=font)
        return image
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    low, high = min(losses), max(losses)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    first, last = min(0, steps[0]), max(steps[-1], 1)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (right - left) * (step - first) / (last - first)
        return x, bottom - (bottom - top) * (loss - low) / (high - low)

    for number in range(5):
        loss = low + (high - low) * number / 4
        y = at(first, loss)[1]
        draw.line((left, y, right, y), fill=FAINT)
        draw.text((left - 8, y), f"{loss:.3g}", fill=INK, font=font, anchor="rm")
        step = first + (last - first) * number / 4
        draw.text((at(step, low)[0], bottom + 8), f"{step:.0f}", fill=INK, font=font, anchor="mt")
    _line(draw, [at(*point) for point in zip(steps, losses, strict=True)], FAINT, 1)
    means = running_mean(losses)
    _line(draw, [at(*point) for point in zip(steps, means, strict=True)], LINE, 2)
    draw.text((left, 10), f"loss {means[-1]:.4g} at step {steps[-1]}", fill=INK, font=font)
    return image


def _line(draw: ImageDraw.ImageDraw, points: list, colour: tuple, width: int) -> None:
    if len(points) == 1:
        x, y = points[0]
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    else:
        draw.line(points, fill=colour, width=width, joint="curve")
