"""Elementwise work in pieces, products in shared memory: plain PyTorch's numbers, and when they are used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kontext_core.models import tiled


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_in_shared_memory_is_the_layers_own(layer, dtype):
    layer, x = layer.to(dtype), torch.randn(2, 7, 24, dtype=dtype)
    scratch = tiled.Scratch()
    with torch.inference_mode():
        found, expected = scratch.linear("wide", layer, x), layer(x)
        assert found.shape == expected.shape
        # the same sum in another order at most: one rounding of the result
        assert torch.allclose(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
        memory = found.data_ptr()
        assert scratch.linear("wide", layer, x[:1]).data_ptr() == memory
        assert scratch.linear("text", layer, x).data_ptr() != memory


def test_memory_grows_to_the_largest_shape_and_is_one_a_name():
    scratch, like = tiled.Scratch(), torch.zeros(1)
    small = scratch.get("wide", (2, 3), like)
    large = scratch.get("wide", (4, 5), like)
    assert small.shape == (2, 3) and large.shape == (4, 5)
    assert scratch.get("wide", (2, 3), like).data_ptr() == large.data_ptr()
    assert sum(buffer.numel() for buffer in scratch.buffers.values()) == 20
    assert scratch.get("wide", (2, 3), like.bfloat16()).dtype == torch.bfloat16


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_does_more_than_a_product_is_called(layer):
    x = torch.randn(3, 24)
    doubled = Doubled(24, 40).requires_grad_(False)
    hooked = nn.Linear(24, 40).requires_grad_(False)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    bare = nn.Linear(24, 40, bias=False).requires_grad_(False)
    scratch = tiled.Scratch()
    with torch.inference_mode():
        for other in (doubled, hooked, bare):
            assert not tiled.is_plain(other, x)
            assert torch.equal(scratch.linear("wide", other, x), other(x))
        assert not tiled.is_plain(layer.bfloat16(), x)
        assert not scratch.buffers
        assert tiled.is_plain(nn.Linear(24, 40), x)
        assert not tiled.Scratch(lambda layer, x: False).plain(nn.Linear(24, 40), x)


def test_gradients_flow_where_they_are_wanted():
    layer, x = nn.Linear(24, 40), torch.randn(3, 24, requires_grad=True)
    scratch = tiled.Scratch()
    scratch.linear("wide", layer, x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None and not scratch.buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_in_pieces_is_pytorchs_in_its_tanh_form(dtype):
    x = (3 * torch.randn(2, 19, 33)).to(dtype)
    expected = F.gelu(x.float(), approximate="tanh")
    found = tiled.gelu_into(x, torch.empty_like(x)).float()
    assert torch.allclose(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(tiled.gelu_into(x, x).float(), found)
