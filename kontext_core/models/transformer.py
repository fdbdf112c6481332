"""The flow transformer of FLUX.1: 19 double-stream blocks, 38 single-stream blocks, 3-D RoPE, adaLN modulation.

Notable:
- parameter names are the published checkpoint's (black-forest-labs/flux src/flux/model.py, modules/layers.py);
- layers come from an `operations` namespace (torch.nn, or a host's own), so packed or offloaded weights fit in;
- modulation depends on (t, guidance, pooled text) alone, so it is computed outside the blocks, as a table
  (`modulation_tables`) that one call can fill for a whole schedule;
- whatever does not change between steps (text projection, RoPE) can be computed once and passed in (`prepare`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tiled
from .attention import Attention, attention
from .blocks import (
    DoubleStreamBlock,
    FinalLayer,
    MLPEmbedder,
    ModulationTables,
    SingleStreamBlock,
    timestep_embedding,
)
from .rope import Rope, rope_tables


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
