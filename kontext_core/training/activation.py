"""Activation checkpointing: blocks that keep little for the backward pass and compute the rest again.

"full" keeps a block's inputs only. "selective" keeps attention's and every second matrix product's results too, the
dearest to compute again, and drops what lies between. Results and gradients are the same bits as without.
Source: arXiv 1604.06174; pytorch/torchtitan for the choice of products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..models.transformer import BlockHooks

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = ("none", "selective", "full")

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


class Checkpointing(BlockHooks):
    """Hooks for `Flux.forward` that checkpoint every `every`-th block.

    Args:
        mode: "selective" or "full".
        every: 1 for all blocks.
    """

    def __init__(self, mode: Mode = "selective", every: int = 1) -> None:
        if mode not in ("selective", "full") or every < 1:
            raise ValueError(
                f"checkpointing is {mode!r} every {every} blocks; use 'selective' or 'full' and 1 or more"
            )
        self.mode, self.every = mode, every

    def double(
        self, index: int, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], img: Tensor, txt: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._run(index, run, img, txt)

    def single(self, index: int, run: Callable[[Tensor], Tensor], x: Tensor, num_text: int) -> Tensor:
        return self._run(index, run, x)

    def _run(self, index: int, run: Callable, *tokens: Tensor):
        if index % self.every or not torch.is_grad_enabled():
            return run(*tokens)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        if self.mode == "selective":
            options["context_fn"] = _contexts
        return checkpoint(run, *tokens, **options)


def hooks(mode: Mode) -> Checkpointing | None:
    """The hooks of a mode; None for "none".

    Raises:
        ValueError: no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"checkpointing is {mode!r}; use one of {', '.join(MODES)}")
    return None if mode == "none" else Checkpointing(mode)


def _contexts():
    """The contexts of one block, whose policy counts products from nought."""
    return create_selective_checkpoint_contexts(_policy())


def _policy() -> Callable:
    """Keeps attention and every second matrix product, counted apart in the forward pass and when computed again."""
    counts = {False: 0, True: 0}

    def policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
        if operation in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if operation in _PRODUCTS:
            counts[context.is_recompute] += 1
            if counts[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
