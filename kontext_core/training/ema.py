"""Exponential moving average of weights, in float32, with a warm start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .parallel import full, like


class Ema:
    """shadow ← d·shadow + (1 − d)·weight, with d = min(decay, (1 + n)/(10 + n)) at update n."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay is {decay}; it must be in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.shadow = {
            name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = dict(module.named_parameters())
        shadow = list(self.shadow.values())
        torch._foreach_lerp_(shadow, [weights[name].detach().float() for name in self.shadow], 1 - decay)

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages, whole, by parameter name."""
        return {name: full(value) for name, value in self.shadow.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.shadow = {name: like(tensors[name], value) for name, value in self.shadow.items()}

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """The module with the averaged weights for the length of a with-block."""
        weights = dict(module.named_parameters())
        kept: dict[str, Tensor] = {name: weights[name].detach().clone() for name in self.shadow}
        try:
            for name, value in self.shadow.items():
                weights[name].data.copy_(value)
            yield
        finally:
            for name, value in kept.items():
                weights[name].data.copy_(value)
