"""Elementwise work of the blocks in pieces that stay in the processor's cache: CPU, no gradients.

PyTorch's eager kernels stream every intermediate through main memory and map fresh pages for every large result.
Here a piece of a few hundred kilobytes goes through all its steps in float32 and is written once, where it is
wanted. The arithmetic is that of the plain functions, with fewer roundings in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .rope import Rope

_ROWS_ROTATE = 64  # rows of all heads: 24 × 64 × 128 float32 = 786 kB
_ROWS_GELU = 8  # rows of the MLP: 8 × 12288 float32 = 393 kB
_GELU_A, _GELU_B = 2 * 0.7978845608028654, 2 * 0.7978845608028654 * 0.044715


def usable(x: Tensor) -> bool:
    """Whether the pieces are worth it here: a CPU, no gradients to keep, and no compiler that fuses by itself."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether calling this layer is nothing but torch.nn.Linear's product, in x's dtype and without hooks."""
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and layer.bias is not None
        and layer.weight.dtype == layer.bias.dtype == x.dtype
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


class Scratch:
    """Buffers that the blocks of one forward pass use in turn, so that their pages are mapped once.

    Args:
        plain: whether a layer's product may be written into a buffer in place of calling the layer.
    """

    def __init__(self, plain: Callable[[nn.Module, Tensor], bool] = is_plain) -> None:
        self.plain = plain
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape in `like`'s dtype; the same memory for the same name."""
        size = math.prod(shape)
        buffer = self.buffers.get((name, like.dtype))
        if buffer is None or len(buffer) < size:
            self.buffers.pop((name, like.dtype), None)  # the smaller one goes before the larger one comes
            buffer = self.buffers[name, like.dtype] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(*shape)

    def linear(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """layer(x), in the memory of this name where the layer is plain and the pieces are usable.

        A large result would otherwise be mapped page by page at every call: it goes back to the system as soon as
        it is freed.
        """
        if not usable(x) or not self.plain(layer, x):
            return layer(x)
        out = self.get(name, (*x.shape[:-1], layer.out_features), x)
        torch.addmm(layer.bias, x.flatten(0, -2), layer.weight.t(), out=out.flatten(0, -2))
        return out


def norm_and_rotate(
    parts: Sequence[tuple[Tensor, Tensor]], rope: Rope | None, out: Tensor, eps: float = 1e-6
) -> Tensor:
    """RMS-norm, scale and rotate queries or keys, several streams joined along the tokens.

    Args:
        parts: (x (B, heads, L_i, D), scale (D,)) of each stream, in order.
        rope: tables for all sum(L_i) tokens, or None to leave the rotation to the caller's attention.
        out: (B, heads, sum(L_i), D), written and returned.
    """
    batch, heads, _, dim = out.shape
    turn = None if rope is None else torch.complex(rope.cos, rope.sin)[:, 0]
    piece = torch.empty(heads, _ROWS_ROTATE, dim, dtype=torch.float32)
    start = 0
    for x, scale in parts:
        scale = scale.float()
        length = x.shape[2]
        for row in range(batch):
            for begin in range(0, length, _ROWS_ROTATE):
                source = x[row, :, begin : begin + _ROWS_ROTATE]
                stop = start + begin + source.shape[1]
                work = piece[:, : source.shape[1]]
                work.copy_(source)
                mean_square = torch.linalg.vector_norm(work, dim=-1, keepdim=True).square_().div_(dim)
                work.mul_(mean_square.add_(eps).rsqrt_()).mul_(scale)
                if turn is not None:
                    angles = turn[row if len(turn) > 1 else 0, start + begin : stop]
                    torch.view_as_complex(work.unflatten(-1, (-1, 2))).mul_(angles)
                out[row, :, start + begin : stop].copy_(work)
        start += length
    return out


def gelu_into(x: Tensor, out: Tensor) -> Tensor:
    """GELU in its tanh form, x·sigmoid(2·sqrt(2/pi)·(x + 0.044715·x³)), of x (B, L, C) into out; returns out."""
    work = torch.empty(2, _ROWS_GELU, x.shape[-1], dtype=torch.float32)
    for source, target in zip(x, out, strict=True):
        for begin in range(0, len(source), _ROWS_GELU):
            rows = source[begin : begin + _ROWS_GELU]
            value, gate = work[0, : len(rows)], work[1, : len(rows)]
            value.copy_(rows)
            torch.mul(value, value, out=gate)
            gate.mul_(_GELU_B).add_(_GELU_A).mul_(value).sigmoid_().mul_(value)
            target[begin : begin + _ROWS_GELU].copy_(gate)
    return out
