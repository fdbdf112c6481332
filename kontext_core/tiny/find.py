"""Finding things, creatures and settings in a picture whose layout is not known: analysis by synthesis.

What is looked for is drawn as the world would draw it, at each place it may have, moved a few pixels about,
and compared with the picture after a blur that removes hatching, dots and squares. It is found where the
picture is nearer to the drawing than to an empty scene and than to every rival (another shape, colour, part …)
in the pixels where the two differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from .measures import VISIBLE, as_floats, blurred, gap
from .render import mask_of, render
from .scene import AIR_SHAPES, GROUND_SHAPES, PLACES, THING_SIZE, Creature, Look, Scene, Thing, slot

PAD = 32  # pixels around the picture, so that a window may be moved past its edge
BLUR = 1.5  # pixels of 128
REACH = 6  # how far from its place a thing may be, in pixels of 128 (the world's jitter is 4)
PRESENT = 0.45  # squared distance to the drawn thing over that to the empty scene; a truth stays below 0.2
LEAD_SHAPE, LEAD_COLOUR = 0.20, 0.15  # by how much it must beat every other shape and colour: truths have 0.3
COLOURLESS = ("duotone", "sketch")  # looks in which a thing's colour cannot be told
SEEN = 8  # pixels of 128 x 128 that two drawings must differ in to be compared
GREY = ("black and white", "sepia")  # palettes in which it cannot
CONFUSED = {
    "red": ("orange", "pink", "purple"),
    "orange": ("red", "yellow"),
    "yellow": ("orange", "white"),
    "green": ("blue", "yellow"),
    "blue": ("purple", "green"),
    "purple": ("blue", "pink", "red"),
    "pink": ("red", "purple", "white", "orange"),
    "white": ("yellow", "pink"),
}
Shift = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A part of a picture: rows top:bottom, columns left:right."""

    left: int
    top: int
    right: int
    bottom: int

    @staticmethod
    def around(mask: np.ndarray, margin: int) -> Window:
        """The mask's box with a margin, its corner on the 16-pixel grid that all patterns repeat on."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        h, w = mask.shape
        left, top = max(0, columns[0] - margin) // 16 * 16, max(0, rows[0] - margin) // 16 * 16
        return Window(
            int(left), int(top), min(w, int(columns[-1]) + margin + 1), min(h, int(rows[-1]) + margin + 1)
        )

    def of(self, plane: np.ndarray) -> np.ndarray:
        return plane[self.top : self.bottom, self.left : self.right]


@lru_cache(maxsize=256)
def _soft_mask(part: Thing | Creature, size: tuple[int, int], sigma: float) -> np.ndarray:
    return blurred(mask_of(part, size), sigma)


class Search:
    """Looks in one picture for what scenes show.

    Args:
        picture: float RGB in [0, 1], (H, W, 3).
        sigma: the blur, in pixels of 128.
    """

    def __init__(self, picture: np.ndarray, sigma: float = BLUR) -> None:
        h, w = picture.shape[:2]
        self.size = (w, h)
        self.unit = min(h, w) / 128
        self.sigma = sigma * self.unit
        self.step = max(1, round(2 * self.unit))
        self._padded = np.pad(blurred(picture, self.sigma), ((PAD, PAD), (PAD, PAD), (0, 0)), mode="edge")

    def drawn(self, scene: Scene, window: Window) -> np.ndarray:
        """A window of a scene, blurred like the picture."""
        part = render(scene, self.size, (window.left, window.top, window.right, window.bottom))
        return blurred(part, self.sigma)

    def distances(
        self, patch: np.ndarray, weight: np.ndarray, window: Window, shifts: Iterable[Shift], every: int = 1
    ) -> np.ndarray:
        """Weighted squared distance of a patch to the picture at each shift, on every n-th pixel."""
        rows, columns = np.flatnonzero(weight.max(1) > 0), np.flatnonzero(weight.max(0) > 0)
        y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        weight = weight[y0:y1:every, x0:x1:every]
        root = np.sqrt(weight / (3 * weight.sum() + 1e-9))[..., None]
        wanted = patch[y0:y1:every, x0:x1:every] * root
        out = []
        for dx, dy in shifts:
            top, left = window.top + dy + PAD, window.left + dx + PAD
            cut = self._padded[top + y0 : top + y1 : every, left + x0 : left + x1 : every]
            apart = (cut * root - wanted).ravel()
            out.append(np.dot(apart, apart))
        return np.asarray(out)

    def around(self, shift: Shift, reach: int, step: int = 1) -> list[Shift]:
        """Shifts up to `reach` steps from one."""
        steps = range(-reach, reach + 1)
        return [(shift[0] + i * step, shift[1] + j * step) for i in steps for j in steps]

    def best(self, options: Iterable[tuple[str, Scene, Thing | Creature]], reach: int) -> Match:
        """The option that the picture shows best.

        Args:
            options: name, scene to draw, and the part of it that counts.
            reach: how far it may be moved, in pixels of 128.
        """
        shifts = self.around((0, 0), round(reach * self.unit / self.step), self.step)
        matches = []
        for name, scene, part in options:
            weight = _soft_mask(part, self.size, 2.0 * self.unit)
            window = Window.around(weight > 0.5, round(8 * self.unit))
            weight, patch = window.of(weight), self.drawn(scene, window)
            gaps = self.distances(patch, weight, window, shifts, every=self.step)
            shift = shifts[int(gaps.argmin())]
            matches.append(Match(name, scene, window, weight, patch, shift, float(gaps.min())))
        return min(matches, key=lambda match: match.distance)

    def presence(self, match: Match, empty: Scene) -> float:
        """The match's squared distance over that of the scene without it: 0 is perfect."""
        fine = self.around(match.shift, 1)
        own = self.distances(match.patch, match.weight, match.window, fine).min()
        absent = self.distances(self.drawn(empty, match.window), match.weight, match.window, fine).min()
        return float(own / max(absent, 1e-6))

    def lead(self, match: Match, rival: Scene, roam: bool = True) -> float:
        """By how much the match is nearer than a rival, where the two differ: 1 for the truth, -1 for the rival.

        With `roam` the rival may lie a few pixels elsewhere, as its own best place may be another. 1 also if the
        two can hardly be told apart, as a white belly on a white creature.
        """
        patch = self.drawn(rival, match.window)
        where = np.clip(gap(match.patch, patch) / VISIBLE - 1, 0, 1)
        pixels = np.count_nonzero(where)
        if pixels < SEEN * self.unit**2:
            return 1.0
        every = self.step if pixels > 600 * self.unit**2 else 1
        fine = self.around(match.shift, 1)
        near = self.around(match.shift, 2, self.step) if roam else fine
        right = self.distances(match.patch, where, match.window, fine, every).min()
        wrong = self.distances(patch, where, match.window, near, every).min()
        return float((wrong - right) / max(wrong + right, 1e-9))


