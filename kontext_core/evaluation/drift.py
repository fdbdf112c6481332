"""Drift: how far a chain of edits has moved from its first picture where nobody asked it to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import images
from ..preserve import changed_mask
from ..registration import match, undo
from .metrics import psnr, ssim

Embed = Callable[[Tensor], Tensor]
MAX_PSNR = 60.0  # dB; where the axis of the drawing ends, and where equal pictures stand

INK, PALE, PAPER = (40, 40, 44), (205, 205, 210), (255, 255, 255)
LINES = {"psnr": (31, 96, 170), "ssim": (196, 92, 20), "similarity": (30, 130, 76)}
TITLES = {
    "psnr": "PSNR outside the edits, dB",
    "ssim": "SSIM outside the edits",
    "similarity": "similarity of embeddings",
}


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One picture against the first, where no edit was asked for.

    Attributes:
        psnr: dB, infinite for equal pixels, nan when everything is edited.
        ssim: 1 for equal pixels, nan when no window of 11x11 is free of edits.
        similarity: cosine of the embeddings of the whole pictures, or None without an embedding.
        edited: share of the picture that the edits so far have changed.
        shift: pixels right and down that what was left alone has moved.
    """

    psnr: float
    ssim: float
    similarity: float | None
    edited: float
    shift: tuple[float, float]

    def report(self) -> str:
        """The measures in a line."""
        similarity = "" if self.similarity is None else f"; similarity {self.similarity:.3f}"
        if math.isnan(self.psnr):
            return f"all edited{similarity}"
        share = "not measured" if math.isnan(self.ssim) else f"{self.ssim:.3f}"
        return f"PSNR {self.psnr:.1f} dB, SSIM {share} outside the {self.edited:.0%} edited{similarity}"


@torch.no_grad()
def measure_drift(
    start: Tensor,
    turns: Sequence[Tensor],
    *,
    parents: Sequence[int | None] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    embed: Embed | None = None,
) -> list[Drift]:
    """Measure each turn's picture against the first one.

    Args:
        start: (1,3,H,W) in [-1,1].
        turns: pictures (1,3,H,W) in the order they were made.
        parents: for each turn the turn it was made from, None for the first picture; by default a chain.
        masks: for each turn (1,1,H,W), above 0 where its edit was asked for; None finds it by what changed
            against its parent. What the parents changed is left out of the measure too.
        embed: (B,3,H,W) in [-1,1] to (B,D), for the similarity of whole pictures.

    Raises:
        ValueError: sizes that differ, or a parent that comes later than its turn.
    """
    parents = [i - 1 if i else None for i in range(len(turns))] if parents is None else list(parents)
    masks = [None] * len(turns) if masks is None else list(masks)
    asked: list[Tensor] = []
    found = []
    for i, (picture, parent, mask) in enumerate(zip(turns, parents, masks, strict=True)):
        if picture.shape != start.shape:
            raise ValueError(
                f"turn {i + 1} has shape {tuple(picture.shape)} and the first picture {tuple(start.shape)}"
            )
        if parent is not None and not 0 <= parent < i:
            raise ValueError(f"turn {i + 1} cannot come from turn {parent + 1}")
        before = start if parent is None else turns[parent]
        here = _changed(before, picture) if mask is None else (mask > 0).float()
        asked.append(here if parent is None else torch.maximum(here, asked[parent]))
        outside = 1 - asked[i]
        moved = match((start[0] + 1) / 2, (picture[0] + 1) / 2, outside[0, 0])
        similarity = None
        if embed is not None:
            one, two = (embed(image).flatten(1).float() for image in (start, picture))
            similarity = torch.cosine_similarity(one, two).item()
        found.append(
            Drift(
                psnr=psnr(start, picture, outside).item(),
                ssim=ssim(start, picture, outside).item(),
                similarity=similarity,
                edited=asked[i].mean().item(),
                shift=moved.shift,
            )
        )
    return found


def to_json(drift: Sequence[Drift]) -> str:
    """The measures as a JSON list; infinite and absent numbers are null."""
    rows = [{k: _finite(v) for k, v in asdict(d).items()} for d in drift]
    return json.dumps(rows)


