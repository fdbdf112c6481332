"""Reading LoRAs: what is refused and why; putting them onto networks, and off again bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext_core.models.clip import ClipParams, ClipTextEncoder
from kontext_core.models.lora import lora_patch, read_lora, save_lora
from kontext_core.models.lora_apply import apply, host_patches, patch_state, patched, remove
from kontext_core.models.t5 import T5Encoder, T5Params
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.weights.lora_file import load_lora
from kontext_core.weights.packed import PackedOperations
from kontext_core.weights.quantize import pack

HIDDEN = 32
PARAMS = TransformerParams(
    in_channels=16,
    out_channels=16,
    vec_in_dim=8,
    context_in_dim=12,
    hidden_size=HIDDEN,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
)
LAYERS = ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear2", "img_in"]


def make_model(dtype: torch.dtype = torch.float32, operations=torch.nn) -> Flux:
    model = Flux(PARAMS, operations=operations, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def make_tensors(seed: int = 1, prefix: str = "diffusion_model.", layers=LAYERS) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2, alpha 4, on some layers, with up and down in the layer's sizes."""
    shapes = {name: tuple(value.shape) for name, value in Flux(PARAMS, device="meta").state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        out, columns = shapes[f"{layer}.weight"]
        tensors[f"{prefix}{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator) * 0.1
        tensors[f"{prefix}{layer}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.1
        tensors[f"{prefix}{layer}.alpha"] = torch.tensor(4.0)
    return tensors


def snapshot(model: torch.nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}


def same(model: torch.nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> bool:
    """Whether every weight is the very same memory with the very same bits."""
    return all(
        value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
        for name, value in model.named_parameters()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_loras_add_up_and_come_off_bit_for_bit(dtype):
    model = make_model(dtype)
    before = snapshot(model)
    first, second = read_lora(make_tensors(1)), read_lora(make_tensors(2, layers=LAYERS[:2]))
    reports = apply({"transformer": model}, [(first, 0.8), (second, -0.5)])
    assert [len(report.matched) for report in reports] == [4, 2]
    for layer in LAYERS:
        key = f"{layer}.weight"
        expected = before[key][1].float()
        for tensors, strength in ((make_tensors(1), 0.8), (make_tensors(2, layers=LAYERS[:2]), -0.5)):
            if f"diffusion_model.{layer}.alpha" in tensors:
                names = (f"diffusion_model.{layer}.lora_{end}.weight" for end in "BA")
                up, down = (tensors[name] for name in names)
                expected = expected + strength * 4 / 2 * up @ down
        # one rounding to the weight's dtype of nearly the same float32 numbers
        unit = torch.finfo(dtype).eps
        assert (model.get_parameter(key).float() - expected).abs().max() <= unit * expected.abs().max()
    remove({"transformer": model})
    assert same(model, before)


def test_applying_again_starts_from_the_originals():
    model, other = make_model(), make_model()
    before = snapshot(model)
    first, second = read_lora(make_tensors(1)), read_lora(make_tensors(2))
    apply({"transformer": model}, [(first, 1.0)])
    apply({"transformer": model}, [(second, 0.3)])
    apply({"transformer": other}, [(second, 0.3)])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    apply({"transformer": model}, [])
    assert same(model, before)


def test_strength_zero_touches_no_weight():
    model = make_model()
    before = snapshot(model)
    (report,) = apply({"transformer": model}, [(read_lora(make_tensors()), 0.0)])
    assert same(model, before) and len(report.matched) == 4


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


def test_text_encoders_take_their_part_of_a_file():
    clip = ClipTextEncoder(ClipParams(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, eos_token_id=8))
    t5 = T5Encoder(T5Params(vocab_size=9, d_model=12, d_kv=4, d_ff=20, num_layers=1, num_heads=3))
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
        "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo": (12, 20),
    }
    tensors = make_tensors(prefix="transformer.")
    for name, (out, columns) in sizes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    lora = read_lora(tensors)
    assert lora.parts == {"transformer", "clip", "t5"}
    modules = {"clip": clip, "t5": t5}
    before = {part: snapshot(module) for part, module in modules.items()}
    (report,) = apply(modules, [(lora, 1.0)])
    assert set(report.matched) == set(sizes)
    assert {item.reason for item in report.unmatched} == {"it is for the FLUX transformer, which is not here"}
    assert not same(clip, before["clip"]) and not same(t5, before["t5"])
    remove(modules)
    assert same(clip, before["clip"]) and same(t5, before["t5"])


def test_a_state_dict_is_patched_without_being_touched():
    state = dict(make_model().state_dict())
    before = {key: value.clone() for key, value in state.items()}
    result, (report,) = patch_state(state, [(read_lora(make_tensors()), 0.5)])
    assert all(torch.equal(state[key], before[key]) for key in state)
    changed = {key for key in state if result[key] is not state[key]}
    assert changed == {f"{layer}.weight" for layer in LAYERS} and len(report.matched) == 4


def test_a_saved_lora_reads_back_as_it_was(tmp_path):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, HIDDEN, generator=generator), torch.randn(3 * HIDDEN, 4, generator=generator)
    layer = "double_blocks.0.img_attn.qkv"
    te = lora_patch("text_model.encoder.layers.0.mlp.fc1", torch.ones(1, 8), torch.ones(6, 1), part="clip")
    path = tmp_path / "new" / "lora.safetensors"
    save_lora(path, [lora_patch(layer, down, up, 2.0), te], metadata={"base": "kontext-tiny"})
    assert sorted(load_file(path)) == [
        f"{name}.{end}"
        for name in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_double_blocks_0_img_attn_qkv")
        for end in ("alpha", "lora_down.weight", "lora_up.weight")
    ]
    lora = load_lora(path)
    assert lora.format == "kohya LoRA" and lora.unmatched == ()
    patch = next(patch for patch in lora.patches if patch.part == "transformer")
    weight = torch.zeros(3 * HIDDEN, HIDDEN)
    assert patch.key == f"{layer}.weight" and patch.rank == 4
    assert torch.equal(patch.delta(weight), lora_patch(layer, down, up, 2.0).delta(weight))
    assert not list(path.parent.glob("*.partial"))
    save_lora(path, [lora_patch(layer, down, up)], dtype=torch.bfloat16)
    assert load_file(path)["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].dtype == torch.bfloat16


def test_rows_of_a_layer_cannot_be_saved(tmp_path):
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, HIDDEN), f"{name}.lora_B.weight": torch.ones(HIDDEN, 1)}
    with pytest.raises(ValueError, match="only LoRAs of whole layers"):
        save_lora(tmp_path / "x.safetensors", read_lora(tensors).patches)
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_lora(tmp_path / "x.safetensors", [])


def test_a_peft_folder_is_scaled_by_its_adapter_config(tmp_path):
    layer = "base_model.model.double_blocks.0.img_attn.proj"
    tensors = {
        f"{layer}.lora_A.weight": torch.ones(2, HIDDEN),
        f"{layer}.lora_B.weight": torch.ones(HIDDEN, 2),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2, "use_rslora": True}))
    (patch,) = load_lora(tmp_path).patches
    assert patch.scale == 8 / 2**0.5


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it is empty"),
        ({"lora_unet_down_blocks_0_attn.lora_up.weight": torch.ones(2, 2)}, "Stable Diffusion"),
        (
            {"a.weight": torch.ones(2, 2)},
            "none of its 1 tensors is for FLUX .a.weight: not a tensor of any known",
        ),
        ({"lora_unet_img_in.lora_up.weight": torch.ones(2, 2)}, "down is missing"),
        ({"lora_unet_img_in.alpha": torch.ones(())}, "nothing that changes a weight"),
        ({"lora_unet_img_in.oft_blocks": torch.ones(2, 2, 2)}, "OFT algorithm"),
    ],
)
def test_a_file_with_nothing_for_flux_is_an_error_that_says_what_it_is(tensors, message):
    with pytest.raises(ValueError, match=message):
        read_lora(tensors, name="x")


