"""The error that bfloat16 has to make in a network, worked out from its unit roundoff and not from a bfloat16 run.

The model is the standard one: an operation's result is the exact one times (1 + d), |d| <= u = 2^-8. Rounding to
nearest leaves an error that is uniform over the spacing of the result's binade, of variance spacing^2 / 12;
independent errors add in squares. How far they get is the network's own doing: it runs in float32 with such errors,
drawn at random, on the output of every module. A module's output stands for all that is computed between it and the
next one, so it is given the errors of the longest chain of roundings that lies there:

    ROUNDINGS = 6: a projection's own, the QK norm's two (normalised, times the scale), the rotation's, the
    attention weights' and the attention's.

What rounds where this does not count (positions, times, norms' sums, a reduction held in bfloat16) goes over the bound.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2.2 and 2.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

BITS = 8  # of bfloat16's significand, the hidden one included
ROUNDINGS = 6


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def with_bfloat16_weights(module: nn.Module) -> nn.Module:
    """The module in float32 with every weight rounded to bfloat16, so that both dtypes hold the same numbers."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
    return module


def rounded(x: Tensor, generator: torch.Generator, roundings: int = ROUNDINGS) -> Tensor:
    """x with the error of so many independent roundings to bfloat16."""
    spacing = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - BITS)
    error = (torch.rand(x.shape, generator=generator) - 0.5) * spacing * roundings**0.5
    return x + torch.where(x == 0, 0, error)


def bfloat16_bound(
    modules: Iterable[nn.Module], run: Callable[[], Tensor], *, draws: int = 6
) -> tuple[float, Tensor]:
    """(bound on the relative error, exact result) of `run`, which calls these float32 networks.

    The bound is the mean error over several draws of all the roundings, and three standard deviations more: the norm
    of an error is a sum over many values, so the draws lie close together.
    """
    exact = run()
    generator = torch.Generator()

    def hook(_module, _inputs, output):
        if isinstance(output, Tensor):
            return rounded(output, generator) if output.dtype == torch.float32 else output
        if isinstance(output, tuple):
            return tuple(hook(None, None, part) if isinstance(part, Tensor) else part for part in output)
        return output

    handles = [part.register_forward_hook(hook) for module in modules for part in module.modules()]
    try:
        errors = []
        for draw in range(draws):
            generator.manual_seed(draw)
            errors.append(relative(run(), exact))
    finally:
        for handle in handles:
            handle.remove()
    measured = torch.tensor(errors, dtype=torch.float64)
    return float(measured.mean() + 3 * measured.std()), exact