def draw_drift(
    drift: Sequence[Drift],
    labels: Sequence[str],
    *,
    pictures: Sequence[Tensor] = (),
    width: int = 960,
) -> Image.Image:
    """A picture of the drift: a line for each measure over the turns, and the turns' pictures under it.

    Args:
        labels: for each turn what it did.
        pictures: for each turn (1,3,H,W) in [-1,1], drawn small.
        width: of the drawing in pixels.
    """
    if not drift or len(labels) != len(drift) or (pictures and len(pictures) != len(drift)):
        raise ValueError(
            f"{len(drift)} turns, {len(labels)} labels and {len(pictures)} pictures do not go together"
        )
    shown = [name for name in LINES if name != "similarity" or drift[0].similarity is not None]
    font, small = (ImageFont.load_default(size) for size in (max(12, width // 60), max(10, width // 76)))
    left, right, panel, gap = width // 14, width // 40, width // 5, width // 24
    column = (width - left - right) / len(drift)
    thumb = int(min(column - 8, width / 6)) if pictures else 0
    text_height = 4 * (small.size + 3)
    height = gap + len(shown) * (panel + gap) + text_height + (thumb + gap if thumb > 8 else 0)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    x = [left + column * (i + 0.5) for i in range(len(drift))]
    for row, name in enumerate(shown):
        top = gap + row * (panel + gap)
        box = (left, top, width - right, top + panel)
        absent = ["all edited" if math.isnan(d.psnr) else "not measured" for d in drift]
        _draw_panel(draw, name, [getattr(d, name) for d in drift], absent, x, box, font, small)
    y = gap + len(shown) * (panel + gap) - gap // 2
    for i, label in enumerate(labels):
        for line, words in enumerate(_wrapped(f"{i + 1}. {label}", small, column - 8, 4)):
            draw.text((x[i], y + line * (small.size + 3)), words, INK, small, anchor="ma")
    if thumb > 8:
        for i, picture in enumerate(pictures):
            image = images.to_pil(picture)[0]
            image.thumbnail((thumb, thumb), Image.Resampling.LANCZOS)
            canvas.paste(image, (round(x[i] - image.width / 2), y + text_height))
    return canvas


def _draw_panel(
    draw, name: str, values: list[float], absent: list[str], x: list[float], box, font, small
) -> None:
    """One measure: its axis with three marks, the line and the numbers; where there is none, why."""
    left, top, right, bottom = box
    low, high = _axis(name, values)
    draw.text((left, top - 4), TITLES[name], LINES[name], font, anchor="ls")

    def place(value: float) -> float:
        return bottom - (min(max(value, low), high) - low) / (high - low) * (bottom - top)

    for mark in (low, (low + high) / 2, high):
        draw.line([(left, place(mark)), (right, place(mark))], PALE)
        draw.text((left - 6, place(mark)), f"{mark:g}", INK, small, anchor="rm")
    points = [(x[i], place(v)) for i, v in enumerate(values) if not math.isnan(v)]
    if len(points) > 1:
        draw.line(points, LINES[name], width=3, joint="curve")
    for i, value in enumerate(values):
        if math.isnan(value):
            draw.text((x[i], (top + bottom) / 2), absent[i], INK, small, anchor="mm")
            continue
        y = place(value)
        draw.ellipse([x[i] - 4, y - 4, x[i] + 4, y + 4], LINES[name])
        words = "equal" if math.isinf(value) else f"{value:.1f}" if name == "psnr" else f"{value:.3f}"
        below = y < top + 2 * small.size
        draw.text((x[i], y + (8 if below else -8)), words, INK, small, anchor="ma" if below else "ms")


def _axis(name: str, values: list[float]) -> tuple[float, float]:
    """Round ends that hold the values: dB in tens, shares in fifths."""
    finite = [v for v in values if math.isfinite(v)] or [1.0]
    if name == "psnr":
        low = min(20.0, 10 * math.floor(min(finite) / 10))
        return low, max(40.0, min(MAX_PSNR, 10 * math.ceil(max(finite) / 10)))
    return min(0.8, math.floor(5 * min(finite)) / 5), 1.0


def _wrapped(text: str, font, width: float, limit: int) -> list[str]:
    """Text in lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > limit:
        lines = [*lines[: limit - 1], lines[limit - 1] + " …"]
    return [_shortened(line, font, width) for line in lines]


def _shortened(line: str, font, width: float) -> str:
    if font.getlength(line) <= width:
        return line
    while len(line) > 1 and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """(1,1,H,W): where an edit changed a picture, with its shift and tint undone first."""
    one, two = ((image[0].float() + 1) / 2 for image in (before, after))
    return changed_mask(one, undo(two, match(one, two)))[None]


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
