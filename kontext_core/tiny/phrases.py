"""Instructions and captions in many phrasings, from short templates and a limited vocabulary.

A template's `(a|b|c)` stands for one of its alternatives, possibly nested, possibly empty; `{name}` is filled
in. So a dozen templates are hundreds of phrasings.
"""

from __future__ import annotations

import re

from .dice import Dice
from .scene import Creature, Look, Scene, Thing

_INNERMOST = re.compile(r"\(([^()]*)\)")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "recolour": (
        "(make|paint|colour|turn) {the} {new}",
        "(change|switch) the colour of {the} to {new}",
        "(change|turn) {the} (from {old} |)to {new}",
        "{the} should be {new}( now| instead|)",
        "give {the} a {new} colour",
        "(I want|let) {the} (to |)be {new}",
        "recolour {the} (in|to) {new}",
    ),
    "remove": (
        "(remove|delete|erase|take away) {the}( from the picture| from the scene|)",
        "(get rid of|take out|drop) {the}",
        "{the} should (be gone|disappear|not be there)",
        "make {the} (disappear|vanish|go away)",
        "(show|draw) the (same |)(scene|picture) without {the}",
        "there should be no {bare}",
    ),
    "add": (
        "(add|put|place|draw|insert) {a} {where}",
        "{where} (add|put|place|draw) {a}",
        "(I want|I would like|there should be) {a} {where}",
        "(add|put) {a} to the (picture|scene)( ,|) {where}",
        "let {a} appear {where}",
    ),
    "replace": (
        "replace {the} (with|by) {a}",
        "(turn|change|transform|make) {the} into {a}",
        "(swap|exchange) {the} for {a}",
        "put {a} (where {the} is|in place of {the}|instead of {the})",
        "{the} should (become|be) {a}( instead|)",
        "(remove|take away) {the} and put {a} there",
    ),
    "move": (
        "(move|shift|slide|bring|push) {the} to the {side}( side|)( of the picture|)",
        "(put|place) {the} on the {side}( side|)( instead|)",
        "{the} should be on the {side}( side|)",
        "(let|make) {the} go to the {side}",
    ),
    "move middle": (
        "(move|shift|slide|bring|push) {the} to the (middle|centre)( of the picture|)",
        "(put|place) {the} in the (middle|centre)( instead|)",
        "{the} should be in the (middle|centre)",
        "centre {the}",
    ),
    "bigger": (
        "make {the} (bigger|larger|big|grow)",
        "(enlarge|grow) {the}",
        "{the} should be (bigger|larger)",
        "(increase the size of|scale up) {the}",
    ),
    "smaller": (
        "make {the} (smaller|small|shrink)",
        "shrink {the}",
        "{the} should be (smaller|little)",
        "(decrease|reduce) the size of {the}",
        "scale down {the}",
    ),
    "background": (
        "(change|switch|set|turn) the (background|place|scenery) to {scenery}",
        "(replace|swap) the background with {scenery}",
        "(put|place|show) (everything|the scene|all of it|the objects) {at}",
        "make it {scenery} (instead|in the background)",
        "(let|make) the scene (be|happen) {at}",
        "the background should be {scenery}",
    ),
    "time": (
        "(make|turn) it {time}",
        "(change|set|switch) the time( of day|) to {time}",
        "(show|draw) the (same |)(scene|picture) {when}",
        "(change|turn) the (scene|picture|lighting) to {time}",
        "it should be {time}( now| instead|)",
        "what (does|would) (it|this) look like {when}",
    ),
    "weather rain": (
        "(make it rain|let it rain|add (some |)rain|make it rainy|it should rain|it starts to rain)( now|)",
        "(change|set|turn) the weather to (rain|rainy)",
        "(show|draw) the (scene|picture) in the rain",
        "(a rainy day|rainy weather) please",
    ),
    "weather snow": (
        "(make it snow|let it snow|add (some |)falling snow|make it snowy|it should snow|it starts to snow)( now|)",
        "(change|set|turn) the weather to (snow|snowy|snowfall)",
        "(show|draw) the (scene|picture) while it snows",
        "let snow (fall|come down)",
    ),
    "weather fog": (
        "(make it foggy|let fog come in|add (some |)fog|cover (it|the scene) in fog|make it misty|add mist)( now|)",
        "(change|set|turn) the weather to (fog|foggy)",
        "(show|draw) the (scene|picture) in (the fog|mist)",
        "fill the (scene|picture) with fog",
    ),
    "weather clear": (
        "(make the weather clear|clear (up |)the weather|make the sky clear)( now|)",
        "(change|set|turn) the weather to (clear|fine|good)",
        "(stop|remove|take away) the {bad}",
        "no more {bad}",
        "{bad} should (stop|go away)",
    ),
    "grade": (
        "(make|turn|convert) (it|the picture|the image|everything) {grade}",
        "(give|show) (it|the picture) (in |){grade} (colours|tones)",
        "(change|switch) the (palette|colours) to {grade}",
        "(apply|use|add) a {grade} (palette|filter|look|effect)",
    ),
    "replace word": (
        '(replace|swap) "{old}" (with|by) "{new}"( on the {sign}|)',
        '(change|turn|edit) "{old}" (to|into) "{new}"( on the {sign}|)',
        '(change|set) the (word|text|sign) to "{new}"',
        'the {sign} should (say|read) "{new}"( instead of "{old}"| now|)',
        '(write|put) "{new}" (instead of|in place of) "{old}"',
        'make the {sign} (say|read) "{new}"',
    ),
    "add word": (
        '(write|put|add|paint|print) "{new}" on the {sign}{ink}',
        '(add|put) the word "{new}" (to|on) the {sign}{ink}',
        'the {sign} should (say|read) "{new}"{ink}',
        '(make|let) the {sign} say "{new}"{ink}',
        '(fill|label) the {sign} with "{new}"{ink}',
    ),
    "recolour word": (
        "(make|paint|colour|turn) the (letters|word|text|writing)( on the {sign}|) {new}",
        "(change|switch) the colour of the (letters|word|text|writing) to {new}",
        'make "{old}" {new}',
        'write "{old}" in {new}',
        "the (letters|word|text) should be {new}",
        "use {new} letters( on the {sign}|)",
    ),
    "style": (
        "(using|in|with|copy) this style , {content}",
        "(draw|make|paint|show|create) {content} in (this|the same|that) style",
        "{content} , in (this|the same) style",
        "(use|take|keep|copy) (this|the) style (for|and draw) {content}",
        "same (style|look) , (new picture|but) : {content}",
    ),
    "character": (
        "(show|draw|put|place) this (creature|character|animal|monster|little one) {setting}",
        "this (creature|character|monster) {setting}",
        "(the same|same) (creature|character|monster) {setting}",
        "(make|create) a picture of this (creature|character|monster) {setting}",
        "(keep|take) this (creature|character) and (show|draw|put) it {setting}",
    ),
}
_POLITE = ("please {}", "{} please", "can you {}", "could you {}", "now {}", "{} .")
_KEEP = (
    "{} , keep the rest",
    "{} and keep everything else",
    "{} , (change|touch) nothing else",
    "{} (but|and) leave the rest (as it is|alone)",
)

