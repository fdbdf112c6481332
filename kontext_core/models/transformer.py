"""The flow transformer of FLUX.1: 19 double-stream blocks, 38 single-stream blocks, 3-D RoPE, adaLN modulation.

Notable:
- parameter names are the published checkpoint's (black-forest-labs/flux src/flux/model.py, modules/layers.py);
- layers come from an `operations` namespace (torch.nn, or a host's own), so packed or offloaded weights fit in;
- modulation depends on (t, guidance, pooled text) alone, so it is computed outside the blocks, as a table
  (`modulation_tables`) that one call can fill for a whole schedule;
- whatever does not change between steps (text projection, RoPE) can be computed once and passed in (`prepare`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import tiled
from .attention import Attention, attention
from .rope import Rope, apply_rope, rope_tables


@dataclass(frozen=True, kw_only=True)
class TransformerParams:
    """Sizes of a flow transformer; the defaults are FLUX.1 Kontext [dev]."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if sum(self.axes_dim) != self.hidden_size // self.num_heads or any(dim % 2 for dim in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim} must be even numbers that add up to the head size "
                f"{self.hidden_size // self.num_heads}"
            )

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


def params_from_shapes(shapes: dict[str, Sequence[int]]) -> TransformerParams:
    """The sizes that a checkpoint's key shapes imply (BFL keys).

    axes_dim keeps the published proportion 1:3.5:3.5 of the head size.

    Raises:
        ValueError: a key that every FLUX transformer has is missing.
    """
    needed = (
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "double_blocks.0.img_mlp.0.weight",
        "final_layer.linear.weight",
    )
    missing = [key for key in needed if key not in shapes]
    if missing:
        raise ValueError(f"not a FLUX transformer: {', '.join(missing)} missing")
    hidden, in_channels = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    return TransformerParams(
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0],
        vec_in_dim=shapes["vector_in.in_layer.weight"][1],
        context_in_dim=shapes["txt_in.weight"][1],
        hidden_size=hidden,
        mlp_ratio=shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
        num_heads=hidden // head,
        depth=_count(shapes, "double_blocks."),
        depth_single_blocks=_count(shapes, "single_blocks."),
        axes_dim=(head // 8, head * 7 // 16, head * 7 // 16),
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in shapes,
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )


def _count(shapes: dict[str, Sequence[int]], prefix: str) -> int:
    return len({key[len(prefix) :].split(".", 1)[0] for key in shapes if key.startswith(prefix)})


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


class BlockHooks:
    """What a caller may put around every block; the base runs the block and nothing else.

    `run` takes and returns the block's token tensors. A host calls other packs' patches here.
    """

    def double(
        self, index: int, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], img: Tensor, txt: Tensor
    ) -> tuple[Tensor, Tensor]:
        return run(img, txt)

    def single(self, index: int, run: Callable[[Tensor], Tensor], x: Tensor, num_text: int) -> Tensor:
        return run(x)


class Prepared(NamedTuple):
    """What stays the same through all steps of a sampling.

    txt: projected text (B, L, hidden); rope: tables of all tokens; context: embedded context tokens (B, M, hidden),
    if they are not among the tokens that `forward` is given.
    """

    txt: Tensor
    rope: Rope
    context: Tensor | None = None

    def part(self, num_text: int, tokens: Tensor | None, num_target: int) -> Prepared:
        """The same for the text and some of the target's tokens (numbers; None for all), without context."""
        chosen = slice(0, num_text + num_target)
        if tokens is not None:
            chosen = torch.cat((torch.arange(num_text, device=tokens.device), num_text + tokens))
        return Prepared(self.txt, Rope(self.rope.cos[:, :, chosen], self.rope.sin[:, :, chosen]))


