"""Muon: momentum whose matrices are orthogonalised, for the hidden weights of a network.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the update scaled
to the size of AdamW's as in arXiv 2502.16982. PyTorch has one since 2.9; it multiplies in bfloat16 wherever it runs,
which on a CPU without bfloat16 in hardware takes longer than the network itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..devices import fast_dtype

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of one Newton-Schulz step: steepest at zero; singular values end between about 0.7 and 1.2."""


def orthogonalise(matrix: Tensor, *, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """The nearest matrix (rows, columns) with singular values of about 1, by Newton-Schulz steps."""
    a, b, c = QUINTIC
    x = matrix.to(fast_dtype(matrix.device, torch.bfloat16))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, at 0.2 √max(rows, columns) times the rate.

    Args:
        params: matrices.
        lr: the rate, of AdamW's order; weight_decay: decoupled.

    Raises:
        ValueError: a parameter that is no matrix.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices; this parameter is {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(buffer, group["momentum"]))
                rate = group["lr"] * 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-rate)
