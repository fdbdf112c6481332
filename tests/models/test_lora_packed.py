"""LoRAs on packed weights: on the activations where that is the same, never a second whole weight."""

from __future__ import annotations

import pytest
import torch
from small_lora import HIDDEN, LAYERS, PARAMS, make_model, make_tensors, same, snapshot

from kontext_core.models.lora import read_lora
from kontext_core.models.lora_apply import apply, patched, remove
from kontext_core.models.t5 import T5Encoder, T5Params
from kontext_core.models.transformer import Flux
from kontext_core.weights.packed import PackedOperations
from kontext_core.weights.quantize import pack


def test_packed_weights_stay_packed_and_are_changed_on_use():
    model = make_model(operations=PackedOperations)
    layer = model.double_blocks[0].img_attn.qkv
    whole = layer.weight.clone()
    layer.assign(whole.to(torch.float8_e4m3fn), "fp8", torch.tensor(0.5))
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(3))
    plain = layer(x)
    lora = read_lora(make_tensors(layers=LAYERS[:1]))
    stored = layer.weight.data_ptr()
    apply({"transformer": model}, [(lora, 0.8)])
    assert layer.weight.data_ptr() == stored and layer.weight.dtype == torch.float8_e4m3fn
    unpacked = whole.to(torch.float8_e4m3fn).float() * 0.5
    expected = torch.nn.functional.linear(x, patched(unpacked, [(lora.patches[0], 0.8)]), layer.bias)
    torch.testing.assert_close(layer(x), expected, **ROUNDING)
    assert not torch.allclose(expected, plain, atol=1e-3)
    remove({"transformer": model})
    assert torch.equal(layer(x), plain)


