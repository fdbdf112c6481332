"""`inspect_file`: what a weights file or folder is, what is missing from it, and what is odd about it.

Only headers are read: a 24 GB file is answered in milliseconds.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import formats, locate
from .files import ShardedFolder, WeightFile, open_weights
from .formats import CLIP, LAYOUT_NAMES, PART_NAMES, T5, TRANSFORMER
from .load import BUILDERS
from .packed import PlainOperations
from .parts import Part, differences

LORA_FORMATS = (
    ("lora_unet_", "kohya"),
    ("lora_transformer_", "OneTrainer"),
    ("lycoris_", "LyCORIS"),
    ("base_model.model.", "PEFT over black-forest-labs names (fal)"),
    ("transformer.", "diffusers / PEFT"),
    ("diffusion_model.", "ai-toolkit, black-forest-labs names"),
    ("single_blocks.", "black-forest-labs names"),
    ("double_blocks.", "black-forest-labs names, or XLabs"),
    ("lora_te", "kohya, text encoder"),
    ("text_encoder", "diffusers / PEFT, text encoder"),
)


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """What was found out about a file.

    Attributes:
        format: container and naming, for people.
        part: "transformer", "autoencoder", "t5", "clip", "lora", "checkpoint" (several parts in one file),
            "model" (a folder of parts) or "unknown".
        parameters: weights, counted as numbers; scales and markers of packed files are not counted.
        dtypes: stored dtype -> number of weights.
        quantisation: how weights are packed; "none" for plain floats.
        sizes: the model's sizes, as read off the shapes.
        missing, unexpected: keys that the part needs and lacks, or has and does not need; for a folder, parts.
        odd: sentences on anything out of the ordinary.
        refused: why the file cannot be used; None if it can.
        parts: of a checkpoint or a folder, each part's own.
    """

    path: str
    format: str
    part: str
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    quantisation: str
    sizes: dict[str, object] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    refused: str | None = None
    parts: tuple[FileInfo, ...] = ()

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def to_text(self) -> str:
        """A few aligned lines."""
        rows = [
            ("format", self.format),
            ("part", PART_NAMES.get(self.part, self.part)),
            ("parameters", f"{self.parameters:,}"),
            ("size", f"{self.bytes / 1e9:.2f} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.2f} MB"),
            ("dtypes", ", ".join(f"{name} {count:,}" for name, count in self.dtypes.items()) or "none"),
            ("quantisation", self.quantisation),
        ]
        if self.sizes:
            rows.append(("sizes", ", ".join(f"{name} {value}" for name, value in self.sizes.items())))
        for name, keys in (("missing", self.missing), ("unexpected", self.unexpected)):
            more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
            rows.append((name, ", ".join(keys[:6]) + more if keys else "nothing"))
        rows.extend(("odd", sentence) for sentence in self.odd)
        if self.refused is not None:
            rows.append(("cannot be used", self.refused))
        lines = [self.path, *(f"  {name:<14}  {value}" for name, value in rows)]
        for part in self.parts:
            lines.extend("  " + line for line in part.to_text().splitlines())
        return "\n".join(lines)


def inspect_file(path: str | os.PathLike) -> FileInfo:
    """What a weights file, an index, or a model's folder is.

    Raises:
        ValueError: it cannot be read as weights at all, with the reason.
    """
    path = Path(path)
    if path.is_dir() and _is_model_folder(path):
        return _inspect_folder(path)
    file = open_weights(path)
    infos = [_inspect_part(file, found) for found in formats.find_parts(file)]
    refused = formats.refusal(file)
    if refused is not None:
        return _summary(file, "unknown", _container(file), refused=refused)
    if len(infos) == 1:
        return infos[0]
    if infos:
        return _summary(
            file, "checkpoint", f"{_container(file)}, several parts in one file", parts=tuple(infos)
        )
    if formats.is_lora(file):
        names = (name for mark, name in LORA_FORMATS if any(key.startswith(mark) for key in file.tensors))
        return _summary(
            file, "lora", f"{_container(file)}, LoRA in the format of {next(names, 'unknown origin')}"
        )
    return _summary(file, "unknown", _container(file), refused=f"{formats.stranger(file)}.")


def _is_model_folder(folder: Path) -> bool:
    """A folder with several parts in it, and not one part's own folder."""
    if any((folder / name).is_dir() for name in locate.SUBFOLDERS.values()):
        return True
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return len(weights) > 1 and not any(folder.glob("*.index.json"))


