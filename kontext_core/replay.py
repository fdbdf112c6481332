"""What an edit is given to make a recorded picture again.

The nodes and the command line write records in words of their own; here both become the widgets of Kontext Edit, or
the lines of Kontext Turns where the record is of several edits that went on from each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .latents import seed_after
from .record import Record
from .turns import Session, write_turns

# What a record says of the MODEL beside its files: (file name, strength) of each LoRA, what was skipped between steps,
# and the other nodes that it came through.
MODEL_SETTINGS = ("loras", "reuse_context", "skip_regions", "first_block", "warmup", "through")
# What Kontext Turns has no widget for.
FIXED_IN_TURNS = {
    "sampler": "euler",
    "shift": "resolution",
    "convention": "offset",
    "width": 0,
    "height": 0,
    "bfl_parity": False,
}


def replay(record: Record) -> dict[str, Any]:
    """What Kontext Edit, or Kontext Turns for several instructions, is given to make a record's picture again.

    A picture of a batch is made alone, from the seed that was its own. Noise as BFL draws it is one draw for the whole
    batch: the batch is then made again, and `index` says which picture of it is meant.

    Raises:
        ValueError: the record lacks a seed, steps or guidance, or one of several instructions has no words.
    """
    settings, turns = record.settings, edits(record)
    for number, turn in enumerate(turns, 1):
        missing = [key for key in ("seed", "steps", "guidance") if key not in turn]
        if missing:
            where = f" of turn {number}" if len(turns) > 1 else ""
            raise ValueError(
                f"the record holds no {', '.join(missing)}{where}: {record.action} does not write them"
            )
    common = widgets(settings)
    bfl = common["bfl_parity"]
    batch = int(settings.get("batch", settings.get("batch_size", 1)))
    index = int(settings.get("index", 0))
    seeds = [seed_after(int(turn["seed"]), 0 if bfl else index) for turn in turns]
    prompt = "\n".join(record.prompts) if len(turns) == 1 else _lines(record.prompts, seeds, turns)
    return {
        **common,
        "prompt": prompt,
        "seed": seeds[0],
        "batch_size": int(settings.get("batch_size", 1)) if bfl else 1,
        "chain": "latents" if settings.get("latent") or len(turns) == 1 else "pictures",
        "index": index if bfl and batch > 1 else 0,
    }


def edits(record: Record) -> list[Mapping[str, Any]]:
    """The settings of each edit that led to a picture, its own last.

    Raises:
        ValueError: there are not as many instructions.
    """
    found = [*record.settings.get("earlier", ()), record.settings]
    if len(found) > 1 and len(found) != len(record.prompts):
        raise ValueError(f"the record has {len(record.prompts)} instructions for {len(found)} edits")
    return found


def widgets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Kontext Edit's widgets of one edit's settings, beside those that `replay` works out of all of them."""
    shift = settings.get("shift", "resolution")
    size = settings.get("size", [settings.get("width", 0), settings.get("height", 0)])
    width, height = (0, 0) if size == "auto" else size
    return {
        "steps": int(settings["steps"]),
        "guidance": float(settings["guidance"]),
        "few_step": str(settings.get("few_step") or "off"),
        "fit": str(settings.get("fit", "stretch")),
        "padding": str(settings.get("padding", "mirror")),
        "convention": str(settings.get("convention", "offset")),
        "width": int(width),
        "height": int(height),
        "sampler": str(settings.get("sampler", "euler")),
        "shift": shift if isinstance(shift, str) else "constant",
        "mu": float(settings.get("mu", 1.15) if isinstance(shift, str) else shift),
        "bfl_parity": bool(settings.get("bfl_parity", settings.get("bfl", False))),
    }


def beyond_turns(record: Record) -> list[str]:
    """Why Kontext Turns cannot make a recorded chain of edits again, a sentence a cause; empty when it can."""
    turns = edits(record)
    if len(turns) == 1:
        return []
    last, found = widgets(turns[-1]), []
    for number, turn in enumerate(turns, 1):
        own = widgets(turn)
        if own["few_step"] != "off":  # which sets them itself
            own |= {name: FIXED_IN_TURNS[name] for name in ("sampler", "shift")}
        wanted = {**{name: last[name] for name in ("few_step", "fit")}, **FIXED_IN_TURNS}
        if own["fit"] == "pad":
            wanted["padding"] = last["padding"]
        found += [
            f"turn {number} has {name} {own[name]}, where Kontext Turns has {value}"
            for name, value in wanted.items()
            if own[name] != value
        ]
        if any(turn.get(name) != turns[-1].get(name) for name in MODEL_SETTINGS):
            found.append(f"turn {number} has other LoRAs or another acceleration than the last turn")
        if bool(turn.get("latent")) != (number > 1 and bool(turns[-1].get("latent"))):
            found.append(f"turn {number} goes on from a {'latent' if turn.get('latent') else 'picture'}")
        if turn.get("masked"):
            found.append(f"turn {number} has a noise mask")
    further = [item.role for item in record.inputs if not item.role.endswith("image 1")]
    return found + [f"there is a further picture, {role}" for role in dict.fromkeys(further)]


def _lines(prompts: Sequence[str], seeds: Sequence[int], turns: Sequence[Mapping[str, Any]]) -> str:
    """Kontext Turns' lines of a chain, one an instruction."""
    session = Session()
    for prompt, seed, turn in zip(prompts, seeds, turns, strict=True):
        own = {"num_steps": int(turn["steps"]), "guidance": float(turn["guidance"])}
        session = session.add(prompt, seed=seed, **own)
    return write_turns(session, seeds[0], session.turns[-1].settings)
