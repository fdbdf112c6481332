"""Scenes and edits at random: one `draft_*` function a category, each giving scenes and an instruction.

Every edit is a change of the scene, so its result is known exactly. Local, global and text instructions have
one answer: places, sizes and letter colours that the words do not give are those of the context, or the
world's only ones (an added thing has `THING_SIZE` and stands exactly on its place; a moved one keeps its
height; "bigger" is `BIGGER` times). Style, character and generation leave the layout open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from . import holdout, phrases, words
from .dice import Dice
from .figures import CREATURE_XS
from .scene import (
    AIR_SHAPES,
    BACKGROUNDS,
    BIGGER,
    BOARD_INKS,
    BOARDS,
    BODIES,
    COLOURS,
    COLUMNS,
    EYES,
    GRADES,
    GROUND_SHAPES,
    LOOKS,
    PATTERNS,
    PLACES,
    POSES,
    SIGNS,
    SMALLER,
    TONES,
    TOPS,
    WEARS,
    WEATHERS,
    Creature,
    Look,
    Scene,
    Sign,
    Thing,
    slot,
)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An example before it is drawn. `focus`: the combinations at the heart of what is asked."""

    kind: str
    before: Scene | None
    after: Scene
    instruction: str
    focus: frozenset[holdout.Combination]


def _thing_focus(*things: Thing) -> frozenset[holdout.Combination]:
    return frozenset(("thing", thing.shape, thing.colour) for thing in things)


def _air(place: str) -> bool:
    return PLACES[place][1]


def new_thing(dice: Dice, place: str, taken: set[str], exact: bool = False) -> Thing:
    """A thing at a place, its colour and shape together not taken; `exact`: no jitter, the usual size."""
    x, y, air = slot(place)
    while True:
        shape, colour = dice.pick(AIR_SHAPES if air else GROUND_SHAPES), dice.pick(tuple(COLOURS))
        if f"{colour} {shape}" not in taken:
            break
    if exact:
        return Thing(shape=shape, colour=colour, x=x, y=y, air=air)
    return Thing(
        shape=shape,
        colour=colour,
        x=x + dice.uniform(-0.02, 0.02),
        y=y + (dice.uniform(-0.03, 0.03) if air else dice.uniform(-0.03, 0.015)),
        size=dice.uniform(0.28, 0.34),
        air=air,
    )


def setting(dice: Dice, *, plain: float = 0.5) -> Scene:
    """An empty scene; with chance `plain` a clear day, else any time or weather."""
    background = dice.pick(BACKGROUNDS)
    time, weather = "day", "clear"
    if not dice.chance(plain):
        time = dice.weighted({"day": 0.4, "sunset": 0.3, "night": 0.3})
        if background != "room" and dice.chance(0.5):
            weather = dice.pick(WEATHERS[1:])
    return Scene(
        background=background,
        time=time,
        weather=weather,
        horizon=dice.uniform(0.56, 0.64),
        mirror=dice.chance(0.5),
    )


def with_things(dice: Dice, scene: Scene, places: list[str], exact: bool = False) -> Scene:
    """The scene with a new thing at each of these places."""
    things: list[Thing] = []
    for place in places:
        things.append(new_thing(dice, place, {thing.name for thing in things}, exact))
    return replace(scene, things=tuple(things))


def _free(scene: Scene) -> list[str]:
    return [place for place in PLACES if place not in {thing.place for thing in scene.things}]


LOCAL_KINDS = {"recolour": 1.2, "remove": 0.8, "add": 1.2, "replace": 1.4, "move": 1.1, "resize": 0.9}


def draft_local(dice: Dice) -> Draft | None:
    kind = dice.weighted(LOCAL_KINDS)
    count = dice.weighted({2: 0.3, 3: 0.45, 4: 0.25})
    return local_edit(
        dice, kind, with_things(dice, setting(dice, plain=0.6), dice.sample(list(PLACES), count))
    )


