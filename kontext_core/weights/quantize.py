"""Smaller files of the same model: scaled float8 for ComfyUI's loaders, GGUF for everybody's.

GGUF blocks are made by the `gguf` package (Q8_0, Q5_0, Q5_1, Q4_0, Q4_1) and, for K-types, by `k_quants`. What
the models need most exactly and what costs little stays in float: norms and biases (F32), embedders and the last
layer (BF16), and rows that are no whole number of blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import ggml_types, keys
from .convert import OnTensor, convert_file, is_scaled_layer, open_complete, released
from .formats import PART_NAMES, T5, TRANSFORMER
from .gguf_file import write_gguf
from .k_quants import QUANTISERS, pack_k
from .parts import Part

# GGUF type -> general.file_type, the "mostly" number of llama.cpp.
GGUF_TYPES = {
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "BF16": 32,
}
FP8_TYPES = ("fp8_scaled", "fp8_scaled_old")

ROWS_BYTES = 2**26  # float32 bytes handed to the gguf package at a time


def quantize_file(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    type: str,
    part: str | None = None,
    on_tensor: OnTensor | None = None,
) -> Path:
    """Writes the model in `src` with smaller weights to the file `dst`.

    Args:
        src: a transformer or T5 encoder in any format that can be read.
        type: "fp8_scaled", "fp8_scaled_old" (ComfyUI's newer and older layout) or a GGUF type such as "Q8_0".
        part: which part of an all-in-one checkpoint; not needed otherwise.
        on_tensor: called with (tensors written, tensors in all); may raise to cancel.

    Raises:
        ValueError: the type is unknown or cannot be written, or the source does not suit it.
    """
    if type in FP8_TYPES:
        return convert_file(src, dst, to=type, part=part, on_tensor=on_tensor)
    # One type for all layers is what llama.cpp calls small.
    kind = type.upper().removesuffix("_S")
    if kind not in GGUF_TYPES:
        known = ", ".join([*FP8_TYPES, *GGUF_TYPES])
        readable = (
            " It can be read, but there is no quantiser for it here." if kind in ggml_types.TYPES else ""
        )
        raise ValueError(f"the type {type!r} cannot be written.{readable} Use one of {known}.")
    source = open_complete(src, part)
    if source.found.part not in (TRANSFORMER, T5):
        raise ValueError(
            f"{src}: {PART_NAMES[source.found.part]} is small and is not quantised; keep it as it is."
        )
    dst = Path(dst)
    if dst.exists() and dst.resolve() == source.file.path.resolve():
        raise ValueError(f"{dst}: source and destination are the same file; write to another.")
    kinds = {key: _kind_for(source, key, kind) for key in source.shapes}
    names = {key: keys.t5_name_to_gguf(key) if source.found.part == T5 else key for key in source.shapes}
    layout = {names[key]: (kinds[key], tuple(source.shapes[key])) for key in source.shapes}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, key in enumerate(source.shapes, 1):
            yield names[key], _packed(source, key, kinds[key])
            if on_tensor is not None:
                on_tensor(done, len(kinds))

    metadata: dict[str, str | int] = {
        "general.architecture": "flux" if source.found.part == TRANSFORMER else "t5encoder",
        "general.quantization_version": 2,
        "general.file_type": GGUF_TYPES[kind],
    }
    write_gguf(dst, layout, tensors(), metadata)
    return dst


def _kind_for(source: Part, key: str, kind: str) -> str:
    """The type one tensor is stored as in a file of mostly `kind`."""
    shape = source.shapes[key]
    if len(shape) < 2:
        return "F32"
    if is_scaled_layer(source, key, everywhere=False) and shape[-1] % ggml_types.TYPES[kind].block == 0:
        return kind
    return "F16" if kind == "F16" else "BF16"


def _packed(source: Part, key: str, kind: str) -> Tensor:
    if kind in ggml_types.FLOATS:
        return released(source, key, ggml_types.FLOATS[kind])
    if source.weight(key).kind == kind:
        return source.weight(key).data.clone()
    return pack(released(source, key, torch.float32), kind)


def pack(values: Tensor, kind: str) -> Tensor:
    """float32 (rows, columns) -> uint8 (rows, bytes) of a GGUF type."""
    if kind in QUANTISERS:
        return pack_k(values, kind)
    gguf = _gguf_package(kind)
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    rows = max(ROWS_BYTES // (4 * values.shape[-1]), 1)
    chunks = [gguf.quantize(chunk.numpy(), number) for chunk in values.split(rows)]
    return torch.from_numpy(np.concatenate(chunks))


def _gguf_package(kind: str):
    """The `gguf` package, which only the writing of some types needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        ours = ", ".join(QUANTISERS)
        raise ValueError(
            f"writing {kind} needs the package gguf, which is not installed: pip install gguf. "
            f"Without it {ours} and {', '.join(FP8_TYPES)} can be written, and every GGUF file read."
        ) from error
    return gguf
