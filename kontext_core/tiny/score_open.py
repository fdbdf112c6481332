"""Scores of edits with many right answers: style, character and text to image. Properties, never pixels.

*Content* (done): the background, time and weather asked for are nearer than every other (`SETTING_LEAD`); each
thing asked for is there, in its shape and colour, and where a place was named, in that place.

*Style* (kept): the picture's look lies near the reference's in the space of `look_measures`: both nearest to the
same look's centre and no further apart than `SAME_LOOK`, or closer than `TWIN_LOOK`; and no other ink and paper
explain it clearly better (`TONE_SLACK`).

*Plain pictures* (kept): as crisp (`CRISP`) and as free of noise (`GRAIN`) as the world draws them.

*Character*: the creature is looked for in the picture; kept if its body, colour, eyes, ears, pattern and
accessory are each nearer to the truth than to every alternative (`PART_LEAD`), done if its pose is, and the scene's
content is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from . import phrases
from .figures import CREATURE_XS
from .find import COLOURLESS, CONFUSED, GREY, PRESENT, Found, Search, cells, find_thing, setting_distance
from .look_measures import look_space
from .measures import as_floats, crispness, grain
from .scene import (
    BACKGROUNDS,
    BODIES,
    EYES,
    GRADES,
    PATTERNS,
    PLACES,
    POSES,
    TIMES,
    TONES,
    TOPS,
    WEARS,
    WEATHERS,
    Creature,
    Scene,
)
from .score_words import read_sign
from .world import Example

SETTING_LEAD = 0.02
PALE_SLACK = 0.06  # looks without colours tell backgrounds in a weather hardly apart
SAME_LOOK = 15.0
TWIN_LOOK = 6.0
TONE_SLACK = -0.08
PART_LEAD = 0.20
CRISP = 0.40  # of the truth's steepest edges; a blur of one pixel leaves 0.65, of three 0.25
GRAIN = 0.04  # a truth has 0.01, noise of a tenth 0.09
CREATURE_REACH = 8


def setting_lead(picture: np.ndarray, scene: Scene) -> float:
    """By how much the asked background, time, weather and palette beat the best other, -1 to 1."""
    size = (picture.shape[1], picture.shape[0])
    seen = cells(picture)
    own = setting_distance(seen, scene, size)
    rivals: list[dict[str, str]] = [{"background": b} for b in BACKGROUNDS if b != scene.background]
    rivals += [{"time": t} for t in TIMES if t != scene.time]
    if scene.background != "room" and scene.look.name not in COLOURLESS:
        rivals += [{"weather": w} for w in WEATHERS if w != scene.weather]
    if scene.look.name == "flat":
        rivals += [{"grade": g} for g in GRADES if g != scene.grade]
    other = min(setting_distance(seen, scene, size, **rival) for rival in rivals)
    return (other - own) / max(other + own, 1e-9)


def _found_all(search: Search, scene: Scene, text: str) -> list[Found]:
    """What became of each thing asked for; stops at the first that is missing."""
    found: list[Found] = []
    for thing in scene.things:
        taken = {other.place for other in found}
        free = [place for place in (phrases.places_named(text, thing) or PLACES) if place not in taken]
        found.append(find_thing(search, thing, scene, free or list(PLACES)))
        if not found[-1].right:
            break
    return found


@dataclass(frozen=True, kw_only=True)
class Content:
    """Whether a scene's setting and things are in a picture."""

    setting: float
    found: list[Found]

    @property
    def right(self) -> bool:
        return self.setting >= SETTING_LEAD and all(found.right for found in self.found)

    @property
    def measures(self) -> dict[str, float]:
        out = {"setting_lead": self.setting}
        if self.found:
            out["thing_present"] = max(found.present for found in self.found)
            out["thing_shape"] = min(found.shape for found in self.found)
            out["thing_colour"] = min(found.colour for found in self.found)
        return out


def content_of(picture: np.ndarray, example: Example) -> Content:
    """Looks for the target scene's setting and things."""
    scene = example.truth.after
    setting = setting_lead(picture, scene)
    if scene.look.name in COLOURLESS:
        setting += PALE_SLACK
    # Nothing is looked for in the wrong scene: the answer is no already, and a search is slow.
    found = _found_all(Search(picture), scene, example.instruction) if setting >= SETTING_LEAD else []
    return Content(setting=setting, found=found)


