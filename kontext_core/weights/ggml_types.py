"""The GGUF quantisation types that Kontext and T5 are published in, unpacked in torch on any device.

Every type stores blocks of 32 or 256 weights; a weight is scale * level, plus a minimum in the `_1` types, minus
one in Q2_K, Q4_K and Q5_K. K-types hold 8 or 16 groups with small integer scales of their own under a float16
scale for the block. Products are taken in float32 in the order of ggml's own reference code, so that results
are bit for bit those of the `gguf` package, and are rounded once, to the dtype asked for.

Source: ggml-org/ggml src/ggml-common.h (block layouts), src/ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (levels (n,groups,size) of a small integer dtype, scale (n,groups,1) float32, added (n,groups,1) or None)
Levels = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class GgmlType:
    """A storage type: `block` weights take `size` bytes."""

    name: str
    number: int
    block: int
    size: int
    levels: Callable[[Tensor], Levels] | None = None

    def row_bytes(self, columns: int) -> int:
        return columns // self.block * self.size


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block (n,size) -> (n,1,1) float32."""
    return blocks[:, start : start + 2].view(torch.float16).float().unsqueeze(-1)


def _spread(packed: Tensor, bits: int) -> Tensor:
    """(..., k) bytes -> (..., 8/bits, k): all first fields of `bits` bits, low ones first, then all second ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    return (packed.unsqueeze(-2) >> shifts) & (2**bits - 1)


def _q8_0(blocks: Tensor) -> Levels:
    return blocks[:, 2:].view(torch.int8).unsqueeze(1), _half(blocks, 0), None


def _q4_0(blocks: Tensor) -> Levels:
    return _spread(blocks[:, 2:], 4).reshape(-1, 1, 32).view(torch.int8) - 8, _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> Levels:
    return _spread(blocks[:, 4:], 4).reshape(-1, 1, 32), _half(blocks, 0), _half(blocks, 2)


def _fifth_bits(packed: Tensor) -> Tensor:
    """(n,4) bytes -> (n,1,32): bit i of the little-endian word belongs to weight i; worth 16."""
    return _spread(packed, 1).transpose(1, 2).reshape(-1, 1, 32) << 4


def _q5_0(blocks: Tensor) -> Levels:
    levels = _spread(blocks[:, 6:], 4).reshape(-1, 1, 32) | _fifth_bits(blocks[:, 2:6])
    return levels.view(torch.int8) - 16, _half(blocks, 0), None


def _q5_1(blocks: Tensor) -> Levels:
    levels = _spread(blocks[:, 8:], 4).reshape(-1, 1, 32) | _fifth_bits(blocks[:, 4:8])
    return levels, _half(blocks, 0), _half(blocks, 2)


def _q2_k(blocks: Tensor) -> Levels:
    scales = blocks[:, :16].unsqueeze(-1)
    levels = _spread(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return levels, _half(blocks, 80) * (scales & 15), -(_half(blocks, 82) * (scales >> 4))


def _q3_k(blocks: Tensor) -> Levels:
    high = _spread(blocks[:, :32], 1).reshape(-1, 16, 16)
    low = _spread(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    # Sixteen 6-bit scales: the low four bits in bytes 0..7, the high two in bytes 8..11.
    scales = _spread(blocks[:, 96:104], 4).reshape(-1, 16) | (
        _spread(blocks[:, 104:108], 2).reshape(-1, 16) << 4
    )
    scales = (scales.view(torch.int8) - 32).unsqueeze(-1)
    # A cleared high bit takes 4 away.
    return (low | (high << 2)).view(torch.int8) - 4, _half(blocks, 108) * scales, None


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes (n,12) -> eight 6-bit scales and eight 6-bit minima, each (n,8,1).

    Bytes 0..3 hold scales 0..3 and, in their top bits, the top two bits of scales 4..7; bytes 4..7 likewise for
    the minima; bytes 8..11 the low four bits of scales 4..7 and minima 4..7.
    """
    scales, minima, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((scales & 63, (rest & 15) | ((scales >> 2) & 48)), dim=-1)
    minima = torch.cat((minima & 63, (rest >> 4) | ((minima >> 2) & 48)), dim=-1)
    return scales.unsqueeze(-1), minima.unsqueeze(-1)


def _q4_k(blocks: Tensor) -> Levels:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    levels = _spread(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return levels, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Levels:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    levels = _spread(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32) | (
        _spread(blocks[:, 16:48], 1) << 4
    )
    return levels, _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Levels:
    low = _spread(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    high = _spread(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    scales = blocks[:, 192:208].view(torch.int8).unsqueeze(-1)
    return (low | (high << 4)).view(torch.int8) - 32, _half(blocks, 208) * scales, None


TYPES: dict[str, GgmlType] = {
    entry.name: entry
    for entry in (
        GgmlType("F32", 0, 1, 4),
        GgmlType("F16", 1, 1, 2),
        GgmlType("BF16", 30, 1, 2),
        GgmlType("Q4_0", 2, 32, 18, _q4_0),
        GgmlType("Q4_1", 3, 32, 20, _q4_1),
        GgmlType("Q5_0", 6, 32, 22, _q5_0),
        GgmlType("Q5_1", 7, 32, 24, _q5_1),
        GgmlType("Q8_0", 8, 32, 34, _q8_0),
        GgmlType("Q2_K", 10, 256, 84, _q2_k),
        GgmlType("Q3_K", 11, 256, 110, _q3_k),
        GgmlType("Q4_K", 12, 256, 144, _q4_k),
        GgmlType("Q5_K", 13, 256, 176, _q5_k),
        GgmlType("Q6_K", 14, 256, 210, _q6_k),
    )
}
BY_NUMBER = {entry.number: entry for entry in TYPES.values()}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Weights unpacked at a time: temporaries stay in a CPU's cache, and a GPU still has work for all of itself.
CHUNK = {"cpu": 2**18, "other": 2**25}


def unpack(packed: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed rows (..., bytes) uint8 -> (..., columns) in `dtype`, on the same device.

    Raises:
        ValueError: the type is not one of `TYPES`, or the bytes are no whole number of blocks.
    """
    entry = TYPES.get(kind)
    if entry is None or entry.levels is None:
        known = ", ".join(name for name, known in TYPES.items() if known.levels)
        raise ValueError(f"GGUF type {kind} cannot be unpacked; known are {known}.")
    if packed.dtype != torch.uint8 or packed.shape[-1] % entry.size:
        raise ValueError(
            f"{kind} rows are whole blocks of {entry.size} bytes (uint8); got {packed.dtype} {tuple(packed.shape)}."
        )
    shape = (*packed.shape[:-1], packed.shape[-1] // entry.size * entry.block)
    blocks = packed.reshape(-1, entry.size)
    out = torch.empty((blocks.shape[0], entry.block), dtype=dtype, device=packed.device)
    step = max(CHUNK.get(packed.device.type, CHUNK["other"]) // entry.block, 1)
    for start in range(0, blocks.shape[0], step):
        levels, scale, added = entry.levels(blocks[start : start + step])
        values = levels * scale
        if added is not None:
            values += added
        out[start : start + step].view(values.shape).copy_(values)
    return out.view(shape)
