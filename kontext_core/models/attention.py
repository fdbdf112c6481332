"""Attention as the transformer calls it: one function, replaceable by the caller."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Attention = Callable[..., Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of q, k, v (B, heads, L, D) by PyTorch's kernels -> (B, L, heads·D).

    mask, where given, is added to the logits or is boolean (True: attend), broadcast to (B, heads, L, L).
    """
    return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h l d -> b l (h d)")
