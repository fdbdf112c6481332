"""Attention by whole rows in half precision: plain attention to a few roundings, in memory of its own size."""

from __future__ import annotations

import pytest
import torch
from compiler import needs_compiler
from rounding import relative
from torch.profiler import ProfilerActivity, profile

from kontext_core.models import rows
from kontext_core.models.attention import attention
from kontext_core.models.rows import rows_attention


def drawn(batch: int, heads: int, queries: int, keys: int, spread: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    q = spread * torch.randn(batch, heads, queries, 64, generator=generator)
    k, v = torch.randn(2, batch, heads, keys, 64, generator=generator)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


# What rounds to bfloat16 is a logit beside its row's largest, a weight and a mean: three roundings of at most 2^-8, in
# the mean over many values less than half as large. Logits spread by 6 have their largest among the sampled keys more
# rarely: twice that.
@pytest.mark.parametrize(("spread", "allowed"), [(1.0, 1.0), (3.0, 1.5), (6.0, 2.0)])
@pytest.mark.parametrize("size", [(1, 3, 700, 700), (2, 5, 90, 700), (2, 1, 33, 20)])
def test_it_is_plain_attention_to_a_few_roundings(size, spread, allowed):
    q, k, v = drawn(*size, spread)
    exact = attention(q.float(), k.float(), v.float())
    found = rows_attention(q, k, v)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert relative(found, exact) < allowed * 2**-8


def test_views_into_joined_projections_are_read_right():
    joined = torch.randn(1, 200, 3, 4, 64).bfloat16().permute(2, 0, 3, 1, 4)
    q, k, v = joined
    assert torch.equal(
        rows_attention(q, k, v), rows_attention(q.contiguous(), k.contiguous(), v.contiguous())
    )


def test_many_rows_are_taken_piece_by_piece_with_the_same_answer(monkeypatch):
    q, k, v = drawn(1, 2, 200, 300)
    whole = rows_attention(q, k, v)
    monkeypatch.setattr(rows, "_ROW_BYTES", 64 * 300 * 2)
    assert torch.equal(rows_attention(q, k, v), whole)


def test_a_key_far_above_all_that_were_sampled_takes_everything():
    q, k, v = drawn(1, 1, 70, 2000)
    k[0, 0, 1] = 200 * q[0, 0, 5]  # logits of hundreds, and number 1 is not among every 7th key
    found = rows_attention(q, k, v)
    assert torch.isfinite(found).all()
    assert torch.equal(found[0, 5], v[0, 0, 1])


def test_with_a_mask_or_gradients_it_is_pytorchs_own():
    q, k, v = drawn(1, 2, 40, 40)
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:, :20] = True
    assert torch.equal(rows_attention(q, k, v, mask), attention(q, k, v, mask))
    q.requires_grad_()
    rows_attention(q, k, v).float().sum().backward()
    assert q.grad is not None


def test_its_memory_is_a_cache_of_logits_and_what_it_was_given():
    q, k, v = drawn(1, 4, 4096, 4096)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        rows_attention(q, k, v)
    now = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    given = q.nbytes  # the result, and at most one copy each of a group's queries, keys and values
    threads = min(torch.get_num_threads(), 4)
    assert most < 4 * given + threads * 1.2 * rows._ROW_BYTES
    assert most < 0.2 * 4 * 4096 * 4096 * 2, "all logits are never there at once"


@needs_compiler
def test_the_compiler_takes_it_as_one_operation_of_any_size():
    compiled = torch.compile(lambda q, k, v: rows_attention(q * 2, k, v) + 1, fullgraph=True, dynamic=True)
    for queries, keys in ((70, 90), (33, 120)):
        q, k, v = drawn(1, 2, queries, keys)
        with torch.no_grad():
            assert torch.equal(compiled(q, k, v), rows_attention(q * 2, k, v) + 1)
