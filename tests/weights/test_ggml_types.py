"""GGUF blocks unpacked in torch against the gguf package's own unpacking, on random bytes."""

from __future__ import annotations

import pytest
import torch

from kontext_core.weights import ggml_types

gguf = pytest.importorskip("gguf", reason="the gguf package unpacks independently: pip install gguf")

PACKED = [name for name, entry in ggml_types.TYPES.items() if entry.levels]


@pytest.mark.parametrize("name", PACKED)
def test_random_bytes_unpack_bit_for_bit_as_the_gguf_package_does(name):
    entry = ggml_types.TYPES[name]
    packed = torch.randint(0, 256, (40, 3 * entry.size), generator=torch.Generator().manual_seed(0)).byte()
    # Any bytes are valid but for the float16 scales, where NaN and infinity would hide differences.
    blocks = packed.view(-1, entry.size)
    for start in {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}.get(name, (0, 2)):
        blocks[:, start + 1] &= 0b10111111
    expected = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name])
    ours = ggml_types.unpack(packed, name)
    assert ours.shape == (40, 3 * entry.block)
    assert torch.equal(ours.view(torch.int32), torch.from_numpy(expected.copy()).view(torch.int32))


@pytest.mark.parametrize("name", PACKED)
def test_bfloat16_is_the_float32_result_rounded_once(name):
    entry = ggml_types.TYPES[name]
    packed = torch.randint(0, 256, (5, 2 * entry.size), generator=torch.Generator().manual_seed(1)).byte()
    exact = ggml_types.unpack(packed, name)
    rounded = ggml_types.unpack(packed, name, torch.bfloat16)
    assert torch.equal(rounded.nan_to_num(), exact.bfloat16().nan_to_num())


def test_numbers_and_sizes_are_the_packages():
    for name, entry in ggml_types.TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert entry.number == kind.value
        assert (entry.block, entry.size) == gguf.GGML_QUANT_SIZES[kind]


def test_chunks_do_not_show(monkeypatch):
    packed = torch.randint(0, 256, (9, 144 * 2), generator=torch.Generator().manual_seed(2)).byte()
    whole = ggml_types.unpack(packed, "Q4_K", torch.bfloat16)
    monkeypatch.setitem(ggml_types.CHUNK, "cpu", 256)
    assert torch.equal(ggml_types.unpack(packed, "Q4_K", torch.bfloat16).nan_to_num(), whole.nan_to_num())


def test_other_types_and_broken_rows_are_refused():
    with pytest.raises(ValueError, match=r"IQ4_XS cannot be unpacked; known are .*Q4_K"):
        ggml_types.unpack(torch.zeros(2, 136, dtype=torch.uint8), "IQ4_XS")
    with pytest.raises(ValueError, match="whole blocks of 34 bytes"):
        ggml_types.unpack(torch.zeros(2, 33, dtype=torch.uint8), "Q8_0")
