"""Reading and writing LoRA files: what is refused and why, and what is listed as not used."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_lora import HIDDEN, make_model, make_tensors

from kontext_core.models.lora import lora_patch, read_lora, save_lora
from kontext_core.models.lora_apply import apply
from kontext_core.weights.lora_file import load_lora


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


def test_a_pickled_file_is_refused(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save(make_tensors(), path)
    with pytest.raises(ValueError, match="pickle"):
        load_lora(path)
