"""A reproducibility record: what made a picture, written into its PNG and read back from it.

It holds every setting, the fingerprints of the weights and of the pictures that went in, the versions, and a
fingerprint of the pixels that came out. It holds no date, path or name of a machine, so that the same run
writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, images

KEY = "kontext"  # the keyword of the PNG's text chunk
FORMAT = 1
LORA_ROLE = "lora {}"  # of the stamp of a record's first, second … LoRA
SAMPLED_FROM = 2 << 30  # bytes; a larger file is sampled, since reading all of it takes longer than an edit
SAMPLE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """A file that took part: its role, its name without the folder, its size in bytes and its fingerprint."""

    role: str
    name: str
    size: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What made a picture.

    Attributes:
        action: "edit" or "generate", or a node's id.
        prompts: the instructions, in order.
        settings: everything else that was chosen: numbers, strings, lists, None.
        inputs: the pictures that went in.
        weights: the files of the model, its LoRAs and tokenizers.
        versions: of this package, Python, torch, and the device and dtype that computed.
        pixels: fingerprint of the finished picture, or "" when it was not taken.
    """

    action: str
    prompts: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Stamp, ...] = ()
    weights: tuple[Stamp, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    pixels: str = ""

    def to_json(self) -> str:
        """The record as JSON, keys sorted."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read and check what `to_json` wrote.

        Raises:
            ValueError: it is no record, of a newer format, or a field is missing, unknown or of a wrong type.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the record is not JSON: {error}") from error
        if not isinstance(data, dict) or not isinstance(data.get("format"), int):
            raise ValueError("this is no record of a Kontext picture: it has no format number")
        if data["format"] > FORMAT:
            raise ValueError(
                f"the record has format {data['format']}; this version reads up to {FORMAT}: update it"
            )
        data = {key: value for key, value in data.items() if key != "format"}
        _check_fields(cls, data, "record")
        for name in ("inputs", "weights"):
            for stamp in data[name]:
                _check_fields(Stamp, stamp, name)
            data[name] = tuple(Stamp(**stamp) for stamp in data[name])
        if not all(isinstance(prompt, str) for prompt in data["prompts"]):
            raise ValueError("the record's prompts are not all text")
        return cls(**{**data, "prompts": tuple(data["prompts"])})


_TYPES = {
    "str": str,
    "int": int,
    "Mapping[str, Any]": dict,
    "Mapping[str, str]": dict,
    "tuple[str, ...]": list,
    "tuple[Stamp, ...]": list,
}


def _check_fields(cls: type, data: object, where: str) -> None:
    expected = {f.name: _TYPES[f.type] for f in fields(cls)}
    if not isinstance(data, dict) or set(data) != set(expected):
        got = sorted(data) if isinstance(data, dict) else repr(data)
        raise ValueError(f"{where} of the record should have the fields {sorted(expected)}; got {got}")
    wrong = [name for name, kind in expected.items() if not isinstance(data[name], kind)]
    if wrong:
        raise ValueError(f"{where} of the record: {', '.join(wrong)} is of the wrong type")


def stamp(role: str, path: str | os.PathLike) -> Stamp:
    """Fingerprint a file; a digest says how it was taken.

    `sha256:` is of the whole file, the number that model sites show. Beyond 2 GiB it is `sampled:`, the
    SHA-256 of the size and of 64 pieces of a megabyte spread evenly, the first and the last among them.
    """
    path = Path(path)
    status = path.stat()
    return Stamp(
        role=role,
        name=path.name,
        size=status.st_size,
        digest=_digest(str(path.resolve()), status.st_size, status.st_mtime_ns),
    )


def stamp_picture(role: str, name: str, image: Tensor) -> Stamp:
    """Fingerprint a picture (1,3,H,W) in [-1,1] by its 8-bit pixels, whatever file it came from."""
    return Stamp(role=role, name=name, size=image.shape[-2] * image.shape[-1] * 3, digest=pixel_digest(image))


def pixel_digest(image: Tensor) -> str:
    """SHA-256 of the size and the 8-bit pixels of (B,3,H,W) in [-1,1]."""
    pixels = images.to_uint8(image).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return "pixels:" + hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def current_versions(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, str]:
    """The versions that can change a picture's bits."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "kontext": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def save_with_record(
    path: str | os.PathLike, image: Tensor, record: Record, alpha: Tensor | None = None, **options: Any
) -> Path:
    """Write a picture (1,3,H,W) with its record; `options` are those of `images.save_image`."""
    return images.save_image(path, image, alpha, text={KEY: record.to_json()}, **options)


def load_record(path: str | os.PathLike) -> Record:
    """Read the record of a picture and check that the pixels are still those it was written for.

    Raises:
        ValueError: the picture has no record, a damaged one, or was changed since.
    """
    picture = images.load_image(path)
    if KEY not in picture.text:
        raise ValueError(
            f"{Path(path).name} holds no record of how it was made; it is kept in PNG files only"
        )
    record = Record.from_json(picture.text[KEY])
    if record.pixels and record.pixels != pixel_digest(picture.image):
        raise ValueError(f"{Path(path).name} was changed after its record was written: the pixels differ")
    return record


def differences(record: Record, other: Record) -> list[str]:
    """Why two runs may give different pictures, one sentence a cause; empty when they should be the same."""
    found = []
    if record.prompts != other.prompts:
        found.append(f"prompts: {list(record.prompts)} and {list(other.prompts)}")
    for name in ("settings", "versions"):
        one, two = getattr(record, name), getattr(other, name)
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key):
                found.append(f"{name}: {key} is {one.get(key)!r} and {two.get(key)!r}")
    for name in ("inputs", "weights"):
        one, two = ({(s.role, s.name): s.digest for s in getattr(r, name)} for r in (record, other))
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key):
                digests = [side.get(key, "absent") for side in (one, two)]
                found.append(f"{name}: {' '.join(key)} is {' and '.join(digests)}")
    return found


@lru_cache(maxsize=256)
def _digest(path: str, size: int, modified: int) -> str:
    """Digest of a file; size and time of change are in the cache's key, so a changed file is read again."""
    with open(path, "rb") as file:
        if size <= SAMPLED_FROM:
            state = hashlib.sha256()
            while piece := file.read(SAMPLE):
                state.update(piece)
            return "sha256:" + state.hexdigest()
        state = hashlib.sha256(str(size).encode())
        for i in range(64):
            file.seek((size - SAMPLE) * i // 63)
            state.update(file.read(SAMPLE))
        return "sampled:" + state.hexdigest()
