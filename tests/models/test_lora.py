"""Putting LoRAs onto networks, and off again bit for bit; what does not fit is an error and leaves no trace."""

from __future__ import annotations

import json

import pytest
import torch
from small_lora import HIDDEN, LAYERS, make_model, make_tensors, same, snapshot

from kontext_core.models.clip import ClipParams, ClipTextEncoder
from kontext_core.models.lora import read_lora
from kontext_core.models.lora_apply import apply, host_patches, patch_state, patched, remove
from kontext_core.models.t5 import T5Encoder, T5Params


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
