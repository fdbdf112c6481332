"""The scorer put to the test: `python -m kontext_core.tiny.score_check [--count N] [--json]`.

Pictures whose worth is known are scored as a model's would be: the truth, the truth worn as an autoencoder wears it,
the untouched context, plausible mistakes (another colour, a letter off, another look, another ear …), half a change,
blur, noise, black, and another example's picture. Right rows should be near 1, all others near 0 in "both".
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from . import world
from .render import render
from .scene import BACKGROUNDS, BOARD_INKS, Scene
from .score_unique import edited_thing, other_settings, other_things
from .scorer import score
from .world import EDIT_CATEGORIES, Example

Answer = Callable[[Example], np.ndarray]
GROUPS = ("right", "unchanged", "wrong", "degraded")


def blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def noise(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian noise of `sigma`, as a share of white."""
    drawn = np.random.Generator(np.random.PCG64(0)).normal(0, 255 * sigma, picture.shape)
    return np.clip(picture + drawn, 0, 255).astype(np.uint8)


def worn(picture: np.ndarray) -> np.ndarray:
    """About 31 dB, as an autoencoder gives it back: soft edges, blocks of 8 pixels, a little noise."""
    buffer = io.BytesIO()
    Image.fromarray(blur(picture, 0.4)).save(buffer, "JPEG", quality=88)
    return noise(np.asarray(Image.open(buffer)), 0.01)


def half(item: Example) -> np.ndarray:
    """Halfway between context and truth."""
    assert item.context is not None
    return ((item.context.astype(int) + item.target) // 2).astype(np.uint8)


def mistake(item: Example) -> np.ndarray:
    """The truth but for one plausible error, of those that a category knows."""
    scene = _mistaken(item)
    return render(scene, item.target.shape[1::-1])


def _mistaken(item: Example) -> Scene:
    scene, turn = item.truth.after, item.index
    if item.category == "local":
        index = edited_thing(item)
        if index is None:  # a removal: the wrong thing is removed
            before = item.truth.before
            assert before is not None
            gone = next(k for k, thing in enumerate(before.things) if thing not in scene.things)
            return before.without_thing((gone + 1) % len(before.things))
        others = list(other_things(scene, index))
        return others[turn % len(others)]
    if item.category == "global":
        others = list(other_settings(item.kind, scene))
        return others[turn % len(others)]
    if item.category == "text":
        sign = scene.sign
        assert sign is not None
        if item.kind == "recolour word":
            ink = next(ink for ink in BOARD_INKS[sign.board] if ink != sign.ink)
            return replace(scene, sign=replace(sign, ink=ink))
        place = turn % len(sign.word)
        letter = "X" if sign.word[place] != "X" else "O"
        return replace(scene, sign=replace(sign, word=sign.word[:place] + letter + sign.word[place + 1 :]))
    if item.category == "style":
        if turn % 2:
            return scene.without_thing(0)
        looks = [name for name in ("flat", "mosaic", "neon", "halftone") if name != scene.look.name]
        return replace(scene, look=replace(scene.look, name=looks[turn % len(looks)]))
    creature = scene.creature
    assert creature is not None
    changes = (
        {"colour": "green" if creature.colour != "green" else "orange"},
        {"top": "horns" if creature.top != "horns" else "bunny ears"},
        {"eyes": "one eye" if creature.eyes != "one eye" else "three eyes"},
    )
    if turn % 4 == 3:
        other = BACKGROUNDS[BACKGROUNDS.index(scene.background) - 1]
        return replace(scene, background=other)
    return replace(scene, creature=replace(creature, **changes[turn % 4]))


def answers(split: str, size: tuple[int, int]) -> dict[str, tuple[str, Answer]]:
    """Name of each kind of picture -> (its group, how it is made from an example)."""

    def other(item: Example) -> np.ndarray:
        return world.example(split, item.category, item.index + 10_000, size).target

    return {
        "truth": ("right", lambda item: item.target),
        "truth, worn": ("right", lambda item: worn(item.target)),
        "context": ("unchanged", lambda item: item.context),
        "context, worn": ("unchanged", lambda item: worn(item.context)),
        "one mistake": ("wrong", mistake),
        "another's truth": ("wrong", other),
        "half a change": ("wrong", half),
        "blurred": ("degraded", lambda item: blur(item.target, 5)),
        "noisy": ("degraded", lambda item: noise(item.target, 0.35)),
        "black": ("degraded", lambda item: np.zeros_like(item.target)),
    }


def check(
    split: str = "val",
    count: int = 50,
    *,
    categories: Sequence[str] = EDIT_CATEGORIES,
    size: tuple[int, int] = (128, 128),
) -> dict[str, Any]:
    """Scores every kind of picture.

    Returns:
        `{"split", "count", "categories": {category: {picture: {"group", "done", "kept", "both"}}}}`, shares 0 to 1.

    Raises:
        ValueError: count below 1, or an unknown split or category.
    """
    if count < 1:
        raise ValueError(f"count is {count}; ask for at least 1")
    kinds, found = answers(split, size), {}
    for category in categories:
        items = [world.example(split, category, index, size) for index in range(count)]
        found[category] = {}
        for name, (group, answer) in kinds.items():
            scores = [score(item, answer(item)) for item in items]
            shares = {
                key: float(np.mean([getattr(s, key) for s in scores])) for key in ("done", "kept", "both")
            }
            found[category][name] = {"group": group, **shares}
    return {"split": split, "count": count, "categories": found}


def table(result: dict[str, Any]) -> str:
    """One table a category."""
    lines = []
    for category, rows in result["categories"].items():
        lines.append(f"{category + ', ' + str(result['count']):<18}{'':<18}{'done':>8}{'kept':>8}{'both':>8}")
        for name, row in rows.items():
            shares = "".join(f"{row[key]:>8.3f}" for key in ("done", "kept", "both"))
            lines.append(f"  {row['group']:<16}{name:<18}{shares}")
        lines.append("")
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="val", help="default: %(default)s"
    )
    parser.add_argument("--count", type=int, default=50, help="examples a category (default: %(default)s)")
    parser.add_argument(
        "--categories", default=",".join(EDIT_CATEGORIES), help="comma-separated (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        result = check(args.split, args.count, categories=args.categories.split(","))
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
