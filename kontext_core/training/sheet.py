"""A few pairs of a folder as one picture: what is trained on, at a glance."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..images import load_image, to_pil

if TYPE_CHECKING:
    from .pairs import Pair

PAPER, INK = (252, 251, 248), (50, 46, 60)
SIDE, GAP, TEXT, COLUMNS = 192, 8, 40, 4


def pair_sheet(pairs: Sequence[Pair], count: int = 8) -> Image.Image:
    """The first pairs: control left, target right, the instruction below; a target alone where there is no control.

    Raises:
        ValueError: a picture that cannot be read.
    """
    pairs = pairs[:count]
    wide = any(pair.control is not None for pair in pairs)
    cell = (2 * SIDE + GAP) if wide else SIDE
    columns = min(COLUMNS // 2 if wide else COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (cell + 2 * GAP), rows * (SIDE + TEXT + 2 * GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for number, pair in enumerate(pairs):
        x, y = (
            (number % columns) * (cell + 2 * GAP) + GAP,
            (number // columns) * (SIDE + TEXT + 2 * GAP) + GAP,
        )
        shown = [path for path in (pair.control, pair.target) if path is not None]
        for index, path in enumerate(shown):
            picture = to_pil(load_image(path).image)[0]
            scale = min(SIDE / picture.width, SIDE / picture.height)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            left = x + index * (SIDE + GAP) + (SIDE - size[0]) // 2
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, y + (SIDE - size[1]) // 2))
        words = textwrap.wrap(pair.caption, cell // 7)
        if len(words) > 2:
            words = [words[0], words[1][:-1] + "…"]
        draw.multiline_text((x, y + SIDE + 4), "\n".join(words), fill=INK, font=font)
    return sheet
