"""Layers that keep float32 master weights and compute in the dtype of what they are given.

The same arithmetic as FSDP2's mixed precision (float32 shards, lower-precision gather), for one process: the
cast is part of the graph, so gradients arrive in float32 and any optimizer works unchanged.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self.weight.to(x.dtype), bias)


class GroupNorm(nn.GroupNorm):
    """PyTorch's own kernel takes float32 weights with lower-precision pictures as it is."""


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class Embedding(nn.Embedding):
    """Looks up in float32; the caller casts."""
