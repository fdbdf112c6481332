"""Rectified flow, the convention used everywhere: t = 1 is noise, t = 0 is data.

x_t = (1 − t)·x_0 + t·eps and velocity = dx/dt = eps − x_0, so Euler is x += (t_next − t)·velocity.
Source: black-forest-labs/flux src/flux/sampling.py `denoise`; arXiv 2403.03206 eq. 13.
"""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast_time(t: Tensor | float, like: Tensor) -> Tensor:
    """t, a scalar or (B,), shaped to multiply `like` (B, ...); float32 or wider."""
    t = torch.as_tensor(t, device=like.device)
    if t.dtype not in (torch.float32, torch.float64):
        t = t.float()
    return t.reshape(-1, *([1] * (like.ndim - 1))) if t.ndim else t


def interpolate(x_0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """x_t (B, ...) on the straight line from data x_0 to noise eps."""
    t = broadcast_time(t, x_0)
    return ((1 - t) * x_0 + t * eps).to(x_0.dtype)


def velocity_target(x_0: Tensor, eps: Tensor) -> Tensor:
    """What the model is trained to give: eps − x_0."""
    return eps - x_0


def x_0_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """The data end of the line through x_t with this velocity: x_t − t·velocity."""
    return (x_t - broadcast_time(t, x_t) * velocity).to(x_t.dtype)


def eps_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """The noise end of the line through x_t with this velocity: x_t + (1 − t)·velocity."""
    return (x_t + (1 - broadcast_time(t, x_t)) * velocity).to(x_t.dtype)


def velocity_from_x_0(x_t: Tensor, x_0: Tensor, t: Tensor | float) -> Tensor:
    """The velocity whose data end is x_0: (x_t − x_0) / t; t > 0."""
    return ((x_t - x_0) / broadcast_time(t, x_t)).to(x_t.dtype)
