"""Combinations that training never sees, so that the test asks for what was not learnt by heart.

Four families, each split between validation and test:

- `("thing", shape, colour)`: e.g. no purple ball is ever drawn in training, though purple things and balls are;
- `("bigram", letters)`: two neighbouring letters of a word on a sign;
- `("creature", top, colour)`: e.g. no blue creature with cat ears;
- `("place", background, condition)`: a background at a time, in a weather or under a palette.

Training draws none of them. Validation draws its own and never test's; test draws its own and never
validation's. In both, every example of odd index has a held-out combination at the heart of what is asked
(`NOVEL_EVERY` = 2, so half of them), and those of even index have none anywhere.
"""

from __future__ import annotations

from .scene import Scene

SPLITS = ("train", "val", "test")
NOVEL_EVERY = 2
Combination = tuple[str, ...]

_TEST_THINGS = (
    "ball purple",
    "box green",
    "mushroom blue",
    "tree pink",
    "house orange",
    "flower red",
    "car yellow",
    "star purple",
    "heart green",
    "balloon orange",
    "kite blue",
)
_VAL_THINGS = ("ball yellow", "house purple", "tree blue", "car white", "star pink", "kite red", "box orange")
_TEST_BIGRAMS = "AR ST LO EN UN TE CO IP OO BE GA KI EX OW DU MA RY QU FI HA JO VE ZI YA"
_VAL_BIGRAMS = "AN OR PE SU HI LU WO CK"
_TEST_CREATURES = ("cat ears blue", "bunny ears green", "horns pink", "antennae purple", "spikes yellow")
_VAL_CREATURES = ("cat ears yellow", "horns green", "bunny ears purple")
_TEST_PLACES = (
    "beach night",
    "desert snowfall",
    "forest sunset",
    "city fog",
    "mountains rain",
    "meadow sepia",
    "snow warm",
    "room pastel",
    "desert cool",
    "forest black and white",
)
_VAL_PLACES = ("beach rain", "desert night", "mountains sunset", "meadow fog", "city pastel", "snow sepia")


def _held(things: tuple, bigrams: str, creatures: tuple, places: tuple) -> frozenset[Combination]:
    return frozenset(
        [("thing", *name.split(" ")) for name in things]
        + [("bigram", pair) for pair in bigrams.split()]
        + [("creature", *name.rsplit(" ", 1)) for name in creatures]
        + [("place", *name.split(" ", 1)) for name in places]
    )


HELD: dict[str, frozenset[Combination]] = {
    "val": _held(_VAL_THINGS, _VAL_BIGRAMS, _VAL_CREATURES, _VAL_PLACES),
    "test": _held(_TEST_THINGS, _TEST_BIGRAMS, _TEST_CREATURES, _TEST_PLACES),
}
FORBIDDEN: dict[str, frozenset[Combination]] = {
    "train": HELD["val"] | HELD["test"],
    "val": HELD["test"],
    "test": HELD["val"],
}


def bigrams(word: str) -> set[Combination]:
    """The neighbouring pairs of letters in a word."""
    return {("bigram", word[k : k + 2]) for k in range(len(word) - 1)}


def conditions(scene: Scene) -> list[str]:
    """What is not plain about a scene's time, weather and palette. Falling snow is "snowfall" here."""
    weather = "snowfall" if scene.weather == "snow" else scene.weather
    pairs = ((scene.time, "day"), (weather, "clear"), (scene.grade, "none"))
    return [value for value, plain in pairs if value != plain]


def combinations(scene: Scene | None) -> set[Combination]:
    """Every combination, held out or not, that a scene contains."""
    if scene is None:
        return set()
    found: set[Combination] = {("thing", thing.shape, thing.colour) for thing in scene.things}
    found |= {("place", scene.background, condition) for condition in conditions(scene)}
    if scene.sign is not None:
        found |= bigrams(scene.sign.word)
    if scene.creature is not None:
        found.add(("creature", scene.creature.top, scene.creature.colour))
    return found


def admissible(split: str, before: Scene | None, after: Scene, focus: set[Combination], novel: bool) -> bool:
    """Whether an edit may appear in a split.

    Args:
        split: "train", "val" or "test".
        before: the context's scene, if there is one.
        after: the target's scene.
        focus: the combinations at the heart of what is asked.
        novel: whether a held-out combination must be asked for; always False in training.
    """
    seen = combinations(before) | combinations(after)
    if seen & FORBIDDEN[split]:
        return False
    if split == "train":
        return True
    return bool(focus & HELD[split]) if novel else not seen & HELD[split]