@pytest.mark.parametrize(
    ("layer", "tensors", "reason"),
    [
        ("img_in", {"lora_up.weight": (16, 3), "lora_down.weight": (2, 16)}, "cannot be multiplied"),
        ("img_in", {"lora_up.weight": (16, 0), "lora_down.weight": (0, 16)}, "no matrix"),
        ("img_in", {"lokr_w1": (2, 2), "lokr_w2": (2, 2, 1, 1)}, "no matrix"),
        ("img_in", {"hada_w1_a": (4, 1), "hada_w1_b": (1, 4)}, "hada_w2_a and hada_w2_b is missing"),
        ("img_in", {"diff": (4, 4), "lokr_w1": (2, 2), "lokr_w2": (2, 2)}, "diff and lokr together"),
        ("img_in", {"lora_up.weight": (8, 1), "lora_down.weight": (1, 4), "alpha": (2,)}, "alpha has shape"),
        ("img_in", {"lora_up.weight": (8, 1), "lora_down.weight": (1, 4), "dora_scale": (5, 1)}, "magnitude"),
        ("clip_g_transformer_x", {"diff": (4, 4)}, "no such layer"),
        ("img_in", {"lora_mid.weight": (4, 4)}, "convolution"),
    ],
)
def test_what_cannot_be_used_is_listed_with_its_reason(layer, tensors, reason):
    name = f"lora_unet_{layer}"
    whole = make_tensors() | {f"{name}.{role}": torch.ones(shape) for role, shape in tensors.items()}
    lora = read_lora(whole)
    assert len(lora.patches) == 4 and len(lora.unmatched) == 1
    assert reason in lora.unmatched[0].reason
    (report,) = apply({"transformer": make_model()}, [(lora, 1.0)])
    assert "4 of 5 layers matched" in str(report) and f"not used: {name}" in str(report)


