"""Turns: instructions done one after another on one picture, with branches and second tries.

A session is a tree. Each turn names the turn it starts from, so that any of them can be branched from, or
redone with another seed, and everything else stays. Between turns the latent is handed on, which no decoding
and encoding wears out, or the picture.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from . import geometry
from .edit import edit_image
from .latents import NUM_SEEDS, seed_after

if TYPE_CHECKING:
    from .samplers import OnStep
    from .weights.load import KontextModel

FORMAT = 1
Chain = Literal["latents", "pictures"]
CHAINS: tuple[Chain, ...] = ("latents", "pictures")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One instruction, the turn it starts from (None for the first picture), its seed and own settings.

    Attributes:
        loras: what was on the model: (file name, strength, fingerprint of the file) each. Putting them there is
            the caller's; they are kept so that the turn can be done again.
    """

    instruction: str
    parent: int | None
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[tuple[str, float, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Session:
    """Turns in the order they were asked for; a turn's number is its place, from 0.

    Attributes:
        chain: "latents" hands the latent from turn to turn, "pictures" the decoded picture.
        settings: arguments of `edit_image` for every turn; a turn's own come before them.
    """

    turns: tuple[Turn, ...] = ()
    chain: Chain = "latents"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chain not in CHAINS:
            raise ValueError(f"chain is {self.chain!r}; choose one of {', '.join(CHAINS)}")
        for number, turn in enumerate(self.turns):
            if turn.parent is not None and not 0 <= turn.parent < number:
                raise ValueError(
                    f"turn {number + 1} cannot start from turn {turn.parent + 1}, which comes later"
                )

    def add(self, instruction: str, *, seed: int | None = None, **settings: Any) -> Session:
        """One more turn after the last one; its seed is its parent's plus 1 unless given."""
        return self.branch(len(self.turns) - 1 if self.turns else None, instruction, seed=seed, **settings)

    def branch(
        self, parent: int | None, instruction: str, *, seed: int | None = None, **settings: Any
    ) -> Session:
        """A turn that starts from any earlier one, or from the first picture (None)."""
        self._check(parent)
        if seed is None:
            seed = 0 if parent is None else seed_after(self.turns[parent].seed)
        turn = Turn(instruction=instruction, parent=parent, seed=seed, settings=settings)
        return replace(self, turns=(*self.turns, turn))

    def redo(self, number: int, seed: int, **settings: Any) -> Session:
        """The same turn from the same start with another seed, as a new turn beside it."""
        self._check(number)
        turn = self.turns[number]
        again = replace(turn, seed=seed, settings={**turn.settings, **settings})
        return replace(self, turns=(*self.turns, again))

    def path(self, number: int) -> list[int]:
        """The turns from the first picture to this one, this one last."""
        self._check(number)
        steps: list[int] = []
        at: int | None = number
        while at is not None:
            steps.append(at)
            at = self.turns[at].parent
        return steps[::-1]

    def to_json(self) -> str:
        """The session as JSON; `from_json` reads it back."""
        data = asdict(self)
        for turn in data["turns"]:
            if not turn["loras"]:
                del turn["loras"]  # as before there was such a field
        return json.dumps({"format": FORMAT, **data}, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Session:
        """Read and check what `to_json` wrote.

        Raises:
            ValueError: it is no session, of a newer format, or a field is missing or of a wrong type.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the session is not JSON: {error}") from error
        names = {f.name for f in fields(cls)} | {"format"}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"a session has the fields {', '.join(sorted(names))}")
        if data.pop("format") != FORMAT:
            raise ValueError(f"the session has another format than {FORMAT}; update this package")
        if not isinstance(data["turns"], list) or not isinstance(data["settings"], dict):
            raise ValueError("the session's turns are a list and its settings an object")
        turns = []
        for number, turn in enumerate(data["turns"], 1):
            loras = turn.pop("loras", []) if isinstance(turn, dict) else []
            known = [f.name for f in fields(Turn) if f.name != "loras"]
            if not isinstance(turn, dict) or set(turn) != set(known):
                raise ValueError(
                    f"turn {number} has the fields {', '.join(known)}, and loras where it had any"
                )
            good = isinstance(turn["instruction"], str) and isinstance(turn["seed"], int)
            good = good and isinstance(turn["parent"], int | None) and isinstance(turn["settings"], dict)
            if not good or not isinstance(loras, list) or not all(map(_is_lora, loras)):
                raise ValueError(f"a field of turn {number} is of a wrong type")
            turns.append(Turn(**turn, loras=tuple((name, float(by), digest) for name, by, digest in loras)))
        return cls(turns=tuple(turns), chain=data["chain"], settings=data["settings"])

    def _check(self, number: int | None) -> None:
        if number is not None and not 0 <= number < len(self.turns):
            raise ValueError(f"there is no turn {number + 1}; the session has {len(self.turns)}")


def _is_lora(entry: object) -> bool:
    """(file name, finite strength, fingerprint); a name is a file's own, never a path."""
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    name, strength, digest = entry
    words = isinstance(name, str) and isinstance(digest, str) and not {"/", "\\"} & set(name)
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    return words and number and math.isfinite(strength)


@dataclass(frozen=True, kw_only=True)
class TurnResult:
    """What a turn made: the picture at the first one's size, the latent, and how long it took.

    Attributes:
        image: (B,3,H,W) in [-1,1].
        latent: (B,16,h,w), scaled, for the next turn.
        geometry: how the first picture went to the latent's size.
    """

    image: Tensor
    latent: Tensor
    geometry: geometry.Geometry
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def run_session(
    model: KontextModel,
    image: Tensor,
    session: Session,
    done: Mapping[int, TurnResult] | None = None,
    *,
    on_turn: Callable[[int, TurnResult], None] | None = None,
    on_step: OnStep | None = None,
) -> dict[int, TurnResult]:
    """Do the turns of a session that are not done yet, in order.

    Args:
        image: the first picture (B,3,H,W) in [-1,1].
        done: results of earlier runs by turn number; they are not computed again.
        on_turn: called with a turn's number and result as soon as it is finished.
        on_step: progress within a turn; may raise to stop, and what is finished has been given to `on_turn`.

    Raises:
        ValueError: a setting that a session fixes itself.
    """
    for number, turn in enumerate(session.turns, 1):
        own = [name for name in ("size", "images", "prompt", "reference_latents") if name in turn.settings]
        if own or "size" in session.settings:
            raise ValueError(
                f"turn {number} sets {', '.join(own) or 'size'}: a session keeps the picture's size"
            )
    results = dict(done or {})
    for number, turn in enumerate(session.turns):
        if number in results:
            continue
        settings = {**session.settings, **turn.settings, "seed": turn.seed, "on_step": on_step}
        before = None if turn.parent is None else results[turn.parent]
        results[number] = _run_turn(model, image, turn.instruction, before, session.chain, settings)
        if on_turn is not None:
            on_turn(number, results[number])
    return results


def _run_turn(
    model: KontextModel,
    image: Tensor,
    instruction: str,
    before: TurnResult | None,
    chain: Chain,
    settings: dict[str, Any],
) -> TurnResult:
    if before is None or chain == "pictures":
        made = edit_image(model, image if before is None else before.image, instruction, **settings)
        plan, picture = made.geometry, made.images
    else:
        # The canvas is the first turn's: the latent sets the size, so a fit has nothing to say.
        settings = {key: value for key, value in settings.items() if key != "fit"}
        made = edit_image(model, None, instruction, reference_latents=[before.latent], **settings)
        plan = before.geometry
        picture = geometry.invert(plan, made.images, image)
    return TurnResult(
        image=picture, latent=made.latent, geometry=plan, seconds=made.seconds, warnings=made.warnings
    )


_FROM = re.compile(r"from\s+(\d+)\s*:\s*(.*)", re.IGNORECASE | re.DOTALL)
_REDO = re.compile(r"redo\s+(\d+)", re.IGNORECASE)
_OWN = re.compile(r"\s*\[(?:(seed|steps)\s+(\d+)|(guidance)\s+(\d+(?:\.\d+)?))\]\s*$", re.IGNORECASE)
_SETTINGS = {"steps": "num_steps", "guidance": "guidance"}  # word of a line -> argument of `edit_image`


def parse_turns(text: str, seed: int = 0) -> Session:
    """A session written as text, one turn a line; empty lines are left out.

    A line is an instruction that follows the turn above it. `from 1: …` starts from turn 1 instead, `from 0: …`
    from the picture; `redo 2 [seed 7]` does turn 2 again. `[seed 7]` at the end of any line sets its seed; otherwise
    it is `seed` for what starts from the picture, and its parent's plus 1. `[steps 12]` and `[guidance 3.5]` set
    those of one turn.

    Raises:
        ValueError: no line, a turn that is not there, a line that only says where it starts, or a number out of range.
    """
    session = Session()
    for line in filter(None, (line.strip() for line in text.splitlines())):
        number = len(session.turns) + 1
        words, given, own = _split_line(line, number)
        redo, branch = _REDO.fullmatch(words), _FROM.fullmatch(words)
        if redo:
            if given is None:
                raise ValueError(f"turn {number} is {line!r}: say with which seed, as in {words} [seed 7]")
            session = session.redo(int(redo.group(1)) - 1, given, **own)
            continue
        parent = number - 2 if number > 1 else None
        if branch:
            start, words = int(branch.group(1)), branch.group(2)
            parent = start - 1 if start else None
        if not words:
            raise ValueError(f"turn {number} is {line!r}: the instruction is missing")
        given = seed if given is None and parent is None else given
        session = session.branch(parent, words, seed=given, **own)
    if not session.turns:
        raise ValueError("there is no instruction: write one a line")
    return session


def _split_line(line: str, number: int) -> tuple[str, int | None, dict[str, Any]]:
    """(words, seed, settings of its own) of a turn's line; of two seeds the last one counts, and ends the words."""
    found: dict[str, str] = {}
    while (own := _OWN.search(line)) and (name := (own[1] or own[3]).lower()) not in found:
        found[name], line = own[2] or own[4], line[: own.start()]
    seed = int(found.pop("seed")) if "seed" in found else None
    if seed is not None and seed >= NUM_SEEDS:
        raise ValueError(f"turn {number} has the seed {seed}: a seed is at most {NUM_SEEDS - 1}")
    if found.get("steps") is not None and int(found["steps"]) < 1:
        raise ValueError(f"turn {number} has {found['steps']} steps: give 1 or more")
    settings = {_SETTINGS[name]: int(v) if name == "steps" else float(v) for name, v in found.items()}
    return line.strip(), seed, settings


def write_turns(session: Session, seed: int, settings: Mapping[str, Any]) -> str:
    """The lines that `parse_turns` reads as this session; line breaks in an instruction become spaces.

    The text encoders read a line break as a space too.

    Args:
        seed: of the turns that start from the picture, unless a line says otherwise.
        settings: num_steps and guidance of turns whose line has none.

    Raises:
        ValueError: an instruction without words, or a turn's own setting that a line cannot hold.
    """
    lines = []
    for number, turn in enumerate(session.turns, 1):
        words = " ".join(turn.instruction.split())
        own = {**settings, **turn.settings}
        if not words or set(own) - set(_SETTINGS.values()):
            raise ValueError(
                f"turn {number} cannot be a line: it has no words, or settings beside {', '.join(_SETTINGS)}"
            )
        above = number - 2 if number > 1 else None
        if turn.parent != above or _REDO.fullmatch(words) or _FROM.fullmatch(words):
            words = f"from {0 if turn.parent is None else turn.parent + 1}: {words}"
        counted = seed if turn.parent is None else seed_after(session.turns[turn.parent].seed)
        # Words that end as a setting does stay words when every real setting stands behind them.
        every = _OWN.search(words)
        if every or turn.seed != counted:
            words += f" [seed {turn.seed}]"
        for name, key in _SETTINGS.items():
            if key in own and (every or own[key] != settings.get(key)):
                words += f" [{name} {Decimal(str(own[key])):f}]"
        lines.append(words)
    return "\n".join(lines)


def three_steps(structure: str, detail: str, style: str) -> list[str]:
    """The order in which a large change holds together best: structure, then detail, then style.

    Empty steps are left out; the first two say that what they do not name stays, the last keeps the
    composition.
    """
    from .prompts import keeping

    steps = (
        keeping(structure, "everything else"),
        keeping(detail, "the composition and everything else"),
        keeping(style, "the composition, the position of every object and every face"),
    )
    chosen: Sequence[str] = [step for step in steps if step]
    if not chosen:
        raise ValueError("give at least one of structure, detail and style")
    return list(chosen)
