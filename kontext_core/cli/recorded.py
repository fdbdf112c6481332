"""A picture's record: files that took part are written into it; settings and LoRAs that it names are found again."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..images import Picture
    from ..record import Record, Stamp
    from ..weights.load import KontextModel


def node_settings(known: Record, like: str) -> tuple[str, dict[str, Any]]:
    """(prompt, settings in the command line's words) of a record that Kontext Edit wrote.

    Raises:
        ValueError: the picture came of more than one edit of one picture, which `edit` does.
    """
    from ..replay import replay

    again, settings = replay(known), known.settings
    if "earlier" in settings:
        raise ValueError(
            f"{like} was made by {len(known.prompts)} edits one after another: do them with `kontext turns`"
        )
    if settings.get("latent"):
        raise ValueError(
            f"{like} was made from a latent, which its record does not hold: leave --like out, and give the settings"
        )
    if again["index"]:
        raise ValueError(
            f"{like} is picture {again['index'] + 1} of a batch whose noise was one draw: Kontext Edit makes it again"
        )
    bfl, width = again["bfl_parity"], again["width"]
    found = {name: again[name] for name in ("steps", "guidance", "seed", "convention", "padding")}
    found |= {
        "size": (width, again["height"]) if width else "auto",
        "few_step": None if again["few_step"] == "off" else int(again["few_step"]),
        "bfl": bfl,
    }
    if not bfl:  # which sets these itself
        found |= {"fit": again["fit"], "sampler": again["sampler"]}
        found["shift"] = again["mu"] if again["shift"] == "constant" else again["shift"]
    return again["prompt"], found


def left_out(known: Record, like: str) -> list[str]:
    """What a record's picture came through that the command line does not have, a sentence each."""
    return [
        f"the model of {like} came through {node['node']}, which is left out here"
        for node in known.settings.get("through", ())
    ]


def stamp_inputs(paths: Sequence[str], pictures: Sequence[Picture]) -> Iterator[Stamp]:
    """The pictures that went in, by their pixels."""
    from ..record import stamp_picture

    for number, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
        role = "picture" if number == 0 else f"reference {number}"
        yield stamp_picture(role, Path(path).name, picture.image)


def stamp_weights(args: argparse.Namespace, model: KontextModel, few_step: int | None) -> Iterator[Stamp]:
    """Every file of weights that took part, shards one by one, then the LoRAs in their order."""
    from ..record import LORA_ROLE, stamp
    from ..weights.locate import find_model

    places = {part: file.path for part, file in model.files.items()}
    if few_step is not None:
        found = find_model(args.model, t5=args.t5, clip=args.clip, vae=args.vae).few_step
        places |= {"transformer": found} if found else {}
    for part, path in sorted(places.items()):
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        yield from (stamp(part, file) for file in files)
    for number, (path, _) in enumerate(args.loras, 1):
        yield stamp(LORA_ROLE.format(number), _lora_file(Path(path)))


def _lora_file(path: Path) -> Path:
    """The weights of a LoRA; of a PEFT folder the file in it."""
    return next(iter(sorted(path.glob("*.safetensors"))), path) if path.is_dir() else path


def lora_settings(loras: Sequence[tuple[str, float]]) -> list[list]:
    """What a record's settings say of LoRAs: (file name, strength) each, in order."""
    return [[_lora_file(Path(path)).name, strength] for path, strength in loras]


def find_loras(known: Record, like: str, model: str) -> list[tuple[str, float]]:
    """The LoRAs that a record names, as paths and strengths, checked to be the same files.

    They are looked for by name beside the picture, in the working folder, beside the model, and in `loras` there.

    Raises:
        ValueError: one is nowhere, another file bears its name, or the record's list is damaged.
    """
    from ..record import LORA_ROLE

    digests = {entry.role: (entry.name, entry.digest) for entry in known.weights}
    wanted = []
    for number, (name, strength) in enumerate(_listed(known.settings, like), 1):
        known_name, digest = digests.get(LORA_ROLE.format(number), ("", ""))
        if known_name != name:
            raise ValueError(f"{like}: its record names the LoRA {name} and holds no fingerprint of it")
        wanted.append((name, strength, digest))
    return find_files(wanted, like, Path(like).parent, model)


def fingerprinted(loras: Sequence[tuple[str, float]]) -> tuple[tuple[str, float, str], ...]:
    """(file name, strength, fingerprint) of each LoRA, which `find_files` finds again."""
    from ..record import stamp

    files = [(_lora_file(Path(path)), strength) for path, strength in loras]
    return tuple((file.name, strength, stamp("lora", file).digest) for file, strength in files)


def find_files(
    wanted: Sequence[tuple[str, float, str]], made: str, folder: Path, model: str
) -> list[tuple[str, float]]:
    """LoRAs by file name and fingerprint, as paths and strengths.

    Args:
        made: what was made with them, for the errors.
        folder: searched first, then the working folder, then around the model.

    Raises:
        ValueError: one is nowhere, or another file bears its name.
    """
    from ..record import stamp

    found = []
    for name, strength, digest in wanted:
        places = [place / name for place in _folders(folder, model)]
        there = [path for path in places if path.is_file()]
        same = next((path for path in there if stamp("lora", path).digest == digest), None)
        if same is None:
            again = f"give --lora FILE={strength:g}, or --no-loras to do without"
            if there:
                raise ValueError(
                    f"{there[0]} is not the LoRA that {made} was made with ({stamp('lora', there[0]).digest}, "
                    f"the record has {digest}): {again}"
                )
            folders = ", ".join(dict.fromkeys(str(path.parent) for path in places))
            raise ValueError(f"{made} was made with the LoRA {name}, which is not in {folders}: {again}")
        found.append((str(same), strength))
    return found


def _listed(settings: Mapping[str, object], like: str) -> list[tuple[str, float]]:
    """The (name, strength) pairs of a record; names are a file's own, never a path."""
    listed = settings.get("loras", [])
    pairs = listed if isinstance(listed, list) else [listed]
    for pair in pairs:
        right = isinstance(pair, list) and len(pair) in (2, 3) and isinstance(pair[0], str)
        number = right and all(isinstance(by, int | float) and abs(by) < float("inf") for by in pair[1:])
        if not number or Path(pair[0]).name != pair[0] or "\\" in pair[0]:
            raise ValueError(f"{like}: its record's LoRAs are no list of names and strengths: {pair!r}")
        if len(pair) == 3:
            raise ValueError(
                f"{like} was made with the LoRA {pair[0]} at {pair[1]:g} on the transformer and {pair[2]:g} on the "
                f"text encoders, and here one strength is for both: give --lora FILE={pair[1]:g}, or --no-loras"
            )
    return [(name, float(strength)) for name, strength in pairs]


def _folders(beside: Path, model: str) -> list[Path]:
    """Where the LoRAs of something made may be: beside it, here, and around the model."""
    place = Path(model)
    around = place if place.is_dir() else place.parent
    return [beside, Path(), around, around / "loras", around.parent / "loras"]
