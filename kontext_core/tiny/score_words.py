"""Reading a sign: each letter's cell is compared with all 26 letters as the world would draw them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .figures import ADVANCE, CAP, SIGN_HALF, SIGN_Y, letter_centres
from .letters import ALPHABET, draw_letter
from .pen import SUPERSAMPLE, Pen, blank, reduced
from .render import mask_of, render
from .scene import BOARD_INKS, INKS, Scene, Sign

MATCH = 0.62  # correlation of a cell with its letter; blurred truth stays above 0.85
INK_ERROR = (
    0.45  # distance to the asked ink over that plus the distance to the nearest other; worn truth: 0.35
)
LEAD = 0.02  # by how much the right letter must beat the best wrong one
STRENGTH = (
    0.70  # how far the strokes' middles must be from the board towards ink; half-written letters have 0.5
)
LITTER = 0.10  # ink per pixel on the board beyond the word; a forgotten letter gives 0.2 and more in its cell
SHIFTS = (-1, 0, 1)  # pixels of 128 that a letter may be off its place


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A sign as read. `letters_right`: share; `match`: the worst letter's correlation; `ink_error`: the
    picture's ink to the asked colour relative to the nearest other ink's distance; `strength`: how inked the letters'
    middles are; `litter`: ink elsewhere."""

    right: bool
    word: str
    letters_right: float
    match: float
    ink_error: float
    strength: float
    litter: float


@lru_cache(maxsize=64)
def _letter_bank(width: int, height: int, x: float, y: float, cap: float) -> np.ndarray:
    """All letters in a cell of (width, height) pixels around (x, y): float32 (26, height, width)."""
    bank = []
    for letter in ALPHABET:
        canvas = blank((width, height), "L")
        draw_letter(Pen(canvas, (0.0, 0.0), SUPERSAMPLE), letter, x, y, cap, (255, 255, 255))
        bank.append(reduced(canvas).astype(np.float32) / 255)
    return np.stack(bank)


def _normalised(cells: np.ndarray) -> np.ndarray:
    flat = cells.reshape(len(cells), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3)


