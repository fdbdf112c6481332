"""Samplers: plain functions of (velocity, x, timesteps, on_step), named after their algorithms.

`velocity(x, t)` gives dx/dt at x (B, ...) and time t, a float in (0, 1]. `timesteps` falls from its first
value to 0. x keeps its dtype; every update is computed in float32. `on_step` is called after each step and
may raise to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .latents import seed_after

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What a step left: `x` after it, at time `t`, and the data `x_0` it predicts."""

    index: int
    num_steps: int
    t: float
    x: Tensor
    x_0: Tensor


OnStep = Callable[[StepInfo], None]


def _times(timesteps: Tensor) -> list[float]:
    times = [float(t) for t in timesteps]
    if len(times) < 2 or any(a <= b for a, b in zip(times, times[1:], strict=False)) or times[-1] < 0:
        raise ValueError(f"timesteps must fall strictly, two or more of them, none below 0; got {times}")
    return times


def _report(on_step: OnStep | None, index: int, times: Sequence[float], x: Tensor, x_0: Tensor) -> None:
    if on_step is not None:
        on_step(StepInfo(index=index, num_steps=len(times) - 1, t=times[index + 1], x=x, x_0=x_0))


def euler(velocity: Velocity, x: Tensor, timesteps: Tensor, on_step: OnStep | None = None) -> Tensor:
    """First order: x += (t_next − t)·v. Source: black-forest-labs/flux src/flux/sampling.py `denoise`."""
    times = _times(timesteps)
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        v = velocity(x, t).float()
        x_0 = x.float() - t * v
        x = (x.float() + (t_next - t) * v).to(x.dtype)
        _report(on_step, i, times, x, x_0)
    return x


def heun(velocity: Velocity, x: Tensor, timesteps: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Second order, two evaluations a step but one in the last. Source: arXiv 2206.00364 algorithm 1."""
    times = _times(timesteps)
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        v = velocity(x, t).float()
        x_0 = x.float() - t * v
        x_next = (x.float() + (t_next - t) * v).to(x.dtype)
        if t_next > 0:
            v_next = velocity(x_next, t_next).float()
            x_next = (x.float() + (t_next - t) * (v + v_next) / 2).to(x.dtype)
        x = x_next
        _report(on_step, i, times, x, x_0)
    return x


def dpmpp_2m(velocity: Velocity, x: Tensor, timesteps: Tensor, on_step: OnStep | None = None) -> Tensor:
    """DPM-Solver++(2M): second order from one evaluation a step, in log-SNR time of the rectified flow.

    With alpha = 1 − t, sigma = t and lambda = log(alpha/sigma), the data prediction is extrapolated from the
    last two steps. The first step (lambda = −inf at t = 1) and the last (t = 0) are first order.
    Source: arXiv 2211.01095 algorithm 2.
    """
    times = _times(timesteps)
    log_snr = [torch.logit(torch.tensor(1 - t, dtype=torch.float64)).item() for t in times]
    previous: Tensor | None = None
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        x_0 = x.float() - t * velocity(x, t).float()
        guess = x_0
        if previous is not None and t_next > 0 and t < 1 and times[i - 1] < 1:
            ratio = (log_snr[i] - log_snr[i - 1]) / (log_snr[i + 1] - log_snr[i])
            guess = x_0 + (x_0 - previous) / (2 * ratio)
        x = (t_next / t * x.float() + (1 - t_next / t) * guess).to(x.dtype)
        previous = x_0
        _report(on_step, i, times, x, x_0)
    return x


def few_step(
    velocity: Velocity,
    x: Tensor,
    timesteps: Tensor,
    on_step: OnStep | None = None,
    *,
    seed: int | Sequence[int] = 0,
) -> Tensor:
    """For distilled models: predict x_0, noise it again with fresh noise to the next t. Seeded by sample.

    Source: arXiv 2403.12015 section 3.
    """
    times = _times(timesteps)
    seeds = [seed_after(seed, i) for i in range(len(x))] if isinstance(seed, int) else list(seed)
    generators = [torch.Generator("cpu").manual_seed(value ^ 0x5DEECE66D) for value in seeds]
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        x_0 = x.float() - t * velocity(x, t).float()
        if t_next > 0:
            fresh = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device)
            x = ((1 - t_next) * x_0 + t_next * fresh).to(x.dtype)
        else:
            x = x_0.to(x.dtype)
        _report(on_step, i, times, x, x_0)
    return x


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "few_step": few_step}
