"""Latents as token sequences: 2×2 patches, 3-D position ids, seeded noise.

Shapes: B batch, C = 16 latent channels, h/w latent cells (1/8 of the pixels), N = (h/2)·(w/2) tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

LATENT_CHANNELS = 16
CELL = 8  # pixels a latent cell
PATCH = 2  # latent cells a token
NUM_SEEDS = 1 << 64  # that a generator knows


def pack(latent: Tensor) -> Tensor:
    """Latent (B, C, h, w) -> tokens (B, N, 4·C); h and w are even.

    Source: black-forest-labs/flux src/flux/sampling.py `prepare`.
    """
    height, width = latent.shape[-2:]
    if height % PATCH or width % PATCH:
        raise ValueError(
            f"latent is {width}×{height} cells; both must be even: use pictures whose sides are multiples of 16"
        )
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, N, 4·C) -> latent (B, C, height, width); height and width in latent cells."""
    if tokens.shape[1] * PATCH * PATCH != height * width:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a latent of {width}×{height} cells")
    return rearrange(
        tokens,
        "b (h w) (c ph pw) -> b c (h ph) (w pw)",
        h=height // PATCH,
        w=width // PATCH,
        ph=PATCH,
        pw=PATCH,
    )


def position_ids(
    height: int, width: int, index: float = 0, offset_y: float = 0, offset_x: float = 0
) -> Tensor:
    """Ids (N, 3) = (index, y, x) in tokens, float32, of a latent of height × width cells."""
    rows, columns = height // PATCH, width // PATCH
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = index
    ids[..., 1] = torch.arange(rows)[:, None] + offset_y
    ids[..., 2] = torch.arange(columns)[None, :] + offset_x
    return ids.reshape(-1, 3)


def text_ids(num_tokens: int) -> Tensor:
    """Ids (L, 3) of text tokens: all zero."""
    return torch.zeros(num_tokens, 3)


def seed_after(seed: int, count: int = 1) -> int:
    """The seed `count` further on; after the largest one, 2^64 - 1, comes 0."""
    return (seed + count) % NUM_SEEDS


def noise(
    batch: int,
    height: int,
    width: int,
    seed: int | Sequence[int],
    *,
    channels: int = LATENT_CHANNELS,
    bfl: bool = False,
) -> Tensor:
    """Standard normal noise (B, C, height, width) on the CPU, equal on every device.

    Sample i of a batch is drawn from seed + i (or from the i-th of several seeds), so it is the picture that a
    single run with that seed gives. float32; with `bfl` drawn in bfloat16 as black-forest-labs/flux
    `get_noise` draws it, one generator for the whole batch.

    Args:
        height: latent cells.
        width: latent cells.
    """
    if bfl:
        first = seed if isinstance(seed, int) else seed[0]
        generator = torch.Generator("cpu").manual_seed(first)
        return torch.randn(batch, channels, height, width, dtype=torch.bfloat16, generator=generator)
    seeds = [seed_after(seed, i) for i in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for a batch of {batch}: give one seed, or one a picture")
    drawn = [
        torch.randn(1, channels, height, width, generator=torch.Generator("cpu").manual_seed(value))
        for value in seeds
    ]
    return torch.cat(drawn)
