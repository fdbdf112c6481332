"""A habit of composing: where things go that the words name no place for.

Style, character and generation leave the layout open, and the scorer accepts any. A model of this size that is shown
any layout in training paints all of them at once, faintly. With the habit a training picture has one layout for its
words: what stands on the ground lies in the lower row, balloons and kites in the upper one, in the order in which the
words name them; a creature stands in the middle, or left of the thing beside it. In style and character the scenery
is the usual one too, where generation leaves it to the seed. Test and validation are not touched.
"""

from __future__ import annotations

from dataclasses import replace

from . import phrases
from .figures import CREATURE_XS
from .scene import GROUND_SHAPES, THING_SIZE, Creature, Scene, Sign, Thing, slot

COLUMNS_OF = {1: ("middle",), 2: ("left", "right"), 3: ("left", "middle", "right")}
"""Columns of a row that holds so many things, in the order in which the words name them."""
UNDER_SIGN = ("left", "right")
BESIDE_CREATURE = "lower right"
HORIZON = 0.60


def habitual(scene: Scene, text: str, *, scenery: bool) -> Scene:
    """The scene laid out by habit where `text`, which asks for it, leaves the layout open.

    Args:
        scene: an admissible answer to the text.
        text: instruction or caption.
        scenery: whether the horizon and the background's side are the usual ones too.

    Raises:
        ValueError: the text does not name one of the things.
    """
    if scenery:
        scene = replace(scene, horizon=HORIZON, mirror=False)
    if scene.creature is not None:
        return _beside_creature(scene, scene.creature)
    things = tuple(_placed(scene, text))
    sign = None if scene.sign is None else _usual_sign(scene.sign, text)
    return replace(scene, things=things, sign=sign)


def _beside_creature(scene: Scene, creature: Creature) -> Scene:
    left, middle, _ = CREATURE_XS
    things = tuple(_at(thing, BESIDE_CREATURE) for thing in scene.things)
    return replace(scene, creature=replace(creature, x=left if things else middle), things=things)


def _usual_sign(sign: Sign, text: str) -> Sign:
    """The first kind of sign that the words allow."""
    return replace(sign, kind=phrases.signs_named(text)[0])


def _placed(scene: Scene, text: str) -> list[Thing]:
    """The things, each at the place that the words name or that is usual; in the scene's order."""
    named = [phrases.places_named(text, thing) for thing in scene.things]
    placed = {
        thing: _at(thing, places[0]) for thing, places in zip(scene.things, named, strict=True) if places
    }
    open_things = sorted(
        (thing for thing, places in zip(scene.things, named, strict=True) if not places),
        key=lambda thing: _position(text, thing),
    )
    for row, things in (
        ("lower", [thing for thing in open_things if thing.shape in GROUND_SHAPES]),
        ("upper", [thing for thing in open_things if thing.shape not in GROUND_SHAPES]),
    ):
        taken = {thing.place for thing in placed.values()}
        columns = UNDER_SIGN if scene.sign is not None else COLUMNS_OF.get(len(things), ())
        free = [f"{row} {column}" for column in columns if f"{row} {column}" not in taken]
        for thing, place in zip(things, free, strict=False):
            placed[thing] = _at(thing, place)
    return [placed.get(thing, thing) for thing in scene.things]


def _position(text: str, thing: Thing) -> int:
    where = text.find(thing.name)
    if where < 0:
        raise ValueError(f"{text!r} does not name the {thing.name}: give the text that asks for this scene")
    return where


def _at(thing: Thing, place: str) -> Thing:
    x, y, air = slot(place)
    return replace(thing, x=x, y=y, air=air, size=THING_SIZE)