SCENERY = {
    "meadow": ("a meadow", "a green meadow", "grassy hills"),
    "beach": ("a beach", "the beach", "a sandy beach"),
    "desert": ("a desert", "the desert", "a dry desert"),
    "snow": ("a snowy field", "a snow field", "a snowy landscape"),
    "forest": ("a forest", "the woods", "a pine forest"),
    "city": ("a city", "the city", "a city street"),
    "room": ("a room", "a living room", "a room with a window"),
    "mountains": ("the mountains", "a mountain landscape", "high mountains"),
}
AT = {
    "meadow": "in",
    "beach": "on",
    "desert": "in",
    "snow": "in",
    "forest": "in",
    "city": "in",
    "room": "in",
    "mountains": "in",
}
TIME_WORDS = {
    "day": ("day", "daytime", "a sunny day", "bright day"),
    "sunset": ("sunset", "evening", "dusk"),
    "night": ("night", "nighttime", "a dark night"),
}
WHEN = {
    "day": ("by day", "in daylight", "during the day"),
    "sunset": ("at sunset", "in the evening", "at dusk"),
    "night": ("at night", "by night", "in the dark"),
}
IN_WEATHER = {
    "rain": ("in the rain", "on a rainy day", "while it rains"),
    "snow": ("in falling snow", "while it snows", "in a snowfall"),
    "fog": ("in the fog", "in thick fog", "in mist"),
}
GRADE_WORDS = {
    "black and white": ("black and white", "grey", "colourless"),
    "sepia": ("sepia", "brown sepia"),
    "warm": ("warm", "warmer", "warm orange"),
    "cool": ("cool", "cooler", "cold blue"),
    "pastel": ("pastel", "soft pastel", "pale pastel"),
}
WHERE = {
    "upper left": ("in the upper left", "at the top left", "in the top left corner"),
    "upper middle": ("in the upper middle", "at the top in the middle", "at the top centre"),
    "upper right": ("in the upper right", "at the top right", "in the top right corner"),
    "lower left": ("in the lower left", "at the bottom left", "in the bottom left corner"),
    "lower middle": ("in the lower middle", "at the bottom in the middle", "at the bottom centre"),
    "lower right": ("in the lower right", "at the bottom right", "in the bottom right corner"),
}
SIGN_WORDS = {
    "billboard": ("sign", "billboard", "board"),
    "shop": ("sign", "shop sign", "hanging sign"),
    "poster": ("sign", "poster", "board"),
}
LOOK_WORDS = {
    "outline": ("cartoon with thick outlines", "drawing with bold outlines"),
    "mosaic": ("pixel mosaic", "mosaic of squares"),
    "hatching": ("hatched drawing", "ink drawing with hatching"),
    "watercolour": ("watercolour", "soft watercolour painting"),
    "duotone": ("duotone print", "two tone print"),
    "halftone": ("halftone print", "picture of dots"),
    "neon": ("neon drawing", "glowing neon picture"),
    "sketch": ("pencil sketch", "line sketch"),
}

