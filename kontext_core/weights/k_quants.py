"""Quantising to GGUF's K-types, for which the `gguf` package has no quantiser.

Each group of 16 or 32 weights gets a scale (and a minimum) of its own, fitted by least squares over a range of
trial scales; the groups' scales are then rounded to the few bits the block has for them, and the weights are
rounded once more to the scales that were really stored. All errors count alike: llama.cpp weights them by
magnitude, and its mean square errors are a little larger (tests/weights/test_k_quants.py holds its numbers).

Source: block layouts as in `ggml_types`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 256
ROWS = 2**9  # blocks fitted at a time: what fits a processor's cache

TINY = 1e-30

# How far the largest level is stretched beyond its number in a trial; None refines the best fit so far.
TRIALS = (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9, None, None)


def fit_affine(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale >= 0 and minimum >= 0 (n,groups) with x ~ scale * level - minimum, levels 0..top; x (n,groups,size)."""
    low = x.amin(-1, keepdim=True).clamp_max(0)
    span = (x.amax(-1, keepdim=True) - low).clamp_min(TINY)
    size, sum_x = x.shape[-1], x.sum(-1)
    best = torch.full(x.shape[:-1], -torch.inf)
    best_scale, best_minimum = torch.zeros_like(best), torch.zeros_like(best)
    for stretch in TRIALS:
        if stretch is None:  # once more, with levels of the best fit so far
            scale, minimum = best_scale.unsqueeze(-1), best_minimum.unsqueeze(-1)
            levels = ((x + minimum) / scale.clamp_min(TINY)).round_().clamp_(0, top)
        else:
            levels = ((x - low) * ((top + stretch) / span)).round_().clamp_(0, top)
        sum_lx, sum_l, sum_ll = (x * levels).sum(-1), levels.sum(-1), levels.square_().sum(-1)
        # Least squares in two unknowns; where the best minimum has the wrong sign, in the scale alone.
        determinant = size * sum_ll - sum_l * sum_l
        scale = (size * sum_lx - sum_x * sum_l) / determinant.clamp_min(TINY)
        minimum = (sum_l * sum_lx - sum_ll * sum_x) / determinant.clamp_min(TINY)
        alone = (minimum < 0) | (determinant <= 0)
        scale = torch.where(alone, sum_lx / sum_ll.clamp_min(TINY), scale).clamp_min(0)
        minimum = torch.where(alone, 0, minimum)
        # All in the lowest level, as equal negative numbers are: the minimum alone stands for them.
        minimum = torch.where(sum_ll == 0, (-sum_x / size).clamp_min(0), minimum)
        # How much of sum(x²) the fit explains; the error is the rest.
        gain = 2 * (scale * sum_lx - minimum * sum_x) - (
            scale * scale * sum_ll - 2 * scale * minimum * sum_l + minimum * minimum * size
        )
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better, scale, best_scale)
        best_minimum = torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def fit_symmetric(x: Tensor, bottom: int) -> Tensor:
    """Scale of either sign (n,groups) with x ~ scale * level, levels -bottom..bottom-1; x (n,groups,size)."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    # The level -bottom is the one without a partner: the largest weight takes it, whatever its sign.
    largest = torch.where(largest == 0, 1, largest)
    best = torch.full(x.shape[:-1], -torch.inf)
    best_scale = torch.zeros_like(best)
    for stretch in TRIALS:
        if stretch is None:
            scale = best_scale.unsqueeze(-1)
            levels = (x / torch.where(scale == 0, 1, scale)).round_().clamp_(-bottom, bottom - 1)
        else:
            levels = (x * (-(bottom + stretch) / largest)).round_().clamp_(-bottom, bottom - 1)
        sum_lx, sum_ll = (x * levels).sum(-1), levels.square_().sum(-1).clamp_min(TINY)
        gain = sum_lx * sum_lx / sum_ll
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better, sum_lx / sum_ll, best_scale)
    return best_scale


def _half(value: Tensor) -> tuple[Tensor, Tensor]:
    """A block's number as float16 bytes (n,2), and as the float32 that will be read back (n,1)."""
    half = value.half().reshape(-1, 1)
    return half.view(torch.uint8), half.float()