# Products of at most 128 float32 numbers of about 1, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def read_as(layer: str, kind: str, dora: bool = False):
    """A change of one layer, by kind; `qkv` is three LoRAs of some rows each, `swapped` has its halves so."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    out, columns = dict(Flux(PARAMS, device="meta").named_modules())[layer].weight.shape
    name = f"lora_unet_{layer.replace('.', '_')}"
    if kind == "lora":
        tensors = {f"{name}.lora_down.weight": random(2, columns), f"{name}.lora_up.weight": random(out, 2)}
    elif kind == "loha":
        tensors = {f"{name}.hada_w{i}_{end}": random(*((out, 2) if end == "a" else (2, columns)))
                   for i in (1, 2) for end in "ab"}  # fmt: skip
    elif kind == "lokr":
        tensors = {f"{name}.lokr_w1": random(2, 2), f"{name}.lokr_w2": random(out // 2, columns // 2)}
    elif kind == "qkv":
        tensors = {}
        for rows in "qkv":
            theirs = f"transformer.transformer_blocks.0.attn.to_{rows}"
            tensors[f"{theirs}.lora_A.weight"] = random(3, columns)
            tensors[f"{theirs}.lora_B.weight"] = random(out // 3, 3)
    else:
        tensors = {
            "transformer.norm_out.linear.lora_A.weight": random(2, columns),
            "transformer.norm_out.linear.lora_B.weight": random(out, 2),
        }
    if dora:
        tensors[f"{name}.dora_scale"] = 1 + random(out, 1)
    return read_lora(tensors)


QKV, FINAL = "double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1"


@pytest.mark.parametrize(
    ("layer", "loras", "on_activations"),
    [
        (QKV, [(read_as(QKV, "lora"), 0.8)], True),
        (QKV, [(read_as(QKV, "qkv"), -1.5)], True),
        (QKV, [(read_as(QKV, "lora"), 0.8), (read_as(QKV, "qkv"), 0.5), (read_as(QKV, "lora"), 2.0)], True),
        (FINAL, [(read_as(FINAL, "swapped"), 1.0), (read_as(FINAL, "lora"), 0.3)], True),
        (QKV, [(read_as(QKV, "loha"), 0.8)], False),
        (QKV, [(read_as(QKV, "lokr"), 0.8), (read_as(QKV, "lora"), 1.0)], False),
        (QKV, [(read_as(QKV, "lora"), 1.0), (read_as(QKV, "lora", dora=True), 0.5)], False),
    ],
)
@pytest.mark.parametrize("kind", ["fp8", "Q8_0"])
def test_changes_of_packed_layers_are_those_of_the_weight(layer, loras, on_activations, kind):
    model = make_model(operations=PackedOperations)
    packed = model.get_submodule(layer)
    values = packed.weight.clone()
    if kind == "fp8":
        packed.assign(values.to(torch.float8_e4m3fn), "fp8", torch.tensor(0.5))
    else:
        packed.assign(pack(values, kind), kind, None)
    x = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(3))
    plain, unpacked = packed(x), packed.unpacked(torch.float32).clone()
    changes = [(patch, strength) for lora, strength in loras for patch in lora.patches]
    expected = torch.nn.functional.linear(x, patched(unpacked, changes), packed.bias)
    apply({"transformer": model}, loras)
    assert (packed.low_rank is not None) == on_activations and (packed.change is None) == on_activations
    torch.testing.assert_close(packed(x), expected, **ROUNDING)
    assert not torch.allclose(expected, plain, atol=1e-3)
    # Rows that are multiplied in groups, as modulation's are.
    rows = x.view(6, HIDDEN)
    assert torch.equal(packed(rows, 2), torch.cat([packed(group) for group in rows.split(2)]))
    remove({"transformer": model})
    assert torch.equal(packed(x), plain) and torch.equal(packed.unpacked(torch.float32), unpacked)


def test_a_lora_on_packed_weights_is_rounded_like_bfloat16():
    """In bfloat16 the two ways differ by what either differs from the exact product."""
    model = make_model(operations=PackedOperations)
    layer = model.get_submodule(QKV)
    layer.assign(layer.weight.to(torch.float8_e4m3fn), "fp8", torch.tensor(0.5))
    lora = read_as(QKV, "lora")
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = x.double() @ patched(layer.unpacked(torch.float64), [(lora.patches[0], 1.0)]).T + layer.bias
    merged = patched(layer.unpacked(torch.bfloat16), [(lora.patches[0], 1.0)])
    weight_way = torch.nn.functional.linear(x, merged, layer.bias.bfloat16())
    apply({"transformer": model}, [(lora, 1.0)])
    errors = [(way.double() - exact).norm() for way in (layer(x), weight_way)]
    assert errors[0] < 1.5 * errors[1]


def test_a_lora_reaches_packed_embeddings_row_by_row():
    params = T5Params(vocab_size=64, d_model=32, d_kv=4, d_ff=20, num_layers=1, num_heads=3)
    t5 = T5Encoder(params, operations=PackedOperations).requires_grad_(False)
    t5.shared.assign(pack(torch.randn(64, 32), "Q8_0"), "Q8_0", None)
    ids = torch.tensor([[3, 60, 3]])
    plain, table = t5.shared(ids), t5.shared.unpacked(torch.float32)
    down, up = torch.randn(2, 32), torch.randn(64, 2)
    lora = read_lora({"lora_te3_shared.lora_down.weight": down, "lora_te3_shared.lora_up.weight": up})
    apply({"t5": t5}, [(lora, 0.5)])
    torch.testing.assert_close(t5.shared(ids), (table + 0.5 * up @ down)[ids], **ROUNDING)
    remove({"t5": t5})
    assert torch.equal(t5.shared(ids), plain)


def test_a_damaged_lora_on_packed_weights_is_an_error_and_leaves_no_trace():
    model = make_model(operations=PackedOperations)
    layer = model.get_submodule(QKV)
    layer.assign(layer.weight.to(torch.float8_e4m3fn), "fp8", torch.tensor(0.5))
    tensors = make_tensors(layers=[QKV])
    tensors[f"diffusion_model.{QKV}.lora_A.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="would not be finite"):
        apply({"transformer": model}, [(read_lora(tensors), 1.0)])
    assert layer.low_rank is None and layer.change is None


def test_unmerged_changes_give_the_same_numbers_as_merged_ones():
    merged, unmerged = make_model(operations=PackedOperations), make_model(operations=PackedOperations)
    before = snapshot(unmerged)
    lora = read_lora(make_tensors())
    apply({"transformer": merged}, [(lora, 0.8)])
    apply({"transformer": unmerged}, [(lora, 0.8)], merge=False)
    assert same(unmerged, before)
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(3))
    layers = [model.double_blocks[0].txt_mlp[0] for model in (merged, unmerged)]
    torch.testing.assert_close(layers[0](x), layers[1](x), **ROUNDING)