_POSE_WORDS = {
    "standing": ("standing",),
    "waving": ("waving", "waving a hand"),
    "jumping": ("jumping", "jumping up"),
    "sleeping": ("sleeping", "asleep"),
}


def expand(dice: Dice, template: str) -> str:
    """One phrasing of a template's alternatives; `{fields}` stay."""
    while True:
        match = _INNERMOST.search(template)
        if match is None:
            return " ".join(template.split())
        template = template[: match.start()] + dice.pick(match.group(1).split("|")) + template[match.end() :]


LIMIT = 40


def tokens(text: str) -> float:
    """A generous estimate of a text's tokens: capitals one each, words 1.3, marks one. At most LIMIT is used."""
    capitals = len(re.findall(r"[A-Z]", text))
    return capitals + 1.3 * len(re.findall(r"[a-z]+", text)) + len(re.findall(r"[^A-Za-z\s]", text))


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def tidy(text: str) -> str:
    """Spaces before commas, colons and full stops taken away."""
    return re.sub(r"\s+([,:.])", r"\1", " ".join(text.split()))


def phrase(dice: Dice, kind: str, *, frame: bool = False, **fields: str) -> str:
    """An instruction of this kind.

    Args:
        dice: chooses the phrasing.
        kind: a key of TEMPLATES.
        frame: whether "please" or "keep the rest" may be wrapped around it.
        fields: what the templates name.
    """
    text = expand(dice, dice.pick(TEMPLATES[kind])).format(**fields)
    if frame:
        roll = dice.unit()
        if roll < 0.12:
            text = dice.pick(_POLITE).format(text)
        elif roll < 0.22:
            text = expand(dice, dice.pick(_KEEP)).format(text)
    return tidy(text)


def reference(dice: Dice, things: tuple[Thing, ...], index: int) -> str:
    """A noun phrase, without article, that only this one of the things answers to."""
    thing = things[index]
    ways = {thing.name: 0.62}
    if sum(other.shape == thing.shape for other in things) == 1:
        ways[thing.shape] = 0.2
    if sum(other.colour == thing.colour for other in things) == 1:
        ways[f"{thing.colour} {dice.pick(('thing', 'object'))}"] = 0.08
    ways[f"{dice.pick(('thing', 'object'))} {dice.pick(WHERE[thing.place])}"] = 0.1
    return dice.weighted(ways)


