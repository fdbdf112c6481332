"""Reading GGUF over a memory map, and writing it tensor by tensor.

The `gguf` package's reader trusts the counts in a file: it loops and allocates by them. This reader checks each
against the bytes that are left before it acts on it. The package's constants, quantisers and its own reader are
what this one is tested with.

Source: ggml-org/ggml docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from .ggml_types import BY_NUMBER, FLOATS, TYPES
from .mapped import MappedFile
from .safetensors_file import StoredTensor, replacing, write_tensor

MAGIC = b"GGUF"
MAX_DIMS = 8
MAX_ARRAY_STRINGS = 2**22  # the largest vocabularies have 2**18 entries
KEPT_ARRAY = 64  # longer arrays are skipped, not kept: vocabularies, scores

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9

# Types that exist and are not read here; only their names are needed, to say so.
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class GgufFile:
    """A checked header over a memory map.

    Attributes:
        tensors: key -> StoredTensor; dtype is the GGUF type's name, shape the tensor's own (not the bytes').
        metadata: the file's key-value pairs; long arrays are left out.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """

    container = "gguf"

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.file = MappedFile(path)
        self.maps = [self.file]
        self._position = 0
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._read_header()

    def read(self, key: str) -> Tensor:
        """A tensor over the memory map: floats of their own shape, or uint8 (..., bytes a row) when packed."""
        stored = self.tensors[key]
        if stored.dtype in FLOATS:
            return self.file.view(stored.start, stored.nbytes, FLOATS[stored.dtype]).view(stored.shape)
        return self.file.view(stored.start, stored.nbytes).view(*stored.shape[:-1], -1)

    def release(self, key: str) -> None:
        self.file.release(self.tensors[key].start, self.tensors[key].nbytes)

    def read_ahead(self, key: str) -> None:
        self.file.read_ahead(self.tensors[key].start, self.tensors[key].nbytes)

    def _fail(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: not a readable GGUF file: {problem}.")

    def _take(self, form: str):
        size = struct.calcsize(form)
        data = self.file.bytes(self._position, size)
        if len(data) < size:
            raise self._fail(f"it ends at byte {self.file.size:,} inside its header")
        self._position += size
        return struct.unpack(form, data)[0]

    def _skip(self, count: int, what: str) -> None:
        if count > self.file.size - self._position:
            raise self._fail(
                f"{what} claims {count:,} bytes and {self.file.size - self._position:,} are left"
            )
        self._position += count

    def _string(self, what: str, limit: int = 2**16) -> str:
        start = self._position + 8
        length = self._take("<Q")
        self._skip(length, what)
        if length > limit:
            raise self._fail(f"{what} is {length:,} bytes long; {limit:,} are allowed")
        try:
            return self.file.bytes(start, length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._fail(f"{what} is not UTF-8") from error

    def _value(self, kind: int, key: str):
        if kind == STRING:
            return self._string(f"the value of {key!r}", limit=2**24)
        if kind in SCALARS:
            return self._take(SCALARS[kind])
        if kind != ARRAY:
            raise self._fail(f"{key!r} has the unknown value type {kind}")
        item, count = self._take("<I"), self._take("<Q")
        if item in SCALARS:
            form = SCALARS[item]
            if count <= KEPT_ARRAY:
                return [self._take(form) for _ in range(count)]
            self._skip(count * struct.calcsize(form), f"the array {key!r}")
            return None
        if item != STRING:
            raise self._fail(f"the array {key!r} has the unsupported item type {item}")
        if count * 8 > self.file.size - self._position or count > MAX_ARRAY_STRINGS:
            raise self._fail(f"the array {key!r} claims {count:,} strings")
        if count <= KEPT_ARRAY:
            return [self._string(f"an item of {key!r}") for _ in range(count)]
        for _ in range(count):
            self._skip(self._take("<Q"), f"an item of {key!r}")
        return None

    def _read_header(self) -> None:
        if self.file.bytes(0, 4) != MAGIC:
            raise self._fail("it does not start with GGUF")
        self._position = 4
        version = self._take("<I")
        if version not in (2, 3):
            raise self._fail(f"its version is {version}; 2 and 3, little-endian, can be read")
        num_tensors, num_values = self._take("<Q"), self._take("<Q")
        left = self.file.size - self._position
        if num_tensors * 24 > left or num_values * 13 > left:
            raise self._fail(f"it claims {num_tensors:,} tensors and {num_values:,} values in {left:,} bytes")
        for _ in range(num_values):
            key = self._string("a key")
            if key in self.metadata:
                raise self._fail(f"the key {key!r} stands in its header twice")
            self.metadata[key] = self._value(self._take("<I"), key)
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or alignment < 1
            or alignment & (alignment - 1)
            or alignment > 2**20
        ):
            raise self._fail(f"its alignment is {alignment!r}; a power of two is needed")
        start = -(-self._position // alignment) * alignment
        for name, kind, shape, offset in entries:
            self._place(name, kind, shape, start + offset)
        self._check_overlaps()

    def _entry(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string("a tensor's name", limit=4096)
        num_dims = self._take("<I")
        if num_dims > MAX_DIMS:
            raise self._fail(f"{name!r} has {num_dims} dimensions")
        # GGUF counts dimensions from the innermost one.
        shape = tuple(reversed([self._take("<Q") for _ in range(num_dims)]))
        return name, self._take("<I"), shape, self._take("<Q")

    def _place(self, name: str, number: int, shape: tuple[int, ...], start: int) -> None:
        if name in self.tensors:
            raise self._fail(f"the tensor {name!r} stands in its header twice")
        entry = BY_NUMBER.get(number)
        if entry is None:
            known = ", ".join(TYPES)
            raise ValueError(
                f"{self.path}: {name!r} is stored as {OTHER_TYPES.get(number, f'type number {number}')}, which "
                f"cannot be read here; GGUF files with {known} can."
            )
        columns = shape[-1] if shape else 1
        if columns % entry.block:
            raise self._fail(f"{name!r} has rows of {columns} weights, which is no multiple of {entry.block}")
        nbytes = math.prod(shape) // entry.block * entry.size
        if start + nbytes > self.file.size:
            raise self._fail(
                f"{name!r} ends at byte {start + nbytes:,} and the file at {self.file.size:,}: "
                "the download is incomplete"
            )
        self.tensors[name] = StoredTensor(entry.name, shape, start, nbytes)

    def _check_overlaps(self) -> None:
        position, previous = 0, ""
        for name, stored in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if stored.start < position:
                raise self._fail(f"{name!r} overlaps {previous!r}")
            position, previous = stored.start + stored.nbytes, name


def write_gguf(
    path: str | os.PathLike,
    layout: dict[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, str | int],
    alignment: int = 32,
) -> None:
    """Writes a version 3 file tensor by tensor, beside its place, and moves it there when it is complete.

    Args:
        layout: key -> (type name, shape), in the file's order.
        tensors: the same keys in the same order, each as the bytes or floats that its type stores.
        metadata: strings and numbers below 2**32; "general.architecture" belongs among them.

    Raises:
        ValueError: a tensor that comes is not the one the layout announced.
    """
    path = Path(path)
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(layout), len(metadata)))

    def add_string(text: str) -> None:
        encoded = text.encode()
        header.extend(struct.pack("<Q", len(encoded)) + encoded)

    for key, value in metadata.items():
        add_string(key)
        if isinstance(value, str):
            header.extend(struct.pack("<I", STRING))
            add_string(value)
        else:
            header.extend(struct.pack("<II", 4, value))
    sizes, position = [], 0
    for key, (kind, shape) in layout.items():
        entry = TYPES[kind]
        if shape and shape[-1] % entry.block:
            raise ValueError(
                f"{path}: {key} has rows of {shape[-1]} weights; {kind} needs a multiple of {entry.block}."
            )
        add_string(key)
        header.extend(struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        header.extend(struct.pack("<IQ", entry.number, position))
        sizes.append(math.prod(shape) // entry.block * entry.size)
        position += -(-sizes[-1] // alignment) * alignment
    header.extend(b"\0" * (-len(header) % alignment))
    with replacing(path) as file:
        file.write(header)
        expected = iter(zip(layout, sizes, strict=True))
        for key, tensor in tensors:
            name, size = next(expected, ("nothing", 0))
            if key != name or tensor.numel() * tensor.element_size() != size:
                raise ValueError(
                    f"{path}: {key} {tuple(tensor.shape)} came where {size:,} bytes of {name} belong."
                )
            write_tensor(file, tensor)
            file.write(b"\0" * (-size % alignment))
        left = next(expected, None)
        if left is not None:
            raise ValueError(f"{path}: no data came for {left[0]}.")