def _inspect_folder(folder: Path) -> FileInfo:
    beside, unreadable = locate.parts_beside(folder)
    parts: dict[str, list[Path]] = {part: list(beside.get(part, [])) for part in locate.SUBFOLDERS}
    for part, name in locate.SUBFOLDERS.items():
        if not parts[part] and (folder / name).is_dir():
            parts[part] = [folder / name]
    infos = tuple(inspect_file(place) for places in parts.values() for place in places)
    missing = [PART_NAMES[part] for part, places in parts.items() if not places]
    for part, name in locate.TOKENIZER_FOLDERS.items():
        if not (folder / name).is_dir():
            missing.append(f"the tokenizer of {PART_NAMES[part]} ({name}/)")
    dtypes: Counter[str] = Counter()
    for info in infos:
        dtypes.update(info.dtypes)
    return FileInfo(
        path=str(folder),
        format="a model's folder",
        part="model",
        parameters=sum(info.parameters for info in infos),
        bytes=sum(info.bytes for info in infos),
        dtypes=dict(dtypes),
        quantisation="; ".join(dict.fromkeys(info.quantisation for info in infos)),
        missing=tuple(missing),
        odd=tuple(unreadable),
        parts=infos,
    )


def _container(file: WeightFile) -> str:
    return "GGUF" if file.container == "gguf" else file.container


def _summary(file: WeightFile, part: str, form: str, *, refused: str | None = None, parts=()) -> FileInfo:
    dtypes: Counter[str] = Counter()
    for key, stored in file.tensors.items():
        if not formats.is_auxiliary(key):
            dtypes[stored.dtype] += stored.numel
    return FileInfo(
        path=str(file.path),
        format=form,
        part=part,
        parameters=sum(dtypes.values()),
        bytes=sum(stored.nbytes for stored in file.tensors.values()),
        dtypes=dict(dtypes.most_common()),
        quantisation="; ".join(dict.fromkeys(info.quantisation for info in parts)) or "none",
        refused=refused,
        parts=tuple(parts),
    )


def _inspect_part(file: WeightFile, found: formats.Found) -> FileInfo:
    form = f"{_container(file)}, {LAYOUT_NAMES[found.layout]}"
    if found.prefix:
        form += f" under {found.prefix!r}"
    try:
        part = Part(file, found)
        module = BUILDERS[found.part](part.params, operations=PlainOperations, device="meta")
    except (ValueError, RuntimeError, TypeError) as error:
        return _summary(file, found.part, form, refused=f"its sizes make no model: {error}")
    expected = {key: tuple(value.shape) for key, value in module.named_parameters()}
    missing, unexpected, wrong = differences(part, expected)
    dtypes: Counter[str] = Counter()
    size = 0
    for move in part.moves.values():
        for piece in move.pieces:
            dtypes[file.tensors[piece.key].dtype] += file.tensors[piece.key].numel
            size += file.tensors[piece.key].nbytes
    odd = [*wrong[:6], *_oddities(part)]
    if isinstance(file, ShardedFolder) and file.strays:
        odd.append(f"{len(file.strays)} keys lie in its shards and not in its index ({file.strays[0]})")
    problem = missing or unexpected or wrong
    return FileInfo(
        path=str(file.path),
        format=form,
        part=found.part,
        parameters=part.numel,
        bytes=size,
        dtypes=dict(dtypes.most_common()),
        quantisation=formats.quantisation(file, found),
        sizes=asdict(part.params),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        odd=tuple(odd),
        refused="its keys are not those of the model it seems to be" if problem else None,
    )


def _oddities(part: Part) -> list[str]:
    odd = []
    params = part.params
    if part.ignored:
        odd.append(f"{len(part.ignored)} keys that FLUX has no use for are skipped ({part.ignored[0]})")
    if part.found.part == TRANSFORMER:
        if params.in_channels != 64:
            odd.append(
                f"it takes {params.in_channels} channels, Kontext 64: a FLUX.1 Fill, Canny or Depth model by its shape"
            )
        if not params.guidance_embed:
            odd.append("it has no guidance embedding, as FLUX.1 [schnell]")
    kinds = {part.dtype_name(key) for key in part.shapes if not part.is_packed(key)}
    if len(kinds) > 1:
        odd.append(f"plain weights of several dtypes ({', '.join(sorted(kinds))}): they are cast to one")
    if part.found.part in (T5, CLIP) and part.file.container == "gguf":
        odd.append("a GGUF text encoder: its tokenizer is taken from a tokenizer folder, not from the file")
    return odd