def test_clip_g_of_an_sdxl_file_does_not_land_in_clip_l():
    tensors = make_tensors()
    for end, shape in (("up", (8, 1)), ("down", (1, 8))):
        key = f"lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_{end}.weight"
        tensors[key] = torch.ones(shape)
    lora = read_lora(tensors)
    assert lora.parts == {"transformer"} and "FLUX has no such layer" == lora.unmatched[0].reason


def test_a_lora_of_another_width_or_depth_is_an_error_that_says_so():
    wide = {
        "lora_unet_img_in.lora_up.weight": torch.ones(64, 2),
        "lora_unet_img_in.lora_down.weight": torch.ones(2, 16),
    }
    deep = make_tensors()
    deep = {
        key.replace("blocks.0", "blocks.7").replace("img_in", "txt_in"): value for key, value in deep.items()
    }
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"changes nothing here: .* its size does not fit: 64x16 and 32x16"):
        apply({"transformer": model}, [(read_lora(make_tensors()), 1.0), (read_lora(wide), 1.0)])
    with pytest.raises(ValueError, match=r"this model has no double_blocks\.7\.img_attn\.qkv\.weight"):
        apply({"transformer": model}, [(read_lora(deep), 1.0)])
    with pytest.raises(ValueError, match="changes nothing here"):
        host_patches(read_lora(wide), 1.0, {"diffusion_model.img_in.weight": (32, 16)})
    assert same(model, before)


def test_a_host_that_renamed_the_qk_norms_gets_its_own_names():
    scale = "double_blocks.0.img_attn.norm.query_norm"
    lora = read_lora({f"diffusion_model.{scale}.diff": torch.ones(16)})
    for last in ("scale", "weight"):
        found, _ = host_patches(lora, 1.0, {f"diffusion_model.{scale}.{last}": (16,)})
        assert [(key, offset) for key, offset, _ in found] == [(f"diffusion_model.{scale}.{last}", None)]


@pytest.mark.parametrize("strength", [1.0, float("inf")])
def test_a_lora_that_breaks_a_weight_is_an_error_and_leaves_no_trace(strength):
    model = make_model()
    before = snapshot(model)
    tensors = make_tensors()
    if strength == 1.0:
        tensors["diffusion_model.img_in.lora_B.weight"][3, 1] = float("nan")
    with pytest.raises(ValueError, match="would not be finite"):
        apply({"transformer": model}, [(read_lora(tensors), strength)])
    assert same(model, before)


def test_peft_merges_dora_as_we_do():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    params = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["proj_out"]}
    layer = torch.nn.ModuleDict({"proj_out": torch.nn.Linear(HIDDEN, 16)})
    base = layer["proj_out"].weight.detach().clone()
    model = get_peft_model(layer, LoraConfig(**params))
    adapter = model.base_model.model["proj_out"]
    with torch.no_grad():
        adapter.lora_B["default"].weight.normal_()
        adapter.lora_magnitude_vector["default"].weight.uniform_(0.5, 2)
    tensors = {
        "transformer.proj_out.lora_A.weight": adapter.lora_A["default"].weight.detach(),
        "transformer.proj_out.lora_B.weight": adapter.lora_B["default"].weight.detach(),
        "transformer.proj_out.lora_magnitude_vector": adapter.lora_magnitude_vector[
            "default"
        ].weight.detach(),
    }
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})}
    (patch,) = read_lora(tensors, metadata).patches
    merged = model.merge_and_unload()["proj_out"].weight
    assert torch.allclose(patched(base, [(patch, 1.0)]), merged, atol=1e-6)


def test_a_pickled_file_is_refused(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save(make_tensors(), path)
    with pytest.raises(ValueError, match="pickle"):
        load_lora(path)