def local_edit(dice: Dice, kind: str, before: Scene, *, frame: bool = True) -> Draft | None:
    """One of LOCAL_KINDS on a scene of things; None where this scene and these draws do not allow it.

    `frame`: whether "please" or "keep the rest" may be wrapped around the words.
    """
    index = dice.below(len(before.things))
    thing = before.things[index]
    bare = phrases.reference(dice, before.things, index)
    the = f"the {bare}"
    taken = {other.name for other in before.things}

    if kind == "recolour":
        colours = [c for c in COLOURS if c != thing.colour and f"{c} {thing.shape}" not in taken]
        after = before.with_thing(index, colour=dice.pick(colours))
        new = after.things[index]
        text = phrases.phrase(dice, kind, frame=frame, the=the, old=thing.colour, new=new.colour)
        focus = _thing_focus(thing, new)
    elif kind == "remove":
        after = before.without_thing(index)
        text = phrases.phrase(dice, kind, frame=frame, the=the, bare=bare)
        focus = _thing_focus(thing)
    elif kind == "add":
        free = _free(before)
        if not free:
            return None
        place = dice.pick(free)
        new = new_thing(dice, place, taken, exact=True)
        after = replace(before, things=(*before.things, new))
        where = dice.pick(phrases.WHERE[place])
        text = phrases.phrase(dice, kind, frame=frame, a=phrases.a(new.name), where=where)
        focus = _thing_focus(new)
    elif kind == "replace":
        other = new_thing(dice, thing.place, taken, exact=True)
        if other.shape == thing.shape:
            return None
        after = before.with_thing(index, shape=other.shape, colour=other.colour)
        text = phrases.phrase(dice, kind, frame=frame, the=the, a=phrases.a(other.name))
        focus = _thing_focus(thing, other)
    elif kind == "move":
        columns = [PLACES[place][0] for place in _free(before) if _air(place) == thing.air]
        if not columns:
            return None
        column = dice.pick(columns)
        after = before.with_thing(index, x=COLUMNS[column])
        name = "move middle" if column == 1 else "move"
        text = phrases.phrase(dice, name, frame=frame, the=the, side=("left", "middle", "right")[column])
        focus = _thing_focus(thing)
    else:
        bigger = dice.chance(0.5)
        column = PLACES[thing.place][0]
        beside = [o for o in before.things if o.air == thing.air and abs(PLACES[o.place][0] - column) == 1]
        if bigger and (thing.size > 0.315 or beside):
            return None
        after = before.with_thing(index, size=thing.size * (BIGGER if bigger else SMALLER))
        name = "bigger" if bigger else "smaller"
        kind = name
        text = phrases.phrase(dice, name, frame=frame, the=the)
        focus = _thing_focus(thing)
    return Draft(kind=kind, before=before, after=after, instruction=text, focus=focus)


SEVERAL_KINDS = {"recolour": 1.2, "remove": 0.4, "add": 1.4, "replace": 1.6, "move": 0.5, "resize": 0.3}
SEVERAL_LIMIT = 30
"""Most tokens of the edits of one instruction together: 32 then hold it, as they hold all other instructions."""


def draft_several(dice: Dice) -> Draft | None:
    """Two or three local edits in one instruction, each of another thing: for training, where one picture then shows
    two or three times as much of what words mean. Words name things as they are when their turn comes."""
    count = dice.weighted({2: 0.25, 3: 0.45, 4: 0.3})
    before = with_things(dice, setting(dice, plain=0.6), dice.sample(list(PLACES), count))
    scene, texts, kinds = before, [], []
    focus: frozenset[holdout.Combination] = frozenset()
    untouched = set(before.things)
    for _ in range(dice.weighted({2: 0.6, 3: 0.4})):
        if not scene.things:
            return None
        draft = local_edit(dice, dice.weighted(SEVERAL_KINDS), scene, frame=False)
        if draft is None:
            return None
        changed = set(scene.things) - set(draft.after.things)
        if not changed <= untouched:
            return None
        untouched -= changed
        scene, focus = draft.after, focus | draft.focus
        texts.append(draft.instruction)
        kinds.append(draft.kind)
    if not scene.things or sum(map(phrases.tokens, texts)) > SEVERAL_LIMIT:
        return None
    joints = [dice.pick((" and ", ", then ", ", ")) for _ in texts[1:-1]]
    joints.append(dice.pick((" and ", ", then ", " and then ")))
    text = texts[0] + "".join(joint + part for joint, part in zip(joints, texts[1:], strict=True))
    return Draft(kind=" + ".join(kinds), before=before, after=scene, instruction=text, focus=focus)