class Flux(nn.Module):
    """FLUX.1's velocity network.

    Args:
        params: sizes.
        operations: namespace with `Linear`; torch.nn by default.
    """

    def __init__(
        self, params: TransformerParams, *, operations: Any = nn, dtype: Any = None, device: Any = None
    ) -> None:
        super().__init__()
        self.params = params
        dim = params.hidden_size
        self.img_in = operations.Linear(params.in_channels, dim, dtype=dtype, device=device)
        self.time_in = MLPEmbedder(256, dim, operations, dtype, device)
        self.vector_in = MLPEmbedder(params.vec_in_dim, dim, operations, dtype, device)
        if params.guidance_embed:
            self.guidance_in = MLPEmbedder(256, dim, operations, dtype, device)
        self.txt_in = operations.Linear(params.context_in_dim, dim, dtype=dtype, device=device)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(params, operations, dtype, device) for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(params, operations, dtype, device) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = FinalLayer(params, operations, dtype, device)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start for training from nothing: Xavier layers, zero modulation and output (adaLN-zero)."""
        for name, parameter in self.named_parameters():
            if name.endswith(".scale"):
                nn.init.ones_(parameter)
            elif parameter.ndim < 2 or "mod.lin" in name or "modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)
            elif name.startswith(("time_in", "vector_in", "guidance_in")):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter, generator=generator)

    def vector(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The modulation vector (B, hidden) of timesteps (B,), pooled text y (B, vec_in) and guidance (B,)."""
        vec = self.time_in(timestep_embedding(timesteps, 256).to(dtype))
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError(
                    "this transformer is guidance-distilled: pass guidance, a number a sample (2.5 is usual)"
                )
            vec = vec + self.guidance_in(timestep_embedding(guidance, 256).to(dtype))
        return vec + self.vector_in(y.to(dtype))

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the model computes in: the dtype of a bias, which is never packed as weights may be."""
        return self.final_layer.linear.bias.dtype

    def modulation_tables(
        self,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None,
        dtype: torch.dtype = torch.float32,
        group: int | None = None,
    ) -> ModulationTables:
        """Tables for rows (timesteps[i], y[i], guidance[i]); one call may hold a whole schedule.

        Args:
            group: rows that are multiplied together, all by default. The bits of a product depend on how many
                rows it has: with a batch's size, a schedule's tables are those of its steps one by one.
        """
        rows = group or len(timesteps)
        guidances = [None] * len(timesteps) if guidance is None else guidance.split(rows)
        parts = zip(timesteps.split(rows), y.split(rows), guidances, strict=False)
        silu_vec = torch.cat([F.silu(self.vector(*part, dtype)) for part in parts])

        def table(layer: nn.Module) -> Tensor:
            if rows >= len(silu_vec):
                return layer(silu_vec)
            if getattr(layer, "takes_rows", False):  # packed weights, which are unpacked once for all groups
                return layer(silu_vec, rows)
            return torch.cat([layer(part) for part in silu_vec.split(rows)])

        return ModulationTables(
            tuple((table(block.img_mod.lin), table(block.txt_mod.lin)) for block in self.double_blocks),
            tuple(table(block.modulation.lin) for block in self.single_blocks),
            table(self.final_layer.adaLN_modulation[1]),
        )

    def prepare(
        self, txt: Tensor, txt_ids: Tensor, img_ids: Tensor, context: Tensor | None = None
    ) -> Prepared:
        """What does not change between steps, for `forward(prepared=…)`.

        Args:
            context: (B, M, in_channels), embedded here once; `forward` is then given the target's tokens alone.
            txt: (B, L, context_in).
            txt_ids: (L, 3) or (B, L, 3).
            img_ids: (N+M, 3) or (B, N+M, 3).
        """
        rope = rope_tables(torch.cat((txt_ids, img_ids), dim=-2), self.params.axes_dim, self.params.theta)
        return Prepared(self.txt_in(txt), rope, None if context is None else self.img_in(context))

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor | None,
        txt: Tensor | None,
        txt_ids: Tensor | None,
        timesteps: Tensor,
        y: Tensor | None,
        guidance: Tensor | None = None,
        *,
        num_target: int | None = None,
        prepared: Prepared | None = None,
        modulation: ModulationTables | None = None,
        attend: Attention = attention,
        mask: Tensor | None = None,
        hooks: BlockHooks | None = None,
    ) -> Tensor:
        """The velocity of the target tokens.

        Args:
            img: (B, N+M, in_channels), target tokens first, context tokens after them unless they are prepared.
            img_ids: (N+M, 3) or (B, N+M, 3).
            txt: (B, L, context_in); txt_ids: (L, 3) or (B, L, 3).
            timesteps: (B,) in 0..1; y: (B, vec_in); guidance: (B,).
            num_target: N, to compute and return only the target's tokens; all of them when None.
            prepared: replaces txt, txt_ids, img_ids; modulation: replaces timesteps, y, guidance.

        Returns:
            (B, N, out_channels), or (B, N+M, out_channels) without num_target.
        """
        if prepared is None:
            prepared = self.prepare(txt, txt_ids, img_ids)
        if modulation is None:
            modulation = self.modulation_tables(timesteps, y, guidance, img.dtype)
        hooks = hooks or _NO_HOOKS
        scratch = tiled.Scratch()
        txt, rope, context = prepared
        img = self.img_in(img)
        if context is not None:
            img = torch.cat((img, context), dim=1)
        for index, (block, (img_mod, txt_mod)) in enumerate(
            zip(self.double_blocks, modulation.double, strict=True)
        ):

            def run_double(img: Tensor, txt: Tensor, block=block, img_mod=img_mod, txt_mod=txt_mod):
                return block(img, txt, img_mod, txt_mod, rope, attend, mask, scratch)

            img, txt = hooks.double(index, run_double, img, txt)
        num_text = txt.shape[1]
        x = torch.cat((txt, img), dim=1)
        for index, (block, mod) in enumerate(zip(self.single_blocks, modulation.single, strict=True)):

            def run_single(x: Tensor, block=block, mod=mod):
                return block(x, mod, rope, attend, mask, scratch)

            x = hooks.single(index, run_single, x, num_text)
        stop = x.shape[1] if num_target is None else num_text + num_target
        return self.final_layer(x[:, num_text:stop], modulation.final)


_NO_HOOKS = BlockHooks()
