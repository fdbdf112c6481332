"""The synthetic world: examples of (context picture, instruction, target picture) with known truth.

`example(split, category, index)` is a pure function: the same arguments give the same scenes and words on every
machine, and the same pictures, bit for bit with numpy 1.26 and 2.4, and but for two values in a million with
Pillow 10.4 and 13. Six categories: the five of KontextBench ("local", "global", "text", "style", "character") and
"generate", text to image; and for training alone "several", local edits joined by "and". See `edits` for what may
be asked, `holdout` for what training never sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from . import holdout, phrases
from .compose import habitual
from .dice import Dice
from .edits import DRAFTS, TRAINING_ONLY
from .render import render
from .scene import Scene

VERSION = 1  # part of every seed: raise it when scenes or phrasings change
CATEGORIES = tuple(category for category in DRAFTS if category not in TRAINING_ONLY)
EDIT_CATEGORIES = tuple(category for category in CATEGORIES if category != "generate")
OPEN = ("style", "character", "generate")
"""Categories with many right answers: the target is a new picture."""
WEIGHTS = {"local": 0.30, "global": 0.12, "text": 0.20, "style": 0.13, "character": 0.13, "generate": 0.12}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the scorer knows: the scenes of context (None for text to image) and target."""

    before: Scene | None
    after: Scene


@dataclass(frozen=True, kw_only=True)
class Example:
    """One editing task.

    Attributes:
        split: "train", "val" or "test".
        category: one of CATEGORIES.
        kind: what exactly is asked, e.g. "recolour".
        index: its number within split and category.
        novel: whether a combination is asked for that training never shows.
        instruction: the words (for "generate" the caption).
        caption: what the target shows.
        context: uint8 (H, W, 3), or None for text to image.
        target: uint8 (H, W, 3); one of many right answers in style, character and generate.
        change_mask: bool (H, W), where context and target differ, and two pixels around; all True where the
            target is a new picture.
        truth: the scenes.
    """

    split: str
    category: str
    kind: str
    index: int
    novel: bool
    instruction: str
    caption: str
    context: np.ndarray | None
    target: np.ndarray
    change_mask: np.ndarray
    truth: Truth


def change_mask(context: np.ndarray, target: np.ndarray, threshold: int = 4) -> np.ndarray:
    """Pixels where a channel differs by more than `threshold`, grown by two pixels of 128; bool (H, W)."""
    changed = np.abs(context.astype(np.int16) - target.astype(np.int16)).max(-1) > threshold
    grow = 2 * max(1, round(2 * min(changed.shape) / 128)) + 1
    image = Image.fromarray(changed.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(grow))
    return np.asarray(image) > 0


def _checked(split: str, category: str) -> None:
    if split not in holdout.SPLITS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(holdout.SPLITS)}")
    if category not in DRAFTS:
        raise ValueError(f"category is {category!r}, but must be one of {', '.join(DRAFTS)}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An example before anything is painted: a thousandth of the work. Fields as in Example."""

    kind: str
    novel: bool
    instruction: str
    caption: str
    truth: Truth


def plan(split: str, category: str, index: int, *, habit: bool = False) -> Plan:
    """What the example of this number shows and asks.

    Args:
        habit: whether the layout that an open category leaves open is the usual one (`compose`), for training; words
            and context are the same.

    Raises:
        ValueError: for an unknown split or category.
    """
    _checked(split, category)
    dice = Dice("kontext-tiny world", VERSION, split, category, index)
    novel = split != "train" and index % holdout.NOVEL_EVERY == 1
    while True:
        draft = DRAFTS[category](dice)
        if draft is None or phrases.tokens(draft.instruction) > phrases.LIMIT:
            continue
        if not holdout.admissible(split, draft.before, draft.after, set(draft.focus), novel):
            continue
        if draft.before is None:
            captions = [draft.instruction]
        else:
            captions = [phrases.caption(dice, draft.after) for _ in range(4)]
        fitting = [text for text in captions if phrases.tokens(text) <= phrases.LIMIT]
        if fitting:
            after = draft.after
            if habit and category in OPEN:
                after = habitual(after, draft.instruction, scenery=category != "generate")
            return Plan(
                kind=draft.kind,
                novel=novel,
                instruction=draft.instruction,
                caption=fitting[0],
                truth=Truth(before=draft.before, after=after),
            )


def example(
    split: str, category: str, index: int, size: tuple[int, int] = (128, 128), *, habit: bool = False
) -> Example:
    """The example of this number.

    Args:
        split: "train", "val" or "test".
        category: one of CATEGORIES, or "several".
        index: any integer from 0; odd ones of val and test ask for a held-out combination.
        size: (w, h) in pixels; the scene is the same at every size.
        habit: see `plan`.

    Raises:
        ValueError: for an unknown split or category, or a size too small to draw on.
    """
    item = plan(split, category, index, habit=habit)
    target = render(item.truth.after, size)
    context = None if item.truth.before is None else render(item.truth.before, size)
    if context is None or category in ("style", "character"):
        mask = np.ones(target.shape[:2], dtype=bool)
    else:
        mask = change_mask(context, target)
    return Example(
        split=split,
        category=category,
        kind=item.kind,
        index=index,
        novel=item.novel,
        instruction=item.instruction,
        caption=item.caption,
        context=context,
        target=target,
        change_mask=mask,
        truth=item.truth,
    )


def examples(
    split: str,
    categories: Sequence[str] | dict[str, float] | None = None,
    *,
    start: int = 0,
    count: int | None = None,
    size: tuple[int, int] = (128, 128),
) -> Iterator[Example]:
    """Examples number `start`, `start + 1`, … of a mixture of categories.

    Args:
        split: "train", "val" or "test".
        categories: category -> weight, or names of equal weight; None for WEIGHTS.
        start: number of the first; a run that stopped after n examples goes on from `start + n`.
        count: how many; None for no end.
        size: (w, h) in pixels.
    """
    if categories is None:
        categories = WEIGHTS
    weights = dict(categories) if isinstance(categories, dict) else dict.fromkeys(categories, 1.0)
    for name in weights:
        _checked(split, name)
    number = start
    while count is None or number < start + count:
        category = Dice("kontext-tiny mixture", VERSION, split, number).weighted(weights)
        yield example(split, category, number, size)
        number += 1


def corpus(count: int, split: str = "train") -> list[str]:
    """Instructions and captions, alternating over all categories, to train tokenizers on."""
    texts: list[str] = []
    index = 0
    while len(texts) < count:
        for category in CATEGORIES:
            item = plan(split, category, index)
            texts += dict.fromkeys((item.instruction, item.caption))
        index += 1
    return texts[:count]