def ink_map(picture: np.ndarray, board: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """How inked each pixel is, (H, W): 0 for the board's colour, 1 for ink of any colour."""
    scale = max(float(np.abs(ink - board).max()), 0.1)
    return np.clip(np.abs(picture - board).max(-1) / scale, 0, 1)


def read_sign(picture: np.ndarray, scene: Scene) -> Reading:
    """Reads the sign that a scene says is there.

    Args:
        picture: float RGB in [0, 1], (H, W, 3).
        scene: the truth; its sign's word and ink are what is looked for.

    Raises:
        ValueError: if the scene has no sign or no word on it.
    """
    sign = scene.sign
    if sign is None or not sign.word:
        raise ValueError("the scene has no word to read: its sign is " + repr(sign))
    h, w = picture.shape[:2]
    unit = min(h, w)
    empty, board, ink = _board(scene, (w, h))
    inked = ink_map(picture, board, ink)
    shifts = [(dx, dy) for dx in SHIFTS for dy in SHIFTS]
    step = max(1, round(unit / 128))

    cap = CAP * unit
    width, height = round(ADVANCE * unit * 1.05), round(cap * 1.3)
    letters, match, right = "", 1.0, 0
    expected = np.zeros((h, w), dtype=np.float32)
    for letter, (x, y) in zip(sign.word, letter_centres(sign, (w, h)), strict=True):
        left, top = round(x - width / 2), round(y - height / 2)
        bank = _normalised(_letter_bank(width, height, round(x - left, 3), round(y - top, 3), round(cap, 3)))
        cells = np.stack([_cut(inked, left + dx * step, top + dy * step, width, height) for dx, dy in shifts])
        scores = (_normalised(cells) @ bank.T).max(0)
        wanted = ALPHABET.index(letter)
        others = np.delete(scores, wanted)
        letters += ALPHABET[int(scores.argmax())]
        match = min(match, float(scores[wanted]))
        right += bool(scores[wanted] >= MATCH and scores[wanted] >= others.max() + LEAD)
        expected[max(0, top) : top + height, max(0, left) : left + width] = 1
    core = _word_core(sign, (w, h))
    ink_error = _ink_error(picture, core, scene, ink, (w, h))
    strength = float(np.median(inked[core]))
    litter = _litter(picture, empty, inked, expected, sign, unit)
    return Reading(
        right=right == len(sign.word) and ink_error < INK_ERROR and strength >= STRENGTH and litter < LITTER,
        word=letters,
        letters_right=right / len(sign.word),
        match=match,
        ink_error=ink_error,
        strength=strength,
        litter=litter,
    )


def _cut(plane: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    """A window of a plane, zero beyond its edges."""
    out = np.zeros((height, width), dtype=plane.dtype)
    h, w = plane.shape
    x0, y0, x1, y1 = max(0, left), max(0, top), min(w, left + width), min(h, top + height)
    if x1 > x0 and y1 > y0:
        out[y0 - top : y1 - top, x0 - left : x1 - left] = plane[y0:y1, x0:x1]
    return out


def _board_area(sign: Sign, size: tuple[int, int], inset: float = 0.035) -> np.ndarray:
    """Where the board has room for letters; bool (H, W)."""
    w, h = size
    unit = min(size)
    wide, high = SIGN_HALF[0] * unit * (1 - 2 * inset), (SIGN_HALF[1] - inset) * unit
    x, y = np.arange(w) + 0.5 - w / 2, np.arange(h) + 0.5 - SIGN_Y[sign.kind] * h
    return (np.abs(y) < high)[:, None] & (np.abs(x) < wide)[None, :]


@lru_cache(maxsize=16)
def _board(scene: Scene, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The empty sign's picture, the colour of its board and that of its ink, as this scene's light shows them."""
    assert scene.sign is not None
    area = _board_area(scene.sign, size)
    empty = render(replace(scene, sign=replace(scene.sign, word="")), size).astype(np.float32) / 255
    return empty, np.median(empty[area], axis=0), _ink_colour(scene, scene.sign.ink, size)


@lru_cache(maxsize=128)
def _ink_colour_of(scene: Scene, ink: str, size: tuple[int, int]) -> tuple[float, ...]:
    assert scene.sign is not None
    sign = replace(scene.sign, word="HHH", ink=ink)
    drawn = render(replace(scene, sign=sign), size).astype(np.float32) / 255
    return tuple(np.median(drawn[_word_core(sign, size)], axis=0).tolist())


def _ink_colour(scene: Scene, ink: str, size: tuple[int, int]) -> np.ndarray:
    """An ink's colour in a scene's light; the horizon and the things do not matter to it."""
    bare = replace(scene, things=(), horizon=0.6, mirror=False)
    return np.asarray(_ink_colour_of(bare, ink, size), dtype=np.float32)


def _word_core(sign: Sign, size: tuple[int, int]) -> np.ndarray:
    """The inner pixels of a word's strokes; bool (H, W)."""
    word = mask_of(sign, size) * _letters_only(sign, size)
    return word > 0.95


def _letters_only(sign: Sign, size: tuple[int, int]) -> np.ndarray:
    w, h = size
    canvas = blank(size, "L")
    pen = Pen(canvas, (0.0, 0.0), SUPERSAMPLE)
    for letter, (x, y) in zip(sign.word, letter_centres(sign, (w, h)), strict=True):
        draw_letter(pen, letter, x, y, CAP * min(size), (255, 255, 255))
    return reduced(canvas).astype(np.float32) / 255


def _ink_error(
    picture: np.ndarray, core: np.ndarray, scene: Scene, ink: np.ndarray, size: tuple[int, int]
) -> float:
    """Distance of the word's colour to the asked ink, over the sum of that and the nearest other ink's."""
    assert scene.sign is not None
    colour = np.median(picture[core], axis=0)
    own = float(np.linalg.norm(colour - ink))
    rivals = [i for i in INKS if i != scene.sign.ink and i in BOARD_INKS[scene.sign.board]]
    other = min(float(np.linalg.norm(colour - _ink_colour(scene, i, size))) for i in rivals)
    return own / max(own + other, 1e-6)


def _litter(
    picture: np.ndarray, empty: np.ndarray, inked: np.ndarray, expected: np.ndarray, sign: Sign, unit: int
) -> float:
    """The most ink in any letter-sized window of the board outside the word's own cells."""
    free = _board_area(sign, (picture.shape[1], picture.shape[0])) & (expected == 0)
    expected_empty = np.abs(picture - empty).max(-1)
    stray = np.minimum(inked, np.clip(expected_empty / 0.3, 0, 1)) * free
    columns = stray.sum(0) / max(1.0, 2 * SIGN_HALF[1] * unit)
    width = max(2, round(ADVANCE * unit))
    return float(np.convolve(columns, np.ones(width) / width, mode="valid").max())
