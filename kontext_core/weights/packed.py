"""Layers whose weights stay as the file packs them and are unpacked on use, layer by layer, on the device.

`PackedOperations` is an `operations` namespace: the same model code is built with it. A layer's `weight` then
holds the file's own bytes (float8 values, or GGUF blocks as uint8) over the memory map; a forward pass unpacks
one layer's weight to the dtype and on the device of its input, uses it and forgets it. A plain weight in another
dtype, or on another device, is cast or moved on use in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.low_rank import LowRank
from . import ggml_types

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# Applied to an unpacked weight (out,in) just before it is used: how changes that need the weight itself reach
# packed ones. Plain LoRAs are added to the activations instead; see `LowRank`.
Change = Callable[[Tensor], Tensor]


def unpack_fp8(data: Tensor, scale: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """float8 values times their scale (one number, or (rows,) of them), rounded once to `dtype`.

    A Python number enters the product in float32; a tensor of one element would be rounded to `dtype` first.
    """
    if isinstance(scale, Tensor):
        scale = scale.to(data.device, torch.float32)
        return (data.float() * scale.view(-1, *[1] * (data.ndim - 1))).to(dtype)
    weight = data.to(dtype)
    return weight if scale is None else weight.mul_(scale)


class Packed:
    """What packed layers share. `kind` is None (plain), "fp8" or a GGUF type's name."""

    kind: str | None = None
    scale: float | None = None
    row_scale: Tensor | None
    change: Change | None = None
    low_rank: LowRank | None = None

    def assign(self, data: Tensor, kind: str | None, scale: Tensor | None) -> None:
        """Takes a stored weight as it is, without a copy; `scale` is float8's, one number or one a row."""
        self.kind = kind
        self.weight = nn.Parameter(data, requires_grad=False)
        single = scale is not None and scale.numel() == 1
        self.scale = float(scale) if single else None
        self.row_scale = None if single or scale is None else scale.detach().float().reshape(-1)

    @property
    def packing(self) -> str | None:
        """How the weight at hand is packed: None where a plain one was put in the stored one's place."""
        packed = FLOAT8 if self.kind == "fp8" else (torch.uint8,)
        return self.kind if self.weight.dtype in packed else None

    def unpacked(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The weight's values in `dtype`, without `low_rank`; the stored tensor itself when it is that already."""
        data = self.weight if device is None else self.weight.to(device, non_blocking=True)
        if self.packing is None:
            weight = data.to(dtype)
        elif self.kind == "fp8":
            weight = unpack_fp8(data, self.scale if self.row_scale is None else self.row_scale, dtype)
        else:
            weight = ggml_types.unpack(data, self.kind, dtype)
        return weight if self.change is None else self.change(weight)


class Linear(Packed, nn.Linear):
    """nn.Linear over a packed weight."""

    takes_rows = True

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("row_scale", None, persistent=False)

    def reset_parameters(self) -> None:
        """Weights always come from a file."""

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """x (...,in) -> (...,out); with `rows`, each so many rows of x are multiplied alone.

        The bits of a product depend on how many rows it has; the weight is unpacked once all the same.
        """
        bias = None if self.bias is None else self.bias.to(x)
        weight = self.unpacked(x.dtype, x.device)
        if rows is None:
            return self._product(x, weight, bias)
        return torch.cat([self._product(group, weight, bias) for group in x.split(rows)])

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.linear(x, weight, bias)
        return out if self.low_rank is None else self.low_rank.add_to(out, x)


class Embedding(Packed, nn.Embedding):
    """nn.Embedding over a packed table: only the rows asked for are unpacked, to float32."""

    def __init__(self, num_embeddings: int, embedding_dim: int, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.register_buffer("row_scale", None, persistent=False)

    def reset_parameters(self) -> None:
        """Weights always come from a file."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.change is not None:
            return F.embedding(ids, self.unpacked(torch.float32, ids.device))
        rows = ids.reshape(-1).to(self.weight.device)
        if self.packing is None:
            found = self.weight[rows]
        elif self.kind == "fp8":
            # Rows of bytes: torch has no gather of float8.
            found = self.weight.view(torch.uint8)[rows].view(self.weight.dtype)
            found = unpack_fp8(
                found, self.scale if self.row_scale is None else self.row_scale[rows], torch.float32
            )
        else:
            found = ggml_types.unpack(self.weight[rows], self.kind)
        if self.low_rank is not None:
            found = found.float() + self.low_rank.of_rows(rows)
        return found.to(ids.device).view(*ids.shape, -1)


class PackedOperations:
    """Namespace of layers for models over packed files; the rest is torch's own."""

    Linear = Linear
    Embedding = Embedding
    LayerNorm = nn.LayerNorm
    GroupNorm = nn.GroupNorm
    Conv2d = nn.Conv2d


class PlainLinear(nn.Linear):
    """nn.Linear without random numbers, which on the meta device cost seconds and mean nothing."""

    def reset_parameters(self) -> None:
        """Weights always come from a file."""


class PlainEmbedding(nn.Embedding):
    """nn.Embedding without random numbers."""

    def reset_parameters(self) -> None:
        """Weights always come from a file."""


class PlainOperations(PackedOperations):
    """Namespace of layers for models over plain files: torch's own."""

    Linear = PlainLinear
    Embedding = PlainEmbedding
