"""LoRA training: low-rank changes beside frozen linear layers, saved under the names that every program reads.

y = base(x) + alpha/rank · up(down(x)), with down random and up zero, so that training starts at the model itself.
Source: arXiv 2106.09685 section 4.1.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.lora import lora_patch, save_lora
from ..models.transformer import Flux

ATTENTION = r"_attn\.(qkv|proj)$|single_blocks\.\d+\.linear[12]$"
TARGETS = {
    "attention": ATTENTION,
    "blocks": rf"{ATTENTION}|_mlp\.[02]$",
    "all": rf"{ATTENTION}|_mlp\.[02]$|_mod\.lin$|modulation\.lin$",
}
"""Named choices of layers; "blocks" is what most FLUX LoRAs change."""


class LoraLinear(nn.Module):
    """A linear layer of any kind with a low-rank change beside it; down (rank, in) and up (out, rank), float32."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        device = base.weight.device
        down = torch.empty(rank, base.in_features)
        bound = 1 / math.sqrt(base.in_features)
        self.down = nn.Parameter(down.uniform_(-bound, bound, generator=generator).to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for those that ask a layer for its device and dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return self.base(x) + (self.alpha / self.rank) * change


def add_lora(
    transformer: Flux,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: str | Sequence[str] = "blocks",
    seed: int = 0,
) -> dict[str, LoraLinear]:
    """Freeze the transformer and put a LoRA beside the target layers; returns them by the layers' names.

    Args:
        alpha: strength is alpha / rank; the rank when None.
        targets: a key of `TARGETS`, or regular expressions that layer names are searched with.

    Raises:
        ValueError: rank or alpha out of range, or no layer matches.
    """
    alpha = float(rank) if alpha is None else float(alpha)
    if rank < 1 or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"rank is {rank} and alpha {alpha}; rank must be 1 or more and alpha above 0")
    patterns = [TARGETS.get(targets, targets)] if isinstance(targets, str) else list(targets)
    try:
        wanted = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"targets {patterns} are no regular expressions: {error}") from error
    linear = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
    chosen = [name for name in linear if any(pattern.search(name) for pattern in wanted)]
    if not chosen:
        raise ValueError(
            f"no layer matches {patterns}; use {', '.join(TARGETS)}, or an expression for names such as "
            f"{', '.join(list(linear)[6:9])}"
        )
    transformer.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in chosen:
        owner, _, leaf = name.rpartition(".")
        layers[name] = LoraLinear(linear[name], rank, alpha, generator)
        parent = transformer.get_submodule(owner)
        # not setattr: the layers of an nn.Sequential are named by number
        parent._modules[leaf] = layers[name]
    return layers


def save_trained_lora(
    path: str | os.PathLike,
    layers: dict[str, LoraLinear],
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the LoRA as one file; ComfyUI, diffusers and this package load it."""
    patches = [lora_patch(name, layer.down, layer.up, layer.alpha) for name, layer in layers.items()]
    save_lora(path, patches, dtype=dtype, metadata=metadata)
