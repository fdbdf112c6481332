"""How many multiplications and additions the transformer's blocks take: products of matrices and attention."""

from __future__ import annotations

from .transformer import TransformerParams


def block_operations(params: TransformerParams, num_queries: int, num_keys: int) -> int:
    """Operations of all blocks for one sample; a multiplication and an addition count as two.

    Args:
        num_queries: tokens that go through the blocks.
        num_keys: tokens that they attend to, more than `num_queries` when keys and values are reused.
    """
    return (params.depth + params.depth_single_blocks) * one_block(params, num_queries, num_keys)


def one_block(params: TransformerParams, num_queries: int, num_keys: int) -> int:
    """Operations of one block; a double-stream and a single-stream block take the same."""
    width, hidden = params.hidden_size, params.mlp_hidden
    products = 2 * num_queries * width * (4 * width + 2 * hidden)
    attention = 4 * num_queries * num_keys * width
    return products + attention


def modulation_operations(params: TransformerParams, rows: int) -> int:
    """Operations of the modulation tables of this many (t, prompt) rows."""
    return 2 * rows * params.hidden_size**2 * (12 * params.depth + 3 * params.depth_single_blocks + 2)
