"""The benchmark of the synthetic world: any editor's share of edits done, kept and both, and a contact sheet."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scorer import Score, score
from .world import CATEGORIES, EDIT_CATEGORIES, Example, example

Editor = Callable[[list[Example]], Sequence[np.ndarray]]
SEED_STRIDE = 1_000_000  # even, so that every seed has as many held-out combinations
_GAP, _TEXT = 6, 30
_FRAMES = {True: (46, 160, 90), False: (214, 60, 60)}


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """A finished benchmark.

    Attributes:
        summary: `{"suite", "split", "model", "steps", "seed", "seconds_per_edit", "categories": {category:
            {"count", "done", "kept", "both"}}}`, the last three as shares from 0 to 1.
        details: for each category, its 95 % interval of "both", and "both" by kind of edit and by whether a
            combination was asked for that training never shows.
        sheet: context, output and truth of the first edits of each category, the instruction below.
    """

    summary: dict[str, Any]
    details: dict[str, Any]
    sheet: Image.Image

    @property
    def table(self) -> str:
        """The summary as text."""
        lines = [
            f"{'category':<12}{'count':>7}{'done':>8}{'kept':>8}{'both':>8}   95 % interval   new  known"
        ]
        for name, row in self.summary["categories"].items():
            extra = self.details[name]
            low, high = extra["interval"]
            shares = "".join(f"{row[key]:>8.3f}" for key in ("done", "kept", "both"))
            parts = "".join(
                f"{extra['novel'][key]['both']:>7.2f}" if key in extra["novel"] else f"{'-':>7}"
                for key in ("new", "known")
            )
            lines.append(f"{name:<12}{row['count']:>7}{shares}   {low:.3f} - {high:.3f} {parts}")
        lines.append(f"{self.summary['seconds_per_edit']:.3f} seconds per edit")
        return "\n".join(lines)


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if count == 0:
        return 0.0, 1.0
    z = 1.959964
    share = right / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return (middle - half) / scale, (middle + half) / scale


def _batches(
    split: str, category: str, start: int, count: int, batch: int, size: tuple[int, int]
) -> Iterator:
    for first in range(start, start + count, batch):
        numbers = range(first, min(first + batch, start + count))
        yield [example(split, category, index, size) for index in numbers]


def run_bench(
    editor: Editor,
    split: str = "test",
    count: int = 500,
    seed: int = 0,
    *,
    categories: Sequence[str] = EDIT_CATEGORIES,
    size: tuple[int, int] = (128, 128),
    batch: int = 16,
    model: str = "",
    steps: int | None = None,
    sheet_rows: int = 4,
    on_edit: Callable[[str, int, int], None] | None = None,
) -> BenchReport:
    """Scores an editor.

    Args:
        editor: takes a list of examples, gives as many pictures: uint8 (or float in [0, 1]), (H, W, 3). It reads
            an example's `context` and `instruction`, nothing else.
        split: "val" or "test" (or "train").
        count: edits a category.
        seed: which edits; another seed, other ones.
        categories: which categories, in this order.
        size: (w, h) in pixels.
        batch: examples a call of the editor.
        model: its name, for the summary.
        steps: its sampling steps, for the summary.
        sheet_rows: rows of four edits for each category on the contact sheet.
        on_edit: called with (category, edits so far, count) after each batch.

    Raises:
        ValueError: for an unknown category, a count below 1, or an editor that gives too few pictures.
    """
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown or not categories:
        raise ValueError(f"categories are {list(categories)}, but must be some of {', '.join(CATEGORIES)}")
    if count < 1 or batch < 1 or seed < 0:
        raise ValueError(f"count is {count}, batch {batch} and seed {seed}; ask for at least 1, 1 and 0")
    summary: dict[str, Any] = {}
    details: dict[str, Any] = {}
    shown: dict[str, list[tuple[Example, np.ndarray, Score]]] = {}
    seconds = 0.0
    for category in categories:
        rows: list[tuple[Example, Score]] = []
        shown[category] = []
        for examples in _batches(split, category, seed * SEED_STRIDE, count, batch, size):
            started = time.perf_counter()
            pictures = editor(examples)
            seconds += time.perf_counter() - started
            if len(pictures) != len(examples):
                raise ValueError(
                    f"the editor gave {len(pictures)} pictures for {len(examples)} examples: return one for each"
                )
            for item, picture in zip(examples, pictures, strict=True):
                result = score(item, picture)
                rows.append((item, result))
                if len(shown[category]) < 4 * sheet_rows:
                    shown[category].append((item, np.asarray(picture), result))
            if on_edit is not None:
                on_edit(category, len(rows), count)
        summary[category] = {"count": len(rows), **_shares([result for _, result in rows])}
        details[category] = _details(rows)
    return BenchReport(
        summary={
            "suite": "tiny",
            "split": split,
            "model": model,
            "steps": steps,
            "seed": seed,
            "seconds_per_edit": seconds / (count * len(categories)),
            "categories": summary,
        },
        details=details,
        sheet=contact_sheet(shown),
    )


def _shares(scores: list[Score]) -> dict[str, float]:
    return {key: float(np.mean([getattr(s, key) for s in scores])) for key in ("done", "kept", "both")}


def _details(rows: list[tuple[Example, Score]]) -> dict[str, Any]:
    kinds: dict[str, list[Score]] = {}
    novel: dict[str, list[Score]] = {}
    for item, result in rows:
        kinds.setdefault(item.kind, []).append(result)
        novel.setdefault("new" if item.novel else "known", []).append(result)

    def parts(groups: dict[str, list[Score]]) -> dict[str, Any]:
        return {name: {"count": len(group), **_shares(group)} for name, group in sorted(groups.items())}

    right = sum(result.both for _, result in rows)
    return {"interval": interval(right, len(rows)), "kinds": parts(kinds), "novel": parts(novel)}


def contact_sheet(shown: dict[str, list[tuple[Example, np.ndarray, Score]]], columns: int = 4) -> Image.Image:
    """Context, output and truth side by side; a bar below the output is green where done and kept, red where not.

    Args:
        shown: category -> (example, output, its score).
        columns: edits in a row.
    """
    items = [item for rows in shown.values() for item in rows]
    h, w = items[0][0].target.shape[:2]
    wide, high = 3 * w + 2 * _GAP + 2 * _GAP, h + _GAP + _TEXT
    lines = [
        (name, rows[k : k + columns]) for name, rows in shown.items() for k in range(0, len(rows), columns)
    ]
    sheet = Image.new("RGB", (columns * wide, len(lines) * high + _GAP), (252, 251, 248))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for row, (_, group) in enumerate(lines):
        for column, (item, picture, result) in enumerate(group):
            left, top = column * wide + _GAP, row * high + _GAP
            if picture.dtype != np.uint8:
                picture = np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)
            panels = (item.context, picture, item.target)
            for k, panel in enumerate(panels):
                if panel is not None:
                    sheet.paste(Image.fromarray(panel), (left + k * (w + _GAP), top))
            x = left + w + _GAP
            draw.rectangle((x, top + h, x + w // 2 - 2, top + h + 3), fill=_FRAMES[result.done])
            draw.rectangle((x + w // 2 + 1, top + h, x + w - 1, top + h + 3), fill=_FRAMES[result.kept])
            words = textwrap.wrap(item.instruction, max(20, (3 * w) // 6))[:2]
            draw.multiline_text(
                (left, top + h + 5), "\n".join(words), fill=(50, 46, 60), font=font, spacing=1
            )
    return sheet
