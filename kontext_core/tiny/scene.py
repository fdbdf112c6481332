"""What a picture of the synthetic world shows: frozen dataclasses, and the names they are made of.

Positions are fractions of the picture's width and height; sizes are fractions of its shorter side, the
*unit*, so that a scene is the same scene at every size and aspect ratio. The picture has two rows of three
places: things in the upper row float around their centre, those in the lower row stand on their base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

COLOURS = {
    "red": (222, 44, 52),
    "orange": (246, 130, 28),
    "yellow": (252, 212, 48),
    "green": (48, 156, 72),
    "blue": (42, 106, 224),
    "purple": (134, 68, 190),
    "pink": (250, 140, 190),
    "white": (248, 247, 242),
}
GROUND_SHAPES = ("ball", "box", "mushroom", "tree", "house", "flower", "car", "star", "heart")
AIR_SHAPES = ("balloon", "kite", "star", "heart")
SHAPES = ("ball", "box", "mushroom", "tree", "house", "flower", "car", "star", "heart", "balloon", "kite")

BACKGROUNDS = ("meadow", "beach", "desert", "snow", "forest", "city", "room", "mountains")
TIMES = ("day", "sunset", "night")
WEATHERS = ("clear", "rain", "snow", "fog")
GRADES = ("none", "black and white", "sepia", "warm", "cool", "pastel")

SIGNS = ("billboard", "shop", "poster")
BOARDS = {
    "cream": (252, 240, 210),
    "wood": (190, 134, 84),
    "slate": (52, 66, 78),
    "mint": (176, 226, 200),
    "navy": (34, 52, 112),
    "white": (250, 250, 248),
}
INKS = {
    "black": (28, 28, 34),
    "white": (252, 252, 250),
    "red": (206, 28, 40),
    "blue": (30, 84, 206),
    "green": (22, 128, 60),
    "yellow": (255, 216, 40),
    "purple": (124, 44, 176),
    "orange": (240, 112, 16),
}
BOARD_INKS = {
    "cream": ("black", "red", "blue", "green", "purple"),
    "wood": ("black", "white", "yellow"),
    "slate": ("white", "yellow", "orange"),
    "mint": ("black", "red", "blue", "purple"),
    "navy": ("white", "yellow", "orange"),
    "white": ("black", "red", "blue", "green", "purple", "orange"),
}

BODIES = ("round", "tall", "square", "pear", "ghost")
EYES = ("one eye", "two eyes", "three eyes")
TOPS = ("cat ears", "bunny ears", "horns", "antennae", "spikes")
PATTERNS = ("plain", "belly", "spots", "stripes")
WEARS = ("nothing", "hat", "scarf", "crown", "bow")
POSES = ("standing", "waving", "jumping", "sleeping")

LOOKS = ("flat", "outline", "mosaic", "hatching", "watercolour", "duotone", "halftone", "neon", "sketch")
TONES = {
    "navy": ((24, 36, 96), (250, 238, 210)),
    "plum": ((92, 24, 100), (255, 214, 186)),
    "emerald": ((14, 70, 52), (238, 246, 214)),
    "wine": ((112, 12, 40), (255, 206, 214)),
    "coal": ((30, 28, 30), (255, 214, 60)),
    "teal": ((0, 88, 104), (226, 250, 244)),
}

COLUMNS = (0.19, 0.5, 0.81)
UPPER_Y = 0.24
LOWER_Y = 0.90
THING_SIZE = 0.31
BIGGER, SMALLER = 1.4, 0.65
PLACES = {
    "upper left": (0, True),
    "upper middle": (1, True),
    "upper right": (2, True),
    "lower left": (0, False),
    "lower middle": (1, False),
    "lower right": (2, False),
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of height `size`. `x, y`: its centre if it floats (`air`), else the middle of its base."""

    shape: str
    colour: str
    x: float
    y: float
    size: float = THING_SIZE
    air: bool = False

    @property
    def place(self) -> str:
        """The name of the nearest of the six places."""
        column = min(range(3), key=lambda i: abs(COLUMNS[i] - self.x))
        return next(name for name, where in PLACES.items() if where == (column, self.air))

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A board across the picture with a word of capitals (or none)."""

    kind: str
    board: str
    word: str
    ink: str


@dataclass(frozen=True, kw_only=True)
class Creature:
    """An invented animal: what it is (`identity`), and where and how it stands."""

    body: str
    colour: str
    eyes: str
    top: str
    pattern: str
    wear: str
    wear_colour: str
    x: float = 0.5
    y: float = 0.92
    size: float = 0.60
    pose: str = "standing"

    @property
    def identity(self) -> tuple[str, ...]:
        return (self.body, self.colour, self.eyes, self.top, self.pattern, self.wear, self.wear_colour)


@dataclass(frozen=True, kw_only=True)
class Look:
    """A style of drawing; `tone` names the inks (a key of TONES) of the looks that have inks."""

    name: str = "flat"
    tone: str = "navy"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All a picture shows. `horizon` is a fraction of the height; `mirror` flips the background only."""

    background: str
    time: str = "day"
    weather: str = "clear"
    grade: str = "none"
    look: Look = Look()
    horizon: float = 0.60
    mirror: bool = False
    things: tuple[Thing, ...] = ()
    sign: Sign | None = None
    creature: Creature | None = None

    def with_thing(self, index: int, **changes: object) -> Scene:
        """The scene with fields of one thing changed."""
        things = list(self.things)
        things[index] = replace(things[index], **changes)
        return replace(self, things=tuple(things))

    def without_thing(self, index: int) -> Scene:
        """The scene with one thing gone."""
        return replace(self, things=self.things[:index] + self.things[index + 1 :])


def slot(place: str) -> tuple[float, float, bool]:
    """(x, y, air) of one of the six places."""
    column, air = PLACES[place]
    return COLUMNS[column], UPPER_Y if air else LOWER_Y, air
