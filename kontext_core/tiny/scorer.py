"""The scorer: whether an edit was done and the rest kept, judged from the picture alone.

`score(example, picture)` knows the example's truth and looks at nothing but pixels. See `score_unique` for edits
with one right answer (local, global, text), `score_open` for those with many (style, character, generate), and
their tests for the shares of right, worn, unchanged and wrong pictures that pass.
"""

from __future__ import annotations

import numpy as np

from . import score_open
from .look_measures import look_space
from .measures import as_floats
from .score_unique import Score, score_global, score_local, score_text
from .world import Example

__all__ = ["Score", "score"]


def _style(example: Example, picture: np.ndarray) -> Score:
    content = score_open.content_of(picture, example)
    kept, measures = score_open.style_kept(picture, example)
    return Score(done=content.right, kept=kept, measures=measures | content.measures)


def _character(example: Example, picture: np.ndarray) -> Score:
    leads = score_open.creature_leads(picture, example.truth.after)
    identity, pose = score_open.creature_kept(leads)
    content = score_open.content_of(picture, example)
    clean, cleanness = score_open.cleanly_drawn(picture, example)
    return Score(
        done=pose and content.right, kept=identity and clean, measures=leads | content.measures | cleanness
    )


def _generate(example: Example, picture: np.ndarray) -> Score:
    """Done: all that the caption names is there. Kept: it is drawn in the look that the caption names."""
    scene = example.truth.after
    content = score_open.content_of(picture, example)
    done, measures = content.right, dict(content.measures)
    if scene.creature is not None:
        leads = score_open.creature_leads(picture, scene)
        done = done and all(score_open.creature_kept(leads))
        measures |= leads
    if scene.sign is not None:
        done = done and score_open.sign_right(picture, scene, example.instruction)
    if scene.look.name == "flat":
        kept, cleanness = score_open.cleanly_drawn(picture, example)
        measures |= cleanness
    else:
        space = look_space()
        measures["tone_lead"] = score_open.tone_lead(picture, scene)
        kept = space.nearest(space.place(picture)) == scene.look.name
        kept = kept and measures["tone_lead"] >= score_open.TONE_SLACK
    return Score(done=done, kept=kept, measures=measures)


def score(example: Example, picture: np.ndarray) -> Score:
    """Judges a picture as the answer to an example.

    Args:
        example: from `world.example`.
        picture: uint8 or float in [0, 1], the shape of the example's target.

    Returns:
        Score with `done` (the asked change is there), `kept` (all else is as it was; style: the reference's look;
        character: the creature), `both`, and the numbers behind them.

    Raises:
        ValueError: if the picture has another shape, dtype or range.
    """
    picture = as_floats(picture, example.target.shape)
    if example.category in ("local", "global", "text"):
        assert example.context is not None
        judge = {"local": score_local, "global": score_global, "text": score_text}[example.category]
        return judge(example, picture, as_floats(example.target), as_floats(example.context))
    return {"style": _style, "character": _character, "generate": _generate}[example.category](
        example, picture
    )