def draft_global(dice: Dice) -> Draft | None:
    kind = dice.weighted({"background": 0.38, "time": 0.22, "weather": 0.2, "grade": 0.2})
    count = dice.weighted({1: 0.3, 2: 0.4, 3: 0.3})
    before = with_things(dice, setting(dice, plain=0.55), dice.sample(list(PLACES), count))
    if kind == "background":
        background = dice.pick([b for b in BACKGROUNDS if b != before.background])
        if background == "room" and before.weather != "clear":
            return None
        after = replace(before, background=background)
        at = f"{phrases.AT[background]} {phrases.scenery(dice, background)}"
        text = phrases.phrase(dice, kind, frame=True, scenery=phrases.scenery(dice, background), at=at)
        focus = {("place", background, condition) for condition in holdout.conditions(after)}
    elif kind == "time":
        time = dice.pick([t for t in phrases.WHEN if t != before.time])
        after = replace(before, time=time)
        text = phrases.phrase(
            dice,
            kind,
            frame=True,
            time=dice.pick(phrases.TIME_WORDS[time]),
            when=dice.pick(phrases.WHEN[time]),
        )
        focus = {("place", before.background, time)}
    elif kind == "weather":
        if before.background == "room":
            return None
        weather = dice.pick([w for w in WEATHERS if w != before.weather])
        after = replace(before, weather=weather)
        bad = {"rain": "rain", "snow": "snowfall", "fog": "fog", "clear": ""}[before.weather]
        text = phrases.phrase(dice, f"weather {weather}", frame=True, bad=bad)
        focus = {("place", before.background, "snowfall" if weather == "snow" else weather)}
    else:
        grade = dice.pick(GRADES[1:])
        after = replace(before, grade=grade)
        text = phrases.phrase(dice, kind, frame=True, grade=dice.pick(phrases.GRADE_WORDS[grade]))
        focus = {("place", before.background, grade)}
    return Draft(kind=kind, before=before, after=after, instruction=text, focus=frozenset(focus))


def signed_scene(dice: Dice, word: str) -> Scene:
    """A scene with a sign and none to two things below it."""
    scene = setting(dice, plain=0.75)
    places = dice.sample(["lower left", "lower right"], dice.weighted({0: 0.25, 1: 0.45, 2: 0.3}))
    board = dice.pick(tuple(BOARDS))
    sign = Sign(kind=dice.pick(SIGNS), board=board, word=word, ink=dice.pick(BOARD_INKS[board]))
    return replace(with_things(dice, scene, places), sign=sign)


def draft_text(dice: Dice) -> Draft | None:
    kind = dice.weighted({"replace word": 0.55, "add word": 0.25, "recolour word": 0.2})
    old, new = words.word(dice), words.word(dice)
    if old == new:
        return None
    before = signed_scene(dice, "" if kind == "add word" else old)
    sign = before.sign
    assert sign is not None
    fields = {"old": old, "new": new, "sign": dice.pick(phrases.SIGN_WORDS[sign.kind])}
    focus = frozenset(holdout.bigrams(new))
    if kind == "replace word":
        after = replace(before, sign=replace(sign, word=new))
    elif kind == "add word":
        usual = BOARD_INKS[sign.board][0]
        ink = dice.pick(BOARD_INKS[sign.board]) if dice.chance(0.7) else usual
        after = replace(before, sign=replace(sign, word=new, ink=ink))
        named = phrases.expand(dice, f"(in {ink}|in {ink} letters)")
        fields["ink"] = "" if ink == usual and dice.chance(0.5) else f" {named}"
        before = replace(before, sign=replace(sign, ink=usual))
    else:
        ink = dice.pick([i for i in BOARD_INKS[sign.board] if i != sign.ink])
        after = replace(before, sign=replace(sign, ink=ink))
        fields["new"] = ink
        focus = frozenset(holdout.bigrams(old))
    text = phrases.phrase(dice, kind, frame=True, **fields)
    return Draft(kind=kind, before=before, after=after, instruction=text, focus=focus)


def _unseen(scene: Scene) -> bool:
    """White things vanish on the light papers of most looks."""
    return any(thing.colour == "white" for thing in scene.things)


def any_look(dice: Dice) -> Look:
    """Any look but the plain one."""
    return Look(name=dice.pick(LOOKS[1:]), tone=dice.pick(tuple(TONES)))