def places_named(text: str, thing: Thing) -> list[str]:
    """The place that a text names for a thing, alone in a list; an empty one where it names none."""
    return [place for place, ways in WHERE.items() for where in ways if f"{thing.name} {where}" in text]


def signs_named(text: str) -> list[str]:
    """The kinds of sign that a caption's word for it may mean."""
    nouns = sorted({noun for nouns in SIGN_WORDS.values() for noun in nouns}, key=len, reverse=True)
    noun = next(noun for noun in nouns if f" {noun} " in f" {text} ")
    return [kind for kind, words in SIGN_WORDS.items() if noun in words]


def scenery(dice: Dice, background: str) -> str:
    return dice.pick(SCENERY[background])


def setting(dice: Dice, scene: Scene) -> str:
    """Where, when and in which weather: "on a beach at night"."""
    parts = [f"{AT[scene.background]} {scenery(dice, scene.background)}"]
    if scene.time != "day":
        parts.append(dice.pick(WHEN[scene.time]))
    if scene.weather != "clear":
        parts.append(dice.pick(IN_WEATHER[scene.weather]))
    return " ".join(parts)


def listed(names: list[str]) -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def things_listed(dice: Dice, things: tuple[Thing, ...]) -> str:
    """The things with articles; two of them may be "next to" each other, or all of them placed."""
    names = [a(thing.name) for thing in dice.shuffled(things)]
    if len(names) == 2 and dice.chance(0.4):
        return f"{names[0]} {dice.pick(('next to', 'beside', 'with'))} {names[1]}"
    if len(things) <= 2 and dice.chance(0.3):
        return listed([f"{a(thing.name)} {dice.pick(WHERE[thing.place])}" for thing in things])
    return listed(names)


def creature_words(dice: Dice, creature: Creature) -> str:
    """The creature described: "a tall blue creature with horns, one eye, stripes and a red hat"."""
    parts = [creature.top, creature.eyes]
    if creature.pattern != "plain":
        parts.append("a pale belly" if creature.pattern == "belly" else creature.pattern)
    if creature.wear != "nothing":
        parts.append(a(f"{creature.wear_colour} {creature.wear}"))
    noun = dice.pick(("creature", "monster"))
    return f"{a(f'{creature.body} {creature.colour} {noun}')} with {listed(parts)}"


def pose_words(dice: Dice, pose: str) -> str:
    return dice.pick(_POSE_WORDS[pose])


def look_words(dice: Dice, look: Look) -> str:
    return f"{look.tone} {dice.pick(LOOK_WORDS[look.name])}"


def caption(dice: Dice, scene: Scene) -> str:
    """What a picture shows, in one short sentence."""
    where = setting(dice, scene)
    if scene.creature is not None:
        who = creature_words(dice, scene.creature)
        beside = f" next to {a(scene.things[0].name)}" if scene.things else ""
        pose = f" {pose_words(dice, scene.creature.pose)}" if scene.creature.pose != "standing" else ""
        text = f"{who}{pose}{beside} {where}"
    elif scene.sign is not None:
        sign = f"{a(scene.sign.board)} {dice.pick(SIGN_WORDS[scene.sign.kind])}"
        said = (
            f' that (says|reads) "{scene.sign.word}" in {scene.sign.ink}'
            if scene.sign.word
            else " without words"
        )
        others = f" with {things_listed(dice, scene.things)}" if scene.things else ""
        text = expand(dice, f"{sign}{said}{others} {where}")
    else:
        text = f"{things_listed(dice, scene.things)} {where}"
    if scene.grade != "none":
        text = f"{text} in {scene.grade} colours"
    if scene.look.name != "flat":
        style = look_words(dice, scene.look)
        text = f"{a(style)} of {text}" if dice.chance(0.6) else f"{text} as {a(style)}"
    return tidy(text)
