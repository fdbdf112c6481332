"""Sampling grids from t = 1 to t = 0 and the distribution that training draws t from."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Shift = Literal["resolution", "none"] | float

HOST_SHIFT = 1.15  # what ComfyUI uses unless ModelSamplingFlux is in the graph
_SHIFT_AT_256, _SHIFT_AT_4096 = 0.5, 1.15


def resolution_mu(num_tokens: int) -> float:
    """mu of the resolution shift for this many target tokens: 0.5 at 256, 1.15 at 4096, linear.

    Source: black-forest-labs/flux src/flux/sampling.py `get_lin_function`.
    """
    slope = (_SHIFT_AT_4096 - _SHIFT_AT_256) / (4096 - 256)
    return slope * num_tokens + (_SHIFT_AT_256 - slope * 256)


def shift_time(t: Tensor, mu: float) -> Tensor:
    """t' = e^mu / (e^mu + 1/t − 1), written so that 0 and 1 stay where they are."""
    shift = math.exp(mu)
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: Tensor, mu: float) -> Tensor:
    """The inverse of `shift_time`."""
    return shift_time(t, -mu)


def timesteps(num_steps: int, num_tokens: int, shift: Shift = "resolution") -> Tensor:
    """num_steps + 1 times from 1 to 0, float32.

    Args:
        num_tokens: target tokens (pixels / 256).
        shift: "resolution" as the reference does, "none", or a constant mu (1.15 is the host's default).

    Raises:
        ValueError: num_steps < 1, or a shift that is none of these.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be 1 or more")
    grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    if shift == "none":
        return grid.float()
    if shift == "resolution":
        mu = resolution_mu(num_tokens)
    elif isinstance(shift, (int, float)) and math.isfinite(shift):
        mu = float(shift)
    else:
        raise ValueError(f"shift is {shift!r}; use 'resolution', 'none' or a finite number (mu)")
    return shift_time(grid, mu).float()


def few_steps(num_steps: int) -> Tensor:
    """The grid a distilled model was trained on: 4, 2 or 1 equal steps from 1 to 0, unshifted, float32."""
    if num_steps not in (1, 2, 4):
        raise ValueError(f"few-step sampling takes 1, 2 or 4 steps, not {num_steps}")
    return torch.linspace(1, 0, num_steps + 1)


def strength_timesteps(grid: Tensor, strength: float) -> Tensor:
    """The last `strength` (0..1] of a grid's steps, for starting from a picture instead of noise."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
    num_steps = len(grid) - 1
    return grid[num_steps - max(1, round(num_steps * strength)) :]


def training_times(
    batch: int,
    num_tokens: int,
    generator: torch.Generator,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: Shift = "resolution",
) -> Tensor:
    """t (B,) ~ logit-normal(mean, std), then moved with resolution as the sampling grid is.

    Source: arXiv 2403.03206 section 3.1 and eq. 23; arXiv 2506.15742 (Kontext: mode moved with resolution).
    """
    t = torch.sigmoid(mean + std * torch.randn(batch, generator=generator))
    if shift == "none":
        return t
    return shift_time(t, resolution_mu(num_tokens) if shift == "resolution" else float(shift))
