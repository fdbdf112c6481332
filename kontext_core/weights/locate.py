"""Where the parts of a model lie in a folder: by what the files hold, with the usual names only as places to look."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from . import formats
from .files import open_weights
from .formats import AUTOENCODER, CLIP, PART_NAMES, T5, TRANSFORMER

BUNDLED = {"kontext-tiny": Path(__file__).resolve().parent.parent / "assets" / "kontext-tiny"}

SUBFOLDERS = {TRANSFORMER: "transformer", AUTOENCODER: "vae", T5: "text_encoder_2", CLIP: "text_encoder"}
TOKENIZER_FOLDERS = {T5: "tokenizer_2", CLIP: "tokenizer"}
HOST_TOKENIZERS = {T5: "comfy/text_encoders/t5_tokenizer", CLIP: "comfy/sd1_tokenizer"}
ARGUMENTS = {AUTOENCODER: "vae", T5: "t5", CLIP: "clip"}
USUAL_FILES = {
    TRANSFORMER: "flux1-kontext-dev.safetensors",
    AUTOENCODER: "ae.safetensors",
    T5: "t5xxl_fp16.safetensors",
    CLIP: "clip_l.safetensors",
}
FEW_STEP_WORDS = ("fewstep", "few-step", "few_step")


@dataclass(frozen=True)
class Places:
    """Paths of a model's parts, and of its distilled transformer if it has one."""

    name: str
    folder: Path
    parts: dict[str, Path]
    few_step: Path | None


def find_model(
    name_or_folder: str | os.PathLike,
    *,
    t5: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
) -> Places:
    """The paths of all parts.

    Raises:
        ValueError: there is nothing there, or parts are missing or ambiguous; one message lists them all.
    """
    path = BUNDLED.get(str(name_or_folder), Path(name_or_folder))
    if not path.exists():
        names = ", ".join(BUNDLED)
        raise ValueError(f"{name_or_folder}: neither a file nor a folder, nor a bundled model ({names}).")
    folder = path if path.is_dir() else path.parent
    given = {T5: t5, CLIP: clip, AUTOENCODER: vae, TRANSFORMER: None if path.is_dir() else path}
    parts = {part: Path(place) for part, place in given.items() if place is not None}
    beside, unreadable = parts_beside(folder)
    inside = {found.part for found in formats.find_parts(open_weights(path))} if path.is_file() else set()
    problems = []
    for part in (TRANSFORMER, AUTOENCODER, T5, CLIP):
        if part in parts:
            continue
        if part in inside:
            parts[part] = path  # an all-in-one checkpoint
            continue
        candidates = beside.get(part, [])
        if part == TRANSFORMER:
            candidates = [file for file in candidates if not _is_few_step(file)]
        if not candidates and (folder / SUBFOLDERS[part]).is_dir():
            candidates = [folder / SUBFOLDERS[part]]
        if len(candidates) == 1:
            parts[part] = candidates[0]
        elif candidates:
            names = ", ".join(file.name for file in candidates)
            hint = f"give one with {ARGUMENTS[part]}=" if part in ARGUMENTS else "give the file itself"
            problems.append(f"{PART_NAMES[part]} is there {len(candidates)} times ({names}): {hint}")
        else:
            hint = f", or give {ARGUMENTS[part]}=" if part in ARGUMENTS else ""
            looked = f"a file such as {USUAL_FILES[part]} or a folder {SUBFOLDERS[part]}/"
            problems.append(f"{PART_NAMES[part]} is missing: {looked} was looked for{hint}")
    if problems:
        raise ValueError(f"{folder}: {'; '.join([*problems, *unreadable])}.")
    distilled = [
        file for file in beside.get(TRANSFORMER, []) if _is_few_step(file) and file != parts[TRANSFORMER]
    ]
    name = path.name if path.is_dir() else path.stem
    return Places(name, folder, parts, distilled[0] if len(distilled) == 1 else None)


def _is_few_step(file: Path) -> bool:
    return any(word in file.name.lower() for word in FEW_STEP_WORDS)


def parts_beside(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Part -> the weight files right in this folder that hold it and nothing else; and files not readable."""
    result: dict[str, list[Path]] = {}
    unreadable = []
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        try:
            found = formats.find_parts(open_weights(file))
        except ValueError as error:
            unreadable.append(str(error).rstrip("."))
            continue
        if len(found) == 1:
            result.setdefault(found[0].part, []).append(file)
    return result, unreadable


def find_tokenizer(part: str, places: Places, given: str | os.PathLike | None) -> Path:
    """A text encoder's tokenizer: the folder or tokenizer.json that is given, beside the weights, or the host's copy.

    Raises:
        ValueError: there is none; the message lists where it was looked for.
    """
    if given is not None:
        return Path(given)
    weights = places.parts[part]
    home = weights if weights.is_dir() else weights.parent
    name = TOKENIZER_FOLDERS[part]
    candidates = [places.folder / name, home.parent / name, home / name, home]
    host = os.environ.get("COMFYUI_PATH")
    if host:
        candidates.append(Path(host) / HOST_TOKENIZERS[part])
    for folder in candidates:
        if (folder / "tokenizer.json").is_file():
            return folder
        if part == CLIP and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    looked = ", ".join(str(folder) for folder in dict.fromkeys(candidates))
    raise ValueError(
        f"{weights}: no tokenizer for {PART_NAMES[part]} was found in {looked}. Put the folder {name}/ of the "
        "FLUX.1-Kontext-dev repository beside the weights, or set COMFYUI_PATH to a ComfyUI, which brings one."
    )


def read_config(weights: Path) -> dict:
    """The config.json beside a weights file; empty if there is none.

    Raises:
        ValueError: there is one, and it is no JSON object.
    """
    path = (weights if weights.is_dir() else weights.parent) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON ({type(error).__name__}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a JSON {type(config).__name__}, where an object is needed.")
    return config
