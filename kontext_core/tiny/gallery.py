"""The picture at the top of the README: `python -m kontext_core.tiny.gallery docs/images/before_after.png`.

Edits of the test split by the bundled model, before above after, the instruction below. Only edits that the scorer
calls done and kept are shown, the first of each kind that is asked for.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..weights.load import load_model
from . import world
from .editor import model_editor
from .scorer import score

WANTED = (
    ("local", "recolour"),
    ("local", "remove"),
    ("local", "add"),
    ("local", "replace"),
    ("text", "replace word"),
    ("text", "add word"),
    ("global", "background"),
    ("global", "time"),
    ("global", "weather"),
    ("global", "grade"),
    ("character", "scene"),
    ("style", "halftone"),
)
_COLUMNS = 6
_SCALE, _GAP, _TEXT = 1.5, 10, 54


def choose(editor, category: str, kind: str, tries: int):
    """The first example of this kind whose edit is done and kept, and the edit; None when there is none."""
    for index in range(tries):
        if world.plan("test", category, index).kind != kind:
            continue
        example = world.example("test", category, index)
        (picture,) = editor([example])
        if score(example, picture).both:
            return example, picture
    return None


def gallery(chosen: list) -> Image.Image:
    """Rows of columns: before, after and the instruction."""
    side = round(128 * _SCALE)
    columns, rows = min(len(chosen), _COLUMNS), -(-len(chosen) // _COLUMNS)
    width, height = side + _GAP, 2 * side + 3 * _GAP + _TEXT
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height), (252, 251, 248))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for number, (example, picture) in enumerate(chosen):
        x, y = _GAP + number % _COLUMNS * width, number // _COLUMNS * height
        for row, pixels in enumerate((example.context, picture)):
            scaled = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (x, y + _GAP + row * (side + _GAP)))
        words = "\n".join(textwrap.wrap(example.instruction, 28)[:3])
        draw.multiline_text((x + 2, y + 2 * side + 3 * _GAP), words, fill=(50, 46, 60), font=font, spacing=2)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tries", type=int, default=200, help="examples a kind that are looked at")
    args = parser.parse_args()
    editor = model_editor(load_model("kontext-tiny"))
    chosen = [choose(editor, category, kind, args.tries) for category, kind in WANTED]
    for wanted, found in zip(WANTED, chosen, strict=True):
        if found is None:
            print(f"no right edit among {args.tries} examples: {' '.join(wanted)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    gallery([found for found in chosen if found is not None]).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
