"""One part of FLUX in a file, under the names our models have: shapes to check, tensors to assign.

`open_part` finds the part, strips the prefix, turns foreign names into ours (`keys`), and says for every weight
how it is packed. Tensors stay over the memory map unless our tensor is made of several of theirs.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import autoencoder, clip, t5, transformer
from . import formats, ggml_types, keys
from .files import WeightFile, open_weights
from .formats import AUTOENCODER, CLIP, PART_NAMES, T5, TRANSFORMER, Found
from .keys import Move, Piece
from .packed import FLOAT8, unpack_fp8

MODULES = {TRANSFORMER: transformer, AUTOENCODER: autoencoder, T5: t5, CLIP: clip}


@dataclass(frozen=True)
class Weight:
    """A tensor as stored. kind: None for plain values, "fp8", or a GGUF type's name; `scale` is float8's."""

    data: Tensor
    kind: str | None = None
    scale: Tensor | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        """The numbers themselves in `dtype`."""
        if self.kind is None:
            return self.data.to(dtype)
        if self.kind == "fp8":
            scale = self.scale
            single = scale is not None and scale.numel() == 1
            return unpack_fp8(self.data, float(scale) if single else scale, dtype)
        return ggml_types.unpack(self.data, self.kind, dtype)


class Part:
    """A part of FLUX in an open file.

    Attributes:
        found: part, layout and prefix.
        moves: our key -> how it is made of the file's.
        shapes: our key -> shape.
        unexpected: the file's keys under the prefix that mean nothing to this part.
        ignored: keys that published files carry and FLUX has no use for.
        params: sizes, read off the shapes.
    """

    def __init__(self, file: WeightFile, found: Found):
        self.file, self.found = file, found
        self.formats = formats.layer_formats(file)
        prefix = found.prefix
        others = [other.prefix for other in formats.find_parts(file) if other != found]
        names = {
            key[len(prefix) :]: key
            for key in file.tensors
            if key.startswith(prefix)
            and not any(key.startswith(other) and len(other) > len(prefix) for other in others)
        }
        stored = {
            name: file.tensors[key].shape for name, key in names.items() if not formats.is_auxiliary(name)
        }
        self.ignored = sorted(name for name in stored if _is_ignorable(found.part, name, stored))
        stored = {name: shape for name, shape in stored.items() if name not in set(self.ignored)}
        moves = _moves(found, stored)
        used = {piece.key for move in moves.values() for piece in move.pieces}
        self.unexpected = sorted(stored.keys() - used)
        self.moves = {
            ours: Move(tuple(Piece(names[p.key], p.start, p.stop) for p in m.pieces), m.shape, m.swap_halves)
            for ours, m in moves.items()
        }
        self.shapes = {ours: move.shape for ours, move in self.moves.items()}
        self.params: Any = self._sizes()

    @property
    def name(self) -> str:
        return f"{self.file.path} ({PART_NAMES[self.found.part]}, {formats.LAYOUT_NAMES[self.found.layout]})"

    @property
    def nbytes(self) -> int:
        """Bytes of the part's weights in the file."""
        used = {piece.key for move in self.moves.values() for piece in move.pieces}
        return sum(self.file.tensors[key].nbytes for key in used)

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _sizes(self) -> Any:
        for key in self.shapes:
            # Counts are read off the numbers in names: one name must not make a model of a billion layers.
            if any(field.isdecimal() and int(field[:6]) > len(self.shapes) for field in key.split(".")):
                raise ValueError(
                    f"{self.name}: {key[:80]!r} numbers a layer beyond its {len(self.shapes)} tensors."
                )
        try:
            return MODULES[self.found.part].params_from_shapes(self.shapes)
        except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{self.name}: its sizes make no model: {error}") from error

    def weight(self, key: str) -> Weight:
        """Our tensor `key` as the file packs it."""
        move = self.moves[key]
        pieces = [self._piece(piece) for piece in move.pieces]
        kinds = {(weight.kind, weight.data.dtype) for weight in pieces}
        scales = {
            None if weight.scale is None else tuple(weight.scale.reshape(-1).tolist()) for weight in pieces
        }
        if len(kinds) > 1 or len(scales) > 1:
            # Parts packed in different ways have no common packing: their values are joined.
            pieces = [Weight(weight.values(torch.bfloat16)) for weight in pieces]
        kind, scale = pieces[0].kind, pieces[0].scale
        data = pieces[0].data
        if len(pieces) > 1:
            parts = [weight.data for weight in pieces]
            # torch joins no float8; their bytes are joined instead.
            data = torch.cat([part.view(torch.uint8) for part in parts] if kind == "fp8" else parts)
            data = data.view(parts[0].dtype) if kind == "fp8" else data
            for piece in move.pieces:
                self.file.release(piece.key)
        if move.swap_halves:
            if data.dtype in FLOAT8:
                data = torch.cat(data.view(torch.uint8).chunk(2)[::-1]).view(data.dtype)
            else:
                data = torch.cat(data.chunk(2)[::-1])
        if kind in (None, "fp8"):
            data = data.reshape(move.shape)
        return Weight(data, kind, scale)

    def dtype_name(self, key: str) -> str:
        """The stored dtype of (the first piece of) our tensor."""
        return self.file.tensors[self.moves[key].pieces[0].key].dtype

    def is_packed(self, key: str) -> bool:
        """Whether the tensor needs unpacking before it can be computed with."""
        piece = self.moves[key].pieces[0].key
        layer = piece.removesuffix(".weight")
        return (
            self.dtype_name(key) in ("F8_E4M3", "F8_E5M2")
            or (self.file.container == "gguf" and self.dtype_name(key) not in ggml_types.FLOATS)
            or (piece.endswith(".weight") and (layer in self.formats or self._scale_key(layer) is not None))
        )

    def _scale_key(self, layer: str) -> str | None:
        for name in ("weight_scale", "scale_weight"):
            if f"{layer}.{name}" in self.file.tensors:
                return f"{layer}.{name}"
        return None

    def _piece(self, piece: Piece) -> Weight:
        data = self.file.read(piece.key)
        stored = self.file.tensors[piece.key]
        kind, scale = None, None
        layer = piece.key.removesuffix(".weight")
        if piece.key.endswith(".weight") and layer != piece.key:
            scale_key = self._scale_key(layer)
            declared = self.formats.get(layer, self.formats.get(layer.removeprefix(self.found.prefix)))
            if declared is not None and data.dtype in (torch.uint8, torch.int8):
                data = data.view(torch.float8_e5m2 if declared == "float8_e5m2" else torch.float8_e4m3fn)
            if scale_key is not None:
                scale = self.file.read(scale_key).float()
                if scale.numel() not in (1, stored.shape[0]):
                    raise ValueError(
                        f"{self.file.path}: {scale_key} has {scale.numel():,} numbers; one, or one for each of the "
                        f"{stored.shape[0]:,} rows, is needed."
                    )
        if data.dtype in FLOAT8:
            kind = "fp8"
        elif self.file.container == "gguf" and stored.dtype not in ggml_types.FLOATS:
            kind = stored.dtype
        elif not data.is_floating_point():
            raise ValueError(
                f"{self.file.path}: {piece.key} is {stored.dtype}; weights are floating-point numbers."
            )
        elif scale is not None:
            # A layer that was left in full precision with a scale beside it.
            data = unpack_fp8(data, float(scale) if scale.numel() == 1 else scale, data.dtype)
            scale = None
        if piece.stop is not None:
            data = data[piece.start : piece.stop]
            if scale is not None and scale.numel() > 1:
                scale = scale.reshape(-1)[piece.start : piece.stop]
        return Weight(data, kind, scale)


