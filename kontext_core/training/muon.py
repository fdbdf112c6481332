"""Muon: momentum whose matrices are orthogonalised, for the hidden weights of a network.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the update scaled
to the size of AdamW's as in arXiv 2502.16982. PyTorch has one since 2.9; it multiplies in bfloat16 wherever it runs,
which on a CPU without bfloat16 in hardware takes longer than the network itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..devices import fast_dtype
from .parallel import ALONE, World

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of one Newton-Schulz step: steepest at zero; singular values end between about 0.7 and 1.2."""


def orthogonalise(matrix: Tensor, *, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """The nearest matrix (rows, columns) with singular values of about 1, by Newton-Schulz steps.

    In float32 a matrix of twice as many columns as rows, or the other way round, takes its steps in its smaller
    product with itself, which they all are polynomials of: the same to 1e-4, at half to two thirds of the cost.
    """
    a, b, c = QUINTIC
    x = matrix.to(fast_dtype(matrix.device, torch.bfloat16))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    if x.dtype == torch.float32 and x.shape[1] >= 2 * x.shape[0]:
        x = _polynomial(x @ x.T, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _polynomial(gram: Tensor, steps: int) -> Tensor:
    """What all Newton-Schulz steps together multiply a matrix of this product with itself by."""
    a, b, c = QUINTIC
    total: Tensor | None = None
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        total = factor if total is None else factor @ total
        if step < steps - 1:
            gram = factor @ (gram @ factor)
    return total


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, at 0.2 √max(rows, columns) times the rate.

    Args:
        params: matrices.
        lr: the rate, of AdamW's order; weight_decay: decoupled.
        world: processes that each hold all of the matrices; each orthogonalises its share, and they exchange those.

    Raises:
        ValueError: a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        world: World = ALONE,
    ) -> None:
        self.world = world
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices; this parameter is {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            directions: list[tuple[nn.Parameter, Tensor]] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                directions.append((parameter, parameter.grad.lerp(buffer, group["momentum"])))
            for parameter, update in self._orthogonal(directions):
                rate = group["lr"] * 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-rate)

    def _orthogonal(
        self, directions: list[tuple[nn.Parameter, Tensor]]
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter's update. What FSDP shards is orthogonalised by all processes together."""
        whole = [pair for pair in directions if not hasattr(pair[0], "full_tensor")]
        if self.world.size == 1 or not whole:
            yield from ((parameter, orthogonalise(direction)) for parameter, direction in directions)
            return
        whole.sort(key=lambda pair: -pair[0].numel())
        joined = torch.zeros(sum(p.numel() for p, _ in whole), device=whole[0][0].device)
        parts = joined.split([p.numel() for p, _ in whole])
        for number, ((_, direction), part) in enumerate(zip(whole, parts, strict=True)):
            if number % self.world.size == self.world.rank:
                part.copy_(orthogonalise(direction).flatten())
        torch.distributed.all_reduce(joined)
        for (parameter, _), part in zip(whole, parts, strict=True):
            yield parameter, part.view_as(parameter)
        for parameter, direction in directions:
            if hasattr(parameter, "full_tensor"):
                yield parameter, orthogonalise(direction)
