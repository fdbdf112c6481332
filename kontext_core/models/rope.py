"""Rotary position embedding over (index, y, x): tables of cosines and sines, applied to neighbouring pairs.

Source: black-forest-labs/flux src/flux/math.py; frequencies are taken in float64, as diffusers and ComfyUI do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """cos and sin, each (1 or B, 1, L, D/2) float32, ready to broadcast over heads."""

    cos: Tensor
    sin: Tensor


def rope_tables(ids: Tensor, axes_dim: Sequence[int], theta: float) -> Rope:
    """Tables for ids (L, 3) or (B, L, 3); axes_dim are the head features each axis turns."""
    if ids.ndim == 2:
        ids = ids[None]
    wide = torch.float32 if ids.device.type == "mps" else torch.float64
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** -(torch.arange(0, dim, 2, dtype=wide, device=ids.device) / dim)
        angles.append(ids[..., axis, None].to(wide) * omega)
    angle = torch.cat(angles, dim=-1)[:, None]
    return Rope(angle.cos().float(), angle.sin().float())


def apply_rope(x: Tensor, rope: Rope | None) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]) of x (B, heads, L, D) in float32; the result has x's dtype.

    Without tables x is returned as it is: the caller's own attention turns it then.
    """
    if rope is None:
        return x
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    turned = torch.stack((even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
