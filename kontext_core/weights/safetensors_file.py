"""Reading and writing safetensors without a second copy; every header is distrusted until it is checked.

Source: the format's description in huggingface/safetensors README.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .mapped import MappedFile

MAX_HEADER = 100_000_000  # bytes, the format's own limit

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Dtypes that files carry and no model of ours computes with: known by size, so that a header is still checked.
OTHER_BITS = {"U64": 64, "U32": 32, "U16": 16, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
              "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file.

    `shape` is the tensor's own, also where the bytes are packed; `start` counts from the file's first byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class SafetensorsFile:
    """A checked header over a memory map.

    Attributes:
        tensors: key -> StoredTensor, in the file's order.
        metadata: the header's strings.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """

    container = "safetensors"

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.file = MappedFile(path)
        self.maps = [self.file]
        self.metadata, self.tensors = self._read_header()

    def read(self, key: str) -> Tensor:
        """A tensor over the memory map.

        Raises:
            ValueError: its dtype is one that torch cannot hold.
        """
        stored = self.tensors[key]
        if stored.dtype not in DTYPES:
            raise ValueError(f"{self.path}: {key} has dtype {stored.dtype}, which cannot be read here.")
        return self.file.view(stored.start, stored.nbytes, DTYPES[stored.dtype]).view(stored.shape)

    def release(self, key: str) -> None:
        self.file.release(self.tensors[key].start, self.tensors[key].nbytes)

    def read_ahead(self, key: str) -> None:
        self.file.read_ahead(self.tensors[key].start, self.tensors[key].nbytes)

    def _fail(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: not a readable safetensors file: {problem}.")

    def _read_header(self) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        size = self.file.size
        if size < 8:
            raise self._fail(f"it has {size} bytes and a header alone needs 8")
        length = int.from_bytes(self.file.bytes(0, 8), "little")
        if length > size - 8:
            raise self._fail(
                f"its header claims {length:,} bytes and the whole file has {size:,}: "
                "the download is incomplete, or it is another kind of file"
            )
        if length > MAX_HEADER:
            raise self._fail(f"its header has {length:,} bytes; the format allows {MAX_HEADER:,}")
        try:
            text = self.file.bytes(8, length).decode("utf-8")
            header = json.loads(text, object_pairs_hook=self._no_duplicates)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise self._fail(f"its header is not JSON ({type(error).__name__})") from error
        if not isinstance(header, dict):
            raise self._fail("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if metadata is None:
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._fail("its __metadata__ is not a table of strings")
        tensors = {key: self._entry(key, entry, 8 + length, size) for key, entry in header.items()}
        self._check_layout(tensors, 8 + length, size)
        return metadata, tensors

    def _no_duplicates(self, pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise self._fail(f"the name {twice[:80]!r} stands in its header twice")
        return result

    def _entry(self, key: str, entry: object, data_start: int, size: int) -> StoredTensor:
        name = key[:80]
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise self._fail(f"the header's entry for {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = 8 * DTYPES[dtype].itemsize if isinstance(dtype, str) and dtype in DTYPES else None
        if bits is None:
            bits = OTHER_BITS.get(dtype) if isinstance(dtype, str) else None
        if bits is None:
            raise self._fail(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
        if not _naturals(shape) or len(shape) > 16:
            raise self._fail(f"{name!r} has the impossible shape {str(shape)[:60]}")
        if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._fail(f"{name!r} has the impossible data_offsets {str(offsets)[:60]}")
        begin, end = offsets
        if data_start + end > size:
            raise self._fail(
                f"{name!r} ends at byte {data_start + end:,} and the file at {size:,}: the download is incomplete"
            )
        needed = math.prod(shape) * bits
        if needed != 8 * (end - begin):
            raise self._fail(
                f"{name!r} is {dtype} of shape {str(shape)[:60]}, which takes {needed // 8:,} bytes, "
                f"but has {end - begin:,}"
            )
        return StoredTensor(dtype, tuple(shape), data_start + begin, end - begin)

    def _check_layout(self, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
        """Tensors must follow each other and fill the file: anything else hides data or shares it."""
        position, previous = data_start, None
        for key, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if stored.start < position:
                raise self._fail(f"{key[:80]!r} overlaps {previous[:80]!r}")
            if stored.start > position:
                raise self._fail(f"{stored.start - position:,} bytes before {key[:80]!r} belong to no tensor")
            position, previous = stored.start + stored.nbytes, key
        if position != size:
            raise self._fail(f"{size - position:,} bytes after its last tensor belong to no tensor")


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def write_safetensors(
    path: str | os.PathLike,
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]] | Iterator[tuple[str, Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a file tensor by tensor, beside its place, and moves it there when it is complete.

    Args:
        layout: key -> (dtype, shape), in the file's order; the header is made of it before any data comes.
        tensors: the same keys in the same order with their data; only one is alive at a time.

    Raises:
        ValueError: a tensor that comes is not the one the layout announced.
    """
    path = Path(path)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for key, (dtype, shape) in layout.items():
        if dtype not in NAMES:
            raise ValueError(f"{path}: {key} is {dtype}, which safetensors files cannot hold.")
        nbytes = math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with replacing(path) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        expected = iter(layout.items())
        for key, tensor in tensors:
            name, (dtype, shape) = next(expected, ("nothing", (None, None)))
            if key != name or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"{path}: {key} {tensor.dtype} {tuple(tensor.shape)} came where {name} {dtype} {shape} belongs."
                )
            write_tensor(file, tensor)
        left = next(expected, None)
        if left is not None:
            raise ValueError(f"{path}: no data came for {left[0]}.")


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a dictionary of tensors: the widest dtypes first, which aligns all, then by name.

    Unlike the safetensors package's own function it lets the umask decide who may read the file.
    """
    keys = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    layout = {key: (tensors[key].dtype, tuple(tensors[key].shape)) for key in keys}
    write_safetensors(path, layout, ((key, tensors[key]) for key in keys), metadata)


def write_tensor(file, tensor: Tensor) -> None:
    """Appends a tensor's bytes."""
    if tensor.numel():
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


class replacing:
    """A file opened beside `path` as `<name>.partial`, that takes its place only if all went well."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.partial, "wb")
        return self.file

    def __exit__(self, kind, error, trace) -> None:
        self.file.close()
        if kind is None:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)
