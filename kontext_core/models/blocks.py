"""What the flow transformer is made of: embedders, norms, modulation, the two kinds of blocks, the final layer.

Source: black-forest-labs/flux src/flux/modules/layers.py. Blocks take their modulation ready-made and a `Scratch` for
what they all need for a while; see `transformer` for how they are put together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import tiled
from .attention import Attention, attention
from .rope import Rope, apply_rope

if TYPE_CHECKING:
    from .transformer import TransformerParams


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10_000, time_factor: float = 1000.0
) -> Tensor:
    """Sinusoids (B, dim) of t (B,) in 0..1, cosines first, float32."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = (time_factor * t.float())[:, None] * freqs
    return torch.cat((args.cos(), args.sin()), dim=-1)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, hidden_size: int, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        self.in_layer = operations.Linear(in_dim, hidden_size, dtype=dtype, device=device)
        self.out_layer = operations.Linear(hidden_size, hidden_size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """x / rms(x) in float32, then times `scale`; eps 1e-6."""

    def __init__(self, dim: int, dtype: Any, device: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * self.scale.to(x)


class QKNorm(nn.Module):
    """Holds the norms of a stream's queries and keys; `join_heads` applies them."""

    def __init__(self, dim: int, dtype: Any, device: Any) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim, dtype, device)
        self.key_norm = RMSNorm(dim, dtype, device)


def join_heads(
    streams: Sequence[tuple[Tensor, QKNorm]], num_heads: int, rope: Rope | None, scratch: tiled.Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, normed and rotated, and v, each (B, heads, sum(L_i), D), of streams joined along their tokens.

    Args:
        streams: (q, k, v fused (B, L_i, 3·hidden), the stream's norms) in order.
    """
    split = [rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=num_heads) for qkv, _ in streams]
    v = split[0][2] if len(split) == 1 else torch.cat([part[2] for part in split], dim=2)
    queries = [(part[0], norm.query_norm) for part, (_, norm) in zip(split, streams, strict=True)]
    keys = [(part[1], norm.key_norm) for part, (_, norm) in zip(split, streams, strict=True)]
    return _norm_and_rotate("q", queries, rope, scratch), _norm_and_rotate("k", keys, rope, scratch), v


def _norm_and_rotate(
    name: str, parts: Sequence[tuple[Tensor, RMSNorm]], rope: Rope | None, scratch: tiled.Scratch
) -> Tensor:
    first = parts[0][0]
    if tiled.usable(first):
        shape = (*first.shape[:2], sum(x.shape[2] for x, _ in parts), first.shape[3])
        return tiled.norm_and_rotate(
            [(x, norm.scale) for x, norm in parts], rope, scratch.get(name, shape, first)
        )
    normed = [norm(x) for x, norm in parts]
    return apply_rope(normed[0] if len(normed) == 1 else torch.cat(normed, dim=2), rope)


def gelu_mlp(mlp: nn.Sequential, x: Tensor, scratch: tiled.Scratch) -> Tensor:
    """Linear, GELU (tanh), Linear; without gradients to keep the activation overwrites its input."""
    if not tiled.usable(x):
        return mlp(x)
    hidden = scratch.linear("wide", mlp[0], x)
    return mlp[2](tiled.gelu_into(hidden, hidden))


class SelfAttention(nn.Module):
    """Holds one stream's projections; `join_heads` and the block's attention join both streams."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, operations: Any, dtype: Any, device: Any
    ) -> None:
        super().__init__()
        self.qkv = operations.Linear(dim, dim * 3, bias=qkv_bias, dtype=dtype, device=device)
        self.norm = QKNorm(dim // num_heads, dtype, device)
        self.proj = operations.Linear(dim, dim, dtype=dtype, device=device)


class Modulation(nn.Module):
    """Linear of silu(vec): 6 vectors for a double-stream block's stream, 3 for a single-stream block."""

    def __init__(self, dim: int, double: bool, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        self.lin = operations.Linear(dim, (6 if double else 3) * dim, dtype=dtype, device=device)

    def forward(self, silu_vec: Tensor) -> Tensor:
        return self.lin(silu_vec)


class ModulationTables(NamedTuple):
    """Every block's shifts, scales and gates, rows being (t, prompt) pairs.

    double: a pair (image (B, 6·hidden), text (B, 6·hidden)) a block; single: (B, 3·hidden) a block;
    final: (B, 2·hidden) as shift, scale.
    """

    double: tuple[tuple[Tensor, Tensor], ...]
    single: tuple[Tensor, ...]
    final: Tensor

    def rows(self, start: int, stop: int) -> ModulationTables:
        """The tables of rows start..stop."""
        return ModulationTables(
            tuple((img[start:stop], txt[start:stop]) for img, txt in self.double),
            tuple(rows[start:stop] for rows in self.single),
            self.final[start:stop],
        )


def per_token(modulation: Tensor) -> Tensor:
    """(B, C) -> (B, 1, C); what differs by token, (B, L, C), stays as it is."""
    return modulation[:, None] if modulation.ndim == 2 else modulation


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale)·LayerNorm(x) + shift; x (B, L, C), shift and scale (B, C) or (B, L, C).

    LayerNorm has eps 1e-6 and no affine.
    """
    if x.shape[0] == 1 and shift.ndim == 2:
        # one row: the modulation is LayerNorm's own affine, so the whole line is a single kernel
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], eps=1e-6)
    return torch.addcmul(per_token(shift), F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + per_token(scale))


class DoubleStreamBlock(nn.Module):
    """Image and text tokens with weights of their own, joined in attention."""

    def __init__(self, params: TransformerParams, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        dim, hidden = params.hidden_size, params.mlp_hidden
        self.num_heads = params.num_heads
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(dim, True, operations, dtype, device))
            attn = SelfAttention(dim, params.num_heads, params.qkv_bias, operations, dtype, device)
            setattr(self, f"{stream}_attn", attn)
            mlp = nn.Sequential(
                operations.Linear(dim, hidden, dtype=dtype, device=device),
                nn.GELU(approximate="tanh"),
                operations.Linear(hidden, dim, dtype=dtype, device=device),
            )
            setattr(self, f"{stream}_mlp", mlp)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        rope: Rope | None,
        attend: Attention = attention,
        mask: Tensor | None = None,
        scratch: tiled.Scratch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """img (B, N+M, hidden), txt (B, L, hidden) -> the same shapes; the attention order is text, image."""
        scratch = scratch or tiled.Scratch()
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, dim=-1)
        img_qkv = scratch.linear("wide", self.img_attn.qkv, modulate(img, img_shift1, img_scale1))
        txt_qkv = scratch.linear("text", self.txt_attn.qkv, modulate(txt, txt_shift1, txt_scale1))
        streams = ((txt_qkv, self.txt_attn.norm), (img_qkv, self.img_attn.norm))
        q, k, v = join_heads(streams, self.num_heads, rope, scratch)
        attn = attend(q, k, v, mask)
        txt_attn, img_attn = attn.split((txt.shape[1], img.shape[1]), dim=1)
        img = torch.addcmul(img, per_token(img_gate1), self.img_attn.proj(img_attn))
        out = gelu_mlp(self.img_mlp, modulate(img, img_shift2, img_scale2), scratch)
        img = torch.addcmul(img, per_token(img_gate2), out)
        txt = torch.addcmul(txt, per_token(txt_gate1), self.txt_attn.proj(txt_attn))
        out = gelu_mlp(self.txt_mlp, modulate(txt, txt_shift2, txt_scale2), scratch)
        txt = torch.addcmul(txt, per_token(txt_gate2), out)
        return img, txt


class SingleStreamBlock(nn.Module):
    """One sequence, attention and MLP in parallel, their projections fused."""

    def __init__(self, params: TransformerParams, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        dim, hidden = params.hidden_size, params.mlp_hidden
        self.num_heads = params.num_heads
        self.split = (3 * dim, hidden)
        self.linear1 = operations.Linear(dim, 3 * dim + hidden, dtype=dtype, device=device)
        self.linear2 = operations.Linear(dim + hidden, dim, dtype=dtype, device=device)
        self.norm = QKNorm(dim // params.num_heads, dtype, device)
        self.modulation = Modulation(dim, False, operations, dtype, device)

    def forward(
        self,
        x: Tensor,
        mod: Tensor,
        rope: Rope | None,
        attend: Attention = attention,
        mask: Tensor | None = None,
        scratch: tiled.Scratch | None = None,
    ) -> Tensor:
        """x (B, L+N+M, hidden) -> the same shape."""
        scratch = scratch or tiled.Scratch()
        shift, scale, gate = mod.chunk(3, dim=-1)
        qkv, mlp = scratch.linear("wide", self.linear1, modulate(x, shift, scale)).split(self.split, dim=-1)
        q, k, v = join_heads(((qkv, self.norm),), self.num_heads, rope, scratch)
        attn = attend(q, k, v, mask)
        if tiled.usable(x):
            joined = scratch.get("joined", (*attn.shape[:2], attn.shape[2] + mlp.shape[2]), attn)
            joined[..., : attn.shape[2]] = attn
            tiled.gelu_into(mlp, joined[..., attn.shape[2] :])
        else:
            joined = torch.cat((attn, F.gelu(mlp, approximate="tanh")), dim=-1)
        out = self.linear2(joined)
        return torch.addcmul(x, per_token(gate), out)


class FinalLayer(nn.Module):
    def __init__(self, params: TransformerParams, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        dim = params.hidden_size
        self.linear = operations.Linear(dim, params.out_channels, dtype=dtype, device=device)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), operations.Linear(dim, 2 * dim, dtype=dtype, device=device)
        )

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        shift, scale = mod.chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))
