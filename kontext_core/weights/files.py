"""Opens anything that holds weights: a safetensors or GGUF file, or a folder of shards with their index.

What a file is decides its content: the first bytes, never the name. What cannot be opened is refused in a
sentence that says what it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .gguf_file import MAGIC, GgufFile
from .mapped import MappedFile
from .safetensors_file import SafetensorsFile, StoredTensor


class WeightFile(Protocol):
    """What the loaders need of a file; `SafetensorsFile`, `GgufFile` and `ShardedFolder` are such."""

    path: Path
    container: str
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    maps: list[MappedFile]

    def read(self, key: str) -> Tensor: ...

    def release(self, key: str) -> None: ...

    def read_ahead(self, key: str) -> None: ...


class ShardedFolder:
    """Several safetensors files behind one index (`<name>.safetensors.index.json`), read as one.

    Attributes:
        strays: keys that lie in a shard and not in the index.
    """

    container = "safetensors shards"

    def __init__(self, index: str | os.PathLike):
        self.path = Path(index)
        folder = self.path.parent
        weight_map = self._weight_map()
        self.shards: dict[str, SafetensorsFile] = {}
        for name in sorted(set(weight_map.values())):
            # An index from elsewhere must not make us read files outside its folder.
            if (
                Path(name).name != name
                or name in ("", ".", "..")
                or "\\" in name
                or ":" in name
                or "\0" in name
            ):
                raise ValueError(
                    f"{self.path}: it names the file {name[:80]!r}, which is not in its own folder."
                )
            if not (folder / name).is_file():
                raise ValueError(f"{self.path}: it names the file {name!r}, which is missing from {folder}.")
            self.shards[name] = SafetensorsFile(folder / name)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._shard_of: dict[str, SafetensorsFile] = {}
        for key, name in weight_map.items():
            shard = self.shards[name]
            if key not in shard.tensors:
                raise ValueError(f"{self.path}: it says that {key[:80]!r} is in {name}, and it is not.")
            self.tensors[key] = shard.tensors[key]
            self._shard_of[key] = shard
            self.metadata.update(shard.metadata)
        self.maps = [shard.file for shard in self.shards.values()]
        in_shards = {key for shard in self.shards.values() for key in shard.tensors}
        self.strays = sorted(in_shards - weight_map.keys())

    def read(self, key: str) -> Tensor:
        return self._shard_of[key].read(key)

    def release(self, key: str) -> None:
        self._shard_of[key].release(key)

    def read_ahead(self, key: str) -> None:
        self._shard_of[key].read_ahead(key)

    def _weight_map(self) -> dict[str, str]:
        try:
            if self.path.stat().st_size > 100_000_000:
                raise ValueError(f"{self.path}: an index of {self.path.stat().st_size:,} bytes is no index.")
            index = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{self.path}: not a readable index ({type(error).__name__}).") from error
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_str, weight_map.values())):
            raise ValueError(f"{self.path}: its weight_map is not a table of key to file name.")
        return weight_map


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def open_weights(path: str | os.PathLike) -> WeightFile:
    """Opens a weights file, an index, or a folder that holds exactly one of either.

    Raises:
        ValueError: there is nothing there, it is damaged, or it is something that is not read, with the reason.
    """
    path = Path(path)
    if path.is_dir():
        return open_weights(_in_folder(path))
    if path.name.endswith(".index.json"):
        return ShardedFolder(path)
    head = _head(path)
    if head[:4] == MAGIC:
        return GgufFile(path)
    refuse_what_is_not_weights(path, head)
    return SafetensorsFile(path)


def _in_folder(folder: Path) -> Path:
    """The index or the single weights file of a folder such as `transformer/` or `text_encoder_2/`."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    plain = [index for index in indices if len(index.name.split(".")) == 4]
    if len(plain or indices) == 1:
        return (plain or indices)[0]
    files = sorted(file for end in ("*.safetensors", "*.gguf") for file in folder.glob(end))
    for usual in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if not indices and folder / usual in files:
            return folder / usual
    if len(files) == 1 and not indices:
        return files[0]
    found = ", ".join(file.name for file in [*indices, *files][:6]) or "none"
    raise ValueError(
        f"{folder}: one weights file or one index is needed in this folder; found: {found}. Give the file itself."
    )


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file.") from error
    except OSError as error:
        raise ValueError(f"{path}: the file cannot be read: {error.strerror or error}.") from error


def refuse_what_is_not_weights(path: Path, head: bytes) -> None:
    """Raises a ValueError that says what a file is, if its first bytes show that it is not safetensors."""
    pickled = (
        f"{path}: a pickled PyTorch file. Loading one runs whatever code is in it, so none are loaded here; "
        "get the .safetensors or .gguf version of this model."
    )
    if head[6:9] == b"\0\0{":
        return  # a safetensors header's length and its opening brace
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        raise ValueError(pickled)
    if len(head) > 262 and head[257:262] == b"ustar":
        raise ValueError(pickled)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path}: a Git LFS pointer, not the file itself. Run `git lfs pull`, or download the file from the "
            "model's page."
        )
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(
            f"{path}: a web page, not weights: the download was answered with a page, often a request to log in "
            "or to accept the licence."
        )
    if head[:4] == b"\x89HDF":
        raise ValueError(f"{path}: an HDF5 file (Keras); a .safetensors or .gguf file is needed.")
    if head[:1] == b"\x08" and head[2:3] == b"\x12":
        raise ValueError(f"{path}: an ONNX file; a .safetensors or .gguf file is needed.")
    if head[:1] in (b"{", b"["):
        raise ValueError(f"{path}: a JSON file, not weights; give the .safetensors file or the folder.")
