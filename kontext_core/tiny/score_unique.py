"""Scores of edits with one right answer: local, global, text.

*Done* asks two things of the pixels that the edit changes. First, little of the change may be missing: the
squared error to the truth there is at most `MISSING` of what leaving the context alone would give, plus a
floor for what the autoencoder loses, and never above half. Second, the picture must be nearer to the truth than
to every other thing that could have been drawn in its place (another colour, shape, background, …), by
`PREFERENCE`; so a wrong colour close to the right one does not pass as a small error.

*Kept* asks of all other pixels that PSNR to the context is at least `KEPT_PSNR`, and in the worst square of an
eighth of the picture at least `KEPT_TILE`. An autoencoder of 8 x 8 pixels to 16 numbers, trained for minutes,
gives these pictures back at 31 dB (one in fifty at 27), so 26 dB blames the editor for nothing but its own. A
third of a thing lost or recoloured costs more than that, or than 17 dB in its square. As neighbouring colours
cost less, each other thing's colour is looked at by itself (`KEPT_COLOUR` in any channel's mean). After a
global edit nothing is left as it was, so kept looks at each thing: it must be there (`KEPT_THING` of the
difference it makes may be missing) and in its colour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .measures import VISIBLE, differing, mse, preference, psnr, worst_tile
from .render import mask_of, render
from .scene import AIR_SHAPES, BACKGROUNDS, COLOURS, GRADES, GROUND_SHAPES, TIMES, WEATHERS, Scene
from .score_words import read_sign
from .world import Example

MISSING = 0.12
FLOOR = 0.002
PREFERENCE = 0.15
KEPT_PSNR = 26.0
KEPT_TILE = 17.0
KEPT_THING = 0.30
KEPT_COLOUR = 0.09


@dataclass(frozen=True, kw_only=True)
class Score:
    """What became of one edit. `measures`: the numbers behind it, by name."""

    done: bool
    kept: bool
    measures: dict[str, float]

    @property
    def both(self) -> bool:
        return self.done and self.kept


def _painted(scene: Scene, example: Example) -> np.ndarray:
    h, w = example.target.shape[:2]
    return render(scene, (w, h)).astype(np.float32) / 255


def change_made(
    picture: np.ndarray, truth: np.ndarray, context: np.ndarray, where: np.ndarray
) -> tuple[bool, float]:
    """Whether the change is there, and the share of its squared size that is missing."""
    unchanged, error = mse(context, truth, where), mse(picture, truth, where)
    return error <= min(0.5 * unchanged, MISSING * unchanged + FLOOR), error / max(unchanged, 1e-9)


def edited_thing(example: Example) -> int | None:
    """Index in the target's things of the one that was edited or added; None if one was removed."""
    before, after = example.truth.before, example.truth.after
    assert before is not None
    if len(after.things) < len(before.things):
        return None
    for index, thing in enumerate(after.things):
        if index >= len(before.things) or before.things[index] != thing:
            return index
    raise AssertionError("an edit that changes nothing")


def other_things(scene: Scene, index: int) -> Iterator[Scene]:
    """The scene with one thing in every other colour, and in every other shape."""
    thing = scene.things[index]
    for colour in COLOURS:
        if colour != thing.colour:
            yield scene.with_thing(index, colour=colour)
    for shape in AIR_SHAPES if thing.air else GROUND_SHAPES:
        if shape != thing.shape:
            yield scene.with_thing(index, shape=shape)


def _kept_around(example: Example, picture: np.ndarray, context: np.ndarray) -> tuple[bool, dict[str, float]]:
    """Everything outside the change: as a whole, in the worst square, and in the colour of each other thing."""
    around = ~example.change_mask
    h, w = context.shape[:2]
    before = example.truth.before
    assert before is not None
    whole = psnr(picture, context, around)
    tile = worst_tile(picture, context, around, max(8, min(h, w) // 8))
    shift = 0.0
    for thing in before.things:
        mask = mask_of(thing, (w, h)) > 0.5
        if thing in example.truth.after.things and (mask & around).sum() > 0.3 * mask.sum():
            shift = max(shift, colour_shift(picture, context, mask & around))
    kept = whole >= KEPT_PSNR and tile >= KEPT_TILE and shift <= KEPT_COLOUR
    return kept, {"kept_psnr": whole, "kept_tile": tile, "colour_shift": shift}


def colour_shift(picture: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """The largest difference of any channel's mean over the mask."""
    return float(np.abs((picture[mask] - other[mask]).mean(0)).max())


def score_local(example: Example, picture: np.ndarray, truth: np.ndarray, context: np.ndarray) -> Score:
    """Recolour, remove, add, replace, move, resize."""
    made, missing = change_made(picture, truth, context, differing(truth, context))
    preferred = preference(picture, truth, context)
    index = edited_thing(example)
    if index is not None and made:
        for scene in other_things(example.truth.after, index):
            preferred = min(preferred, preference(picture, truth, _painted(scene, example)))
    kept, measures = _kept_around(example, picture, context)
    measures |= {"missing": missing, "preference": preferred}
    return Score(done=made and preferred >= PREFERENCE, kept=kept, measures=measures)


def other_settings(kind: str, scene: Scene) -> Iterator[Scene]:
    """The scene with every other background, time, weather or palette, whichever the edit is about."""
    choices = {"background": BACKGROUNDS, "time": TIMES, "weather": WEATHERS, "grade": GRADES}[kind]
    for choice in choices:
        if choice != getattr(scene, kind):
            yield replace(scene, **{kind: choice})


def score_global(example: Example, picture: np.ndarray, truth: np.ndarray, context: np.ndarray) -> Score:
    """Background, time of day, weather, palette; the things stay."""
    after = example.truth.after
    h, w = truth.shape[:2]
    masks = [mask_of(thing, (w, h)) > 0.5 for thing in after.things]
    around = ~np.any(masks, axis=0)
    made, missing = change_made(picture, truth, context, differing(truth, context) & around)
    preferred = 1.0
    if made:
        for scene in other_settings(example.kind, after):
            preferred = min(preferred, preference(picture, truth, _painted(scene, example)))
    worst_thing, worst_colour = 0.0, 0.0
    for index, mask in enumerate(masks):
        without = _painted(after.without_thing(index), example)
        seen = mask & differing(truth, without)
        lost = mse(picture, truth, seen) / (mse(without, truth, seen) + FLOOR / KEPT_THING)
        worst_thing = max(worst_thing, lost)
        worst_colour = max(worst_colour, colour_shift(picture, truth, mask))
    return Score(
        done=made and preferred >= PREFERENCE,
        kept=worst_thing <= KEPT_THING and worst_colour <= KEPT_COLOUR,
        measures={
            "missing": missing,
            "preference": preferred,
            "thing_lost": worst_thing,
            "colour_shift": worst_colour,
        },
    )


def score_text(example: Example, picture: np.ndarray, truth: np.ndarray, context: np.ndarray) -> Score:
    """The word on the sign: read letter by letter, in its colour, with nothing left over of another word."""
    reading = read_sign(picture, example.truth.after)
    kept, measures = _kept_around(example, picture, context)
    measures |= {
        "letters_right": reading.letters_right,
        "letter_match": reading.match,
        "ink_error": reading.ink_error,
        "strength": reading.strength,
        "litter": reading.litter,
    }
    return Score(done=reading.right, kept=kept, measures=measures)


assert VISIBLE < KEPT_COLOUR
