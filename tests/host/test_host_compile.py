"""Compiled blocks in the host: the eager numbers, compiled once, for our MODEL and a native one, and gone after it."""

from __future__ import annotations

import pytest
from compiler import needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def result(inside) -> dict:
    return inside("compiled")


@pytest.mark.parametrize("model", ["ours", "native"])
def test_compiled_samplings_give_the_eager_numbers(result, model):
    # float32 sums that fuse otherwise, over four steps
    assert max(result[model]["errors"]) < 1e-4


@pytest.mark.parametrize("model", ["ours", "native"])
def test_nothing_is_compiled_again_for_prompts_sizes_and_loras(result, model):
    first, *later = result[model]["graphs"]
    assert first > 0 and result[model]["seconds"] > 0
    assert later == [0] * len(later)


def test_a_kind_of_block_is_one_graph(result):
    assert result["ours"]["graphs"][0] == 2


@pytest.mark.parametrize("model", ["ours", "native"])
def test_the_shared_network_is_eager_after_it(result, model):
    assert result[model]["eager_after"]


def test_skipping_work_gives_the_same_compiled(result):
    assert result["with_accelerate"] < 1e-4


def test_without_a_compiler_the_model_is_plain(result):
    assert result["without"] == 0
