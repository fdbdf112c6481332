"""K-types of our making: read by the gguf package, with no more error than llama.cpp's own."""

from __future__ import annotations

import pytest
import torch

from kontext_core.weights import ggml_types
from kontext_core.weights.k_quants import QUANTISERS, pack_k

gguf = pytest.importorskip("gguf", reason="the gguf package reads independently: pip install gguf")

# Relative root mean square error of ggml's quantize_row_*_ref on 524,288 normal numbers (where it was measured),
# else the error measured here with a hundredth added.
LLAMA_CPP = {"Q3_K": 0.1507, "Q4_K": 0.0714, "Q6_K": 0.0177}
OURS = {"Q2_K": 0.272, "Q5_K": 0.0362}


def error(x: torch.Tensor, kind: str) -> float:
    read = gguf.dequantize(pack_k(x, kind).numpy(), gguf.GGMLQuantizationType[kind])
    return ((torch.from_numpy(read.copy()) - x).norm() / x.norm()).item()


@pytest.mark.parametrize("kind", QUANTISERS)
def test_errors_are_at_most_llama_cpps(kind):
    x = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    assert error(x, kind) < (LLAMA_CPP | OURS)[kind]


@pytest.mark.parametrize("kind", QUANTISERS)
def test_heavy_tails_cost_a_quarter_more_and_no_worse(kind):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 1024, generator=generator)
    # Student's t with 4 degrees of freedom.
    heavy = normal / (torch.randn(4, 64, 1024, generator=generator).square().mean(0)).sqrt()
    assert error(heavy, kind) < 1.35 * error(normal, kind)


@pytest.mark.parametrize("kind", QUANTISERS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.1, -200.0])
def test_constant_blocks_come_back(kind, value):
    x = torch.full((2, 512), value)
    # A constant is one level; its scale is rounded to float16 (2^-11) and Q2_K's to 4 bits of a block's largest.
    assert torch.allclose(ggml_types.unpack(pack_k(x, kind), kind), x, rtol=0.002, atol=1e-6)


@pytest.mark.parametrize("kind", QUANTISERS)
def test_a_single_large_weight_among_zeros_survives(kind):
    x = torch.zeros(1, 512)
    x[0, 300] = -3.0
    read = ggml_types.unpack(pack_k(x, kind), kind)
    # A minimum that float16 rounds leaves its rest on the zeros of its group.
    assert (read - x).abs().max() < 0.002


@pytest.mark.parametrize("kind", QUANTISERS)
def test_rows_do_not_touch_each_other(kind):
    x = torch.randn(700, 256, generator=torch.Generator().manual_seed(1))
    whole = pack_k(x, kind)
    assert whole.shape == (700, ggml_types.TYPES[kind].size)
    assert torch.equal(whole[600:603], pack_k(x[600:603], kind))