def _is_ignorable(part: str, name: str, stored: keys.Shapes) -> bool:
    if part == T5:
        duplicate = t5.DUPLICATE_KEYS.get(name)
        return name.startswith(t5.IGNORABLE_PREFIXES) or (duplicate is not None and duplicate in stored)
    if part == CLIP:
        return name in clip.IGNORABLE_KEYS or name.startswith(clip.IGNORABLE_PREFIXES)
    return False


def _moves(found: Found, stored: keys.Shapes) -> dict[str, Move]:
    if found.layout == "diffusers":
        pairs_of = keys.transformer_pairs_of if found.part == TRANSFORMER else keys.autoencoder_pairs_of
        return keys.moves_from_diffusers(stored, pairs_of(stored))
    if found.layout == "llama.cpp":
        named = {keys.t5_name_from_gguf(name): name for name in stored}
        return {ours: Move((Piece(name),), stored[name]) for ours, name in named.items() if ours is not None}
    moves = {}
    for name, shape in stored.items():
        ours = t5.DUPLICATE_KEYS.get(name, name) if found.part == T5 else name
        moves[ours] = Move((Piece(name),), shape)
    return moves


def open_part(path: str | os.PathLike | WeightFile, part: str) -> Part:
    """The wanted part in a file or folder.

    Raises:
        ValueError: the file cannot be read, holds something else, or is of a kind that cannot be used; the
            message says which.
    """
    file = open_weights(path) if isinstance(path, (str, os.PathLike)) else path
    wanted = PART_NAMES[part]
    found = formats.find_parts(file)
    problem = formats.refusal(file)
    if problem is not None:
        raise ValueError(f"{file.path}: {problem}")
    mine = [entry for entry in found if entry.part == part]
    if len(mine) == 1:
        return Part(file, mine[0])
    if len(mine) > 1:
        prefixes = ", ".join(repr(entry.prefix) for entry in mine)
        raise ValueError(
            f"{file.path}: it holds {wanted} {len(mine)} times (under {prefixes}); one is needed."
        )
    if formats.is_lora(file):
        raise ValueError(f"{file.path}: a LoRA, not {wanted}: load it as a LoRA on top of a model.")
    if found:
        what = " and ".join(sorted({PART_NAMES[entry.part] for entry in found}))
        raise ValueError(f"{file.path}: {what}, where {wanted} is needed.")
    raise ValueError(f"{file.path}: not {wanted}: {formats.stranger(file)}.")


def differences(part: Part, expected: keys.Shapes) -> tuple[list[str], list[str], list[str]]:
    """(missing keys, unexpected keys, "key is …, … is needed" of those with another shape)."""
    missing = sorted(expected.keys() - part.shapes.keys())
    unexpected = sorted((part.shapes.keys() - expected.keys()) | set(part.unexpected))
    wrong = [
        f"{key} is {tuple(part.shapes[key])}, {tuple(shape)} is needed"
        for key, shape in expected.items()
        if key in part.shapes and tuple(part.shapes[key]) != tuple(shape)
    ]
    return missing, unexpected, wrong


def check_keys(part: Part, expected: keys.Shapes) -> None:
    """Raises a ValueError that names the file and the first few keys that do not fit."""
    problems = [
        f"{len(names)} {what} ({'; '.join(names[:4])}{'; …' if len(names) > 4 else ''})"
        for what, names in zip(
            ("missing", "unexpected", "of the wrong shape"), differences(part, expected), strict=True
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{part.name}: {', '.join(problems)}. It was read as {len(expected)} tensors of {part.params}; "
            "the file is incomplete, or of another model."
        )