@dataclass(frozen=True)
class Match:
    """Where an option fits best: its window, moved by `shift`, and the squared distance there."""

    name: str
    scene: Scene
    window: Window
    weight: np.ndarray
    patch: np.ndarray
    shift: Shift
    distance: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a thing was found best and how well.

    Attributes:
        place: one of the six places.
        present: squared distance to the thing's drawing over that to the empty scene (0 is perfect).
        shape: by how much the drawing beats the best other shape, -1 to 1.
        colour: by how much it beats the best other colour; 1 where colours cannot be told.
    """

    place: str
    present: float
    shape: float
    colour: float

    @property
    def right(self) -> bool:
        return self.present <= PRESENT and self.shape >= LEAD_SHAPE and self.colour >= LEAD_COLOUR


def find_thing(search: Search, thing: Thing, scene: Scene, places: Iterable[str] = tuple(PLACES)) -> Found:
    """Looks for a thing of this shape and colour, wherever it may be and in sizes near the usual one.

    Args:
        search: the picture.
        thing: what to look for; its own position does not matter.
        scene: background, light and look that the picture should have; what stands in it is ignored.
        places: where to look.

    Raises:
        ValueError: if the thing can be in none of the places.
    """
    empty = replace(scene, things=(), creature=None)
    options = []
    for place in places:
        x, y, air = slot(place)
        if thing.shape in (AIR_SHAPES if air else GROUND_SHAPES):
            placed = replace(thing, x=x, y=y, air=air, size=THING_SIZE)
            options.append((place, replace(empty, things=(placed,)), placed))
    if not options:
        raise ValueError(f"a {thing.shape} can be in none of the places {list(places)}: give others")
    match = search.best(options, REACH)
    sized = []
    for factor in (0.92, 1.0, 1.08):
        patch = search.drawn(match.scene.with_thing(0, size=THING_SIZE * factor), match.window)
        gaps = search.distances(patch, match.weight, match.window, search.around(match.shift, 1))
        sized.append((float(gaps.min()), factor, patch))
    distance, factor, patch = min(sized, key=lambda option: option[0])
    own = match.scene.with_thing(0, size=THING_SIZE * factor)
    match = replace(match, scene=own, patch=patch, distance=distance)

    shapes = AIR_SHAPES if own.things[0].air else GROUND_SHAPES
    colours = () if scene.look.name in COLOURLESS or scene.grade in GREY else CONFUSED[thing.colour]
    return Found(
        place=match.name,
        present=search.presence(match, empty),
        shape=min(search.lead(match, own.with_thing(0, shape=s)) for s in shapes if s != thing.shape),
        colour=min((search.lead(match, own.with_thing(0, colour=c)) for c in colours), default=1.0),
    )


GRID = 16
FAR = 0.02  # squared error of a cell that is as far as can be


@lru_cache(maxsize=4096)
def _setting_cells(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    return cells(as_floats(render(scene, size)))


def cells(picture: np.ndarray) -> np.ndarray:
    """The picture averaged to 16 x 16 cells: float32 (16, 16, 3)."""
    image = Image.fromarray(np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8))
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float32) / 255


def setting_distance(
    picture_cells: np.ndarray, scene: Scene, size: tuple[int, int], **changes: str | Look
) -> float:
    """How far a picture is from an empty scene with these changes, either way round and at two horizons.

    Cells that things cover are far from any background, so each cell's squared error is capped.
    """
    bare = replace(scene, things=(), sign=None, creature=None, mirror=False, **changes)
    best = np.inf
    for horizon in (0.58, 0.62):
        drawn = _setting_cells(replace(bare, horizon=horizon), size)
        for version in (drawn, drawn[:, ::-1]):
            best = min(best, float(np.minimum(((picture_cells - version) ** 2).mean(-1), FAR).mean()))
    return best