def _rounded(values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """values (n,groups) in whole steps (n,1), or 0 where the step is 0."""
    return torch.where(step == 0, 0, values / torch.where(step == 0, 1, step)).round_().clamp_(low, high)


def _levels(x: Tensor, scale: Tensor, minimum: Tensor | None, low: int, high: int) -> Tensor:
    """x (n,groups,size) rounded to the stored scales (n,groups); 0 where a scale is 0."""
    scale = scale.unsqueeze(-1)
    shifted = x if minimum is None else x + minimum.unsqueeze(-1)
    return torch.where(scale == 0, 0, shifted / torch.where(scale == 0, 1, scale)).round_().clamp_(low, high)


def _gather(levels: Tensor, bits: int) -> Tensor:
    """(..., 8/bits, k) small numbers -> (..., k) bytes: the inverse of `ggml_types._spread`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    return (levels << shifts).sum(-2, dtype=torch.uint8)


def _affine(x: Tensor, top: int, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(scale bytes, minimum bytes, group scales, group minima, levels) of x (n,groups,size).

    top is the highest level, steps the highest number a group's scale or minimum can have.
    """
    scale, minimum = fit_affine(x, top)
    scale_bytes, scale_step = _half(scale.amax(-1) / steps)
    minimum_bytes, minimum_step = _half(minimum.amax(-1) / steps)
    scales = _rounded(scale, scale_step, 0, steps)
    minima = _rounded(minimum, minimum_step, 0, steps)
    levels = _levels(x, scale_step * scales, minimum_step * minima, 0, top)
    return scale_bytes, minimum_bytes, scales.byte(), minima.byte(), levels.byte()


def _symmetric(x: Tensor, bottom: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale bytes, group scales -steps..steps-1 int8, levels from 0 on) of x (n,groups,size)."""
    scale = fit_symmetric(x, bottom)
    place = scale.abs().argmax(-1, keepdim=True)
    scale_bytes, scale_step = _half(scale.gather(-1, place) / -steps)
    scales = _rounded(scale, scale_step, -steps, steps - 1)
    levels = _levels(x, scale_step * scales, None, -bottom, bottom - 1)
    return scale_bytes, scales.to(torch.int8), (levels + bottom).byte()


def _twelve_bytes(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight 6-bit scales and minima (n,8) in the twelve bytes of Q4_K and Q5_K."""
    first, second = scales[:, :4] | (scales[:, 4:] >> 4 << 6), minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    return torch.cat((first, second, (scales[:, 4:] & 15) | (minima[:, 4:] << 4)), dim=1)


def _q4_k(x: Tensor) -> Tensor:
    d, dmin, scales, minima, levels = _affine(x.view(-1, 8, 32), 15, 63)
    return torch.cat(
        (d, dmin, _twelve_bytes(scales, minima), _gather(levels.view(-1, 4, 2, 32), 4).flatten(1)), dim=1
    )


def _q5_k(x: Tensor) -> Tensor:
    d, dmin, scales, minima, levels = _affine(x.view(-1, 8, 32), 31, 63)
    low = _gather((levels & 15).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat((d, dmin, _twelve_bytes(scales, minima), _gather(levels >> 4, 1), low), dim=1)


def _q2_k(x: Tensor) -> Tensor:
    d, dmin, scales, minima, levels = _affine(x.view(-1, 16, 16), 3, 15)
    return torch.cat(
        (scales | (minima << 4), _gather(levels.view(-1, 2, 4, 32), 2).flatten(1), d, dmin), dim=1
    )


def _q3_k(x: Tensor) -> Tensor:
    d, scales, levels = _symmetric(x.view(-1, 16, 16), 4, 32)
    scales = (scales + 32).view(torch.uint8)
    low = _gather((scales & 15).view(-1, 2, 8), 4)
    high = _gather((scales >> 4).view(-1, 4, 4), 2)
    mask = _gather((levels >> 2).view(-1, 8, 32), 1)
    return torch.cat((mask, _gather((levels & 3).view(-1, 2, 4, 32), 2).flatten(1), low, high, d), dim=1)


def _q6_k(x: Tensor) -> Tensor:
    d, scales, levels = _symmetric(x.view(-1, 16, 16), 32, 128)
    low = _gather((levels & 15).view(-1, 2, 2, 64), 4).flatten(1)
    high = _gather((levels >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat((low, high, scales.view(torch.uint8), d), dim=1)


QUANTISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def pack_k(values: Tensor, kind: str) -> Tensor:
    """float32 (rows, columns), columns a multiple of 256 -> uint8 (rows, bytes)."""
    blocks = values.reshape(-1, BLOCK)
    packed = torch.cat([QUANTISERS[kind](chunk) for chunk in blocks.split(ROWS)])
    return packed.view(values.shape[0], -1)