def tone_lead(picture: np.ndarray, scene: Scene) -> float:
    """By how much the asked ink and paper beat the best others; near 0 in looks that hardly show them."""
    size = (picture.shape[1], picture.shape[0])
    seen = cells(picture)
    own = setting_distance(seen, scene, size)
    others = [replace(scene.look, tone=tone) for tone in TONES if tone != scene.look.tone]
    other = min(setting_distance(seen, scene, size, look=look) for look in others)
    return (other - own) / max(other + own, 1e-9)


def style_kept(picture: np.ndarray, example: Example) -> tuple[bool, dict[str, float]]:
    """Whether the picture has the reference's look."""
    space = look_space()
    reference = space.place(as_floats(example.context))
    point = space.place(picture)
    distance = float(np.linalg.norm(reference - point))
    same = space.nearest(point) == space.nearest(reference)
    tone = tone_lead(picture, example.truth.after)
    kept = (distance <= TWIN_LOOK or (same and distance <= SAME_LOOK)) and tone >= TONE_SLACK
    return kept, {"look_distance": distance, "look_same": float(same), "tone_lead": tone}


def cleanly_drawn(picture: np.ndarray, example: Example) -> tuple[bool, dict[str, float]]:
    """Whether a plain picture is as crisp and as free of noise as the world's are."""
    crisp, noise = crispness(picture, as_floats(example.target)), grain(picture)
    return crisp >= CRISP and noise <= GRAIN, {"crisp": crisp, "grain": noise}


def _other_creatures(creature: Creature, grade: str) -> Iterator[tuple[str, Creature]]:
    """The creature with one part another, and the part's name."""
    choices = {"body": BODIES, "eyes": EYES, "top": TOPS, "pattern": PATTERNS, "wear": WEARS, "pose": POSES}
    for part, values in choices.items():
        for value in values:
            if value != getattr(creature, part):
                yield part, replace(creature, **{part: value})
    if grade in GREY:
        return
    for colour in CONFUSED[creature.colour]:
        yield "colour", replace(creature, colour=colour)
    if creature.wear != "nothing":
        for colour in CONFUSED[creature.wear_colour]:
            yield "wear_colour", replace(creature, wear_colour=colour)


def creature_leads(picture: np.ndarray, scene: Scene) -> dict[str, float]:
    """Finds a scene's creature and compares each of its parts with the alternatives.

    Returns:
        "present": squared distance to its drawing over that to the scene without it; and for each part and the
        pose, by how much the truth beats the best alternative, -1 to 1.
    """
    creature = scene.creature
    assert creature is not None
    search = Search(picture, 1.0)
    bare = replace(scene, things=(), sign=None)
    options = []
    for x in CREATURE_XS:
        placed = replace(creature, x=x)
        options.append((str(x), replace(bare, creature=placed), placed))
    match = search.best(options, CREATURE_REACH)
    leads = {"present": search.presence(match, replace(bare, creature=None))}
    if leads["present"] > PRESENT:
        return leads
    own = match.scene.creature
    assert own is not None
    for part, other in _other_creatures(own, scene.grade):
        lead = search.lead(match, replace(match.scene, creature=other), roam=False)
        leads[part] = min(leads.get(part, 1.0), lead)
    return leads


def creature_kept(leads: dict[str, float]) -> tuple[bool, bool]:
    """(its identity is right, its pose is right)."""
    parts = [lead for part, lead in leads.items() if part not in ("present", "pose")]
    there = leads["present"] <= PRESENT
    return there and min(parts) >= PART_LEAD, there and leads["pose"] >= PART_LEAD


def sign_right(picture: np.ndarray, scene: Scene, text: str) -> bool:
    """Whether the word can be read on a sign of any kind that the words allow."""
    sign = scene.sign
    assert sign is not None
    versions = [replace(scene, sign=replace(sign, kind=kind)) for kind in phrases.signs_named(text)]
    return any(read_sign(picture, version).right for version in versions)
