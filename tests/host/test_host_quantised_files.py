"""Files that we quantise load in the host's own loaders and compute there what they compute here."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from kontext_core.models.t5 import T5Encoder, T5Params
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.weights.quantize import quantize_file

# The host's detection fixes width and heads and counts the blocks.
PARAMS = TransformerParams(vec_in_dim=32, context_in_dim=64, depth=1, depth_single_blocks=1)
T5 = T5Params(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in Flux(PARAMS, device="meta").state_dict().items():
        if value.ndim == 1:
            state[key] = torch.full(value.shape, 1.0 if key.endswith("scale") else 0.01).bfloat16()
        else:
            drawn = torch.empty(value.shape, dtype=torch.bfloat16).normal_(generator=generator)
            state[key] = drawn.mul_(value.shape[1] ** -0.5)
    save_file(state, folder / "bf16.safetensors")
    for kind in ("fp8_scaled", "fp8_scaled_old"):
        quantize_file(folder / "bf16.safetensors", folder / f"{kind}.safetensors", type=kind)
    torch.manual_seed(0)
    save_file(T5Encoder(T5).state_dict(), folder / "t5_plain.safetensors")
    quantize_file(folder / "t5_plain.safetensors", folder / "t5.safetensors", type="fp8_scaled_old")
    config = {
        "d_ff": 128, "d_kv": 16, "d_model": 64, "num_heads": 4, "num_layers": 2, "vocab_size": 64,
        "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5",
    }  # fmt: skip
    (folder / "t5.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def result(inside, folder) -> dict:
    return inside("quantised_files", str(folder))


@pytest.mark.parametrize("kind", ["fp8_scaled", "fp8_scaled_old"])
def test_the_hosts_loader_computes_what_ours_does(result, kind):
    # Ours computes in float32, the host in the dtype it chooses, bfloat16 for the newer layout: 2^-8 a product.
    assert result[kind]["native"] < 0.01
    # What float8 itself costs is another thing, and larger.
    assert 0.01 < result[kind]["quantisation"] < 0.1


def test_the_plain_file_is_the_yardstick(result):
    assert result["bf16"]["native"] < 0.01


def test_every_key_of_a_scaled_t5_finds_its_place(result):
    assert result["t5"] == {"missing": [], "unexpected": []}


def test_the_host_has_no_key_to_complain_of(result):
    assert result["complaints"] == []
