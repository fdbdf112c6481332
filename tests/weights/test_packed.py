"""Packed layers: one rounding, no copies kept, changes applied on use."""

from __future__ import annotations

import pytest
import torch

from kontext_core.weights.packed import PackedOperations, unpack_fp8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float8_times_its_scale_is_rounded_once(dtype):
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    # A scale that bfloat16 cannot hold: rounding it first would move every weight.
    scale = 0.001234567
    exact = (data.double() * torch.tensor(scale, dtype=torch.float32).double()).to(dtype)
    assert torch.equal(unpack_fp8(data, scale, dtype).nan_to_num(), exact.nan_to_num())


def test_a_scale_for_each_row_multiplies_its_row():
    data = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.tensor([1.0, 2.0, 0.5])
    layer = PackedOperations.Linear(8, 3)
    layer.assign(data, "fp8", scale)
    assert torch.equal(layer.unpacked(torch.float32), data.float() * scale[:, None])


def test_a_plain_weight_in_another_dtype_is_cast_on_use():
    layer = PackedOperations.Linear(4, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 4))
        layer.bias.copy_(torch.randn(2))
    x = torch.randn(3, 4)
    expected = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
    assert torch.equal(layer(x), expected)
    assert layer.weight.dtype == torch.bfloat16


def test_a_change_reaches_packed_weights_and_comes_off_again():
    data = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    layer = PackedOperations.Linear(8, 3, bias=False)
    layer.assign(data, "fp8", torch.tensor(0.5))
    x = torch.randn(2, 8)
    before = layer(x)
    layer.change = lambda weight: weight + 1
    torch.testing.assert_close(layer(x), before + x.sum(-1, keepdim=True))
    layer.change = None
    assert torch.equal(layer(x), before)


def test_a_plain_weight_in_a_packed_ones_place_is_taken_as_it_is():
    """Hosts put patched weights in, and the stored ones back."""
    stored = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    layer = PackedOperations.Linear(8, 3, bias=False)
    layer.assign(stored, "fp8", torch.tensor(0.5))
    packed = layer.weight
    layer.weight = torch.nn.Parameter(torch.ones(3, 8))
    assert torch.equal(layer(torch.ones(1, 8)), torch.full((1, 3), 8.0))
    layer.weight = packed
    assert torch.equal(layer.unpacked(torch.float32), stored.float() * 0.5)
