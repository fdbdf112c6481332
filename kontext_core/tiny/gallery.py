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
    ("global", "background"),
    ("global", "time"),
    ("global", "weather"),
    ("global", "grade"),
)
_SCALE, _GAP, _TEXT = 1.5, 10, 44


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
    """Columns of before, after and the instruction."""
    side = round(128 * _SCALE)
    sheet = Image.new(
        "RGB", (len(chosen) * (side + _GAP) + _GAP, 2 * side + 3 * _GAP + _TEXT), (252, 251, 248)
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for column, (example, picture) in enumerate(chosen):
        x = _GAP + column * (side + _GAP)
        for row, pixels in enumerate((example.context, picture)):
            scaled = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (x, _GAP + row * (side + _GAP)))
        words = "\n".join(textwrap.wrap(example.instruction, 28)[:2])
        draw.multiline_text((x + 2, 2 * side + 3 * _GAP), words, fill=(50, 46, 60), font=font, spacing=2)
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