def draft_style(dice: Dice) -> Draft | None:
    look = any_look(dice)
    before = setting(dice, plain=0.8)
    before = replace(with_things(dice, before, dice.sample(list(PLACES), 1 + dice.below(3))), look=look)
    count = dice.weighted({1: 0.4, 2: 0.45, 3: 0.15})
    after = with_things(dice, setting(dice, plain=0.85), dice.sample(list(PLACES), count))
    after = replace(after, look=look)
    if _unseen(after):
        return None
    content = phrases.caption(dice, replace(after, look=Look()))
    text = phrases.phrase(dice, "style", content=content)
    return Draft(
        kind=look.name, before=before, after=after, instruction=text, focus=_thing_focus(*after.things)
    )


def any_creature(dice: Dice) -> Creature:
    """A creature standing in the middle."""
    colour = dice.pick(tuple(COLOURS))
    return Creature(
        body=dice.pick(BODIES),
        colour=colour,
        eyes=dice.pick(EYES),
        top=dice.pick(TOPS),
        pattern=dice.pick(PATTERNS),
        wear=dice.pick(WEARS),
        wear_colour=dice.pick([c for c in COLOURS if c != colour]),
    )


def creature_scene(dice: Dice, creature: Creature, *, plain: float, friend: float) -> Scene:
    """The creature in a new scene, beside a thing with chance `friend`."""
    scene = setting(dice, plain=plain)
    left, middle, right = CREATURE_XS
    if dice.chance(friend):
        beside = dice.chance(0.5)
        thing = new_thing(dice, "lower left" if beside else "lower right", set(), exact=True)
        return replace(scene, creature=replace(creature, x=right if beside else left), things=(thing,))
    return replace(scene, creature=replace(creature, x=dice.pick((left, middle, middle, right))))


def draft_character(dice: Dice) -> Draft | None:
    creature = any_creature(dice)
    before = creature_scene(dice, creature, plain=0.9, friend=0.15)
    pose = dice.weighted({"standing": 0.4, "waving": 0.2, "jumping": 0.2, "sleeping": 0.2})
    after = creature_scene(dice, replace(creature, pose=pose), plain=0.55, friend=0.4)
    if after.background == before.background:
        return None
    if before.background == "room" and creature.top == "horns":
        return None  # cream horns before a cream wall: the reference would not show them
    parts = [phrases.setting(dice, after)]
    if after.things:
        parts.append(f"{dice.pick(('next to', 'beside'))} {phrases.a(after.things[0].name)}")
    if dice.chance(0.5):
        parts.reverse()
    if pose != "standing":
        parts.insert(0, phrases.pose_words(dice, pose))
    text = phrases.phrase(dice, "character", setting=" ".join(parts))
    focus = frozenset([("creature", creature.top, creature.colour)])
    kind = pose if pose != "standing" else "scene"
    return Draft(kind=kind, before=before, after=after, instruction=text, focus=focus)


def draft_generate(dice: Dice) -> Draft | None:
    kind = dice.weighted({"things": 0.4, "sign": 0.2, "creature": 0.25, "look": 0.15})
    if kind == "sign":
        after = signed_scene(dice, words.word(dice))
        assert after.sign is not None
        focus = frozenset(holdout.bigrams(after.sign.word))
    elif kind == "creature":
        creature = replace(any_creature(dice), pose=dice.pick(POSES))
        after = creature_scene(dice, creature, plain=0.6, friend=0.3)
        focus = frozenset([("creature", creature.top, creature.colour)])
    else:
        count = dice.weighted({1: 0.35, 2: 0.4, 3: 0.25})
        after = with_things(dice, setting(dice, plain=0.5), dice.sample(list(PLACES), count))
        if kind == "look":
            after = replace(after, look=any_look(dice))
            if _unseen(after):
                return None
        elif dice.chance(0.08):
            after = replace(after, grade=dice.pick(GRADES[1:]))
        focus = _thing_focus(*after.things)
    return Draft(kind=kind, before=None, after=after, instruction=phrases.caption(dice, after), focus=focus)


DRAFTS: dict[str, Callable[[Dice], Draft | None]] = {
    "local": draft_local,
    "global": draft_global,
    "text": draft_text,
    "style": draft_style,
    "character": draft_character,
    "generate": draft_generate,
    "several": draft_several,
}
TRAINING_ONLY = ("several",)
"""Categories that are no part of the benchmark."""
