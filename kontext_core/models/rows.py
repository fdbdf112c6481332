"""Attention for processors by whole rows of logits, in the tensors' own half precision.

PyTorch's kernel for the CPU multiplies bfloat16 at its full rate only where there are AMX tiles. Here some hundred
queries of as many heads as there are threads take their logits from one product, their softmax and their sum of values
from another, so that logits never leave the cache and both products run at the rate of a linear layer.

Logits are rounded to the tensors' dtype. What a row's softmax turns on are its largest logits, so a near-maximum (the
largest among keys taken at even distances) is subtracted inside the product, before that rounding: there numbers are
dense. The error is then about twice that of a kernel with float32 logits, one rounding of bfloat16.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .attention import attention

_ROW_BYTES = 4 << 20  # of logits for each thread: its share of the processor's last cache
_SAMPLED_KEYS = 256


def rows_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `attention.attention`; with a mask, or where gradients are wanted, it is that one."""
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if mask is not None or wanted:
        return attention(q, k, v, mask)
    return _attend(q, k, v)


# An operation of its own, so that the compiler neither unrolls the loops nor breaks the block's graph at them. A host
# imports this package under another name, beside a copy that is installed: each has its own namespace.
_NAME = f"{re.sub(r'[^a-zA-Z0-9]', '_', __name__)}::attend"


@torch.library.custom_op(_NAME, mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor")
def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    num_keys, scale = k.shape[2], dim**-0.5
    group = min(torch.get_num_threads(), heads)
    rows = max(_ROW_BYTES // (num_keys * q.element_size()) // 64 * 64, 64)
    logits, summed = q.new_empty(group * rows * num_keys), q.new_empty(group * rows * dim)
    out = q.new_empty(batch, length, heads, dim)
    for sample in range(batch):
        for first in range(0, heads, group):
            of = slice(first, min(first + group, heads))
            keys = k[sample, of].transpose(1, 2).contiguous()
            values = v[sample, of].contiguous()
            few = keys[:, :, :: max(num_keys // _SAMPLED_KEYS, 1)].contiguous()
            for start in range(0, length, rows):
                queries = q[sample, of, start : start + rows].contiguous()
                count, here = queries.shape[:2]
                top = torch.bmm(queries, few).amax(-1, keepdim=True).mul_(-scale)
                weights = logits[: count * here * num_keys].view(count, here, num_keys)
                torch.baddbmm(top, queries, keys, alpha=scale, out=weights)
                torch.softmax(weights, dim=-1, out=weights)
                mean = torch.bmm(weights, values, out=summed[: count * here * dim].view(count, here, dim))
                out[sample, start : start + here, of] = mean.transpose(0, 1)
    return out.flatten(2)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads * dim)
