"""`inspect_file` names what a file is by its content."""

from __future__ import annotations

import json
import shutil
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.weights.convert import convert_file
from kontext_core.weights.info import inspect_file
from kontext_core.weights.load import load_transformer
from kontext_core.weights.quantize import quantize_file


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def saved(tmp_path, transformer):
    # The name says the contrary of the content.
    path = tmp_path / "t5xxl-lora.safetensors"
    save_file(state_of(transformer), path)
    return path


def test_a_plain_transformer(saved, transformer):
    info = inspect_file(saved)
    assert (info.part, info.format) == ("transformer", "safetensors, black-forest-labs names")
    assert info.parameters == count(transformer) and info.bytes == 2 * info.parameters
    assert info.dtypes == {"BF16": info.parameters} and info.quantisation == "none"
    assert info.sizes["hidden_size"] == 256 and info.sizes["depth_single_blocks"] == 2
    assert info.missing == info.unexpected == info.odd == () and info.refused is None


def test_packed_files_count_the_weights_they_stand_for(saved, tmp_path, transformer):
    for kind, name in (
        ("fp8_scaled", "ComfyUI fp8 scaled, new (weight_scale)"),
        ("fp8_scaled_old", "ComfyUI fp8 scaled, old (scaled_fp8, scale_weight)"),
        ("Q4_0", "GGUF Q4_0"),
    ):
        path = quantize_file(saved, tmp_path / kind, type=kind)
        info = inspect_file(path)
        assert info.quantisation == name
        assert info.parameters == count(transformer) and info.refused is None
        assert info.missing == info.unexpected == ()


def test_plain_float8(tmp_path, transformer):
    save_file(
        {key: value.to(torch.float8_e4m3fn) for key, value in state_of(transformer).items()}, tmp_path / "a"
    )
    assert inspect_file(tmp_path / "a").quantisation == "plain fp8"


def test_every_part_in_its_layouts(tmp_path, model_folder, saved, autoencoder, t5, clip):
    assert inspect_file(model_folder / "ae.safetensors").part == "autoencoder"
    assert inspect_file(model_folder / "text_encoder").part == "clip"
    assert inspect_file(model_folder / "text_encoder_2").part == "t5"
    folder = convert_file(saved, tmp_path / "d", to="diffusers")
    assert inspect_file(folder).format == "safetensors, diffusers names"
    assert inspect_file(
        quantize_file(model_folder / "text_encoder_2", tmp_path / "t", type="Q8_0")
    ).format == ("GGUF, llama.cpp names")


def test_a_models_folder_lists_its_parts_and_what_is_missing(model_folder, tmp_path):
    info = inspect_file(model_folder)
    assert info.part == "model" and info.missing == ()
    assert [part.part for part in info.parts] == ["transformer", "autoencoder", "t5", "clip"]
    assert info.parameters == sum(part.parameters for part in info.parts)

    shutil.copytree(model_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("ae.*", "tokenizer_2"))
    assert inspect_file(tmp_path / "copy").missing == (
        "a FLUX autoencoder (VAE)",
        "the tokenizer of a T5 text encoder (tokenizer_2/)",
    )


def test_an_all_in_one_checkpoint_lists_its_parts(tmp_path, transformer, autoencoder):
    state = {f"model.diffusion_model.{key}": value for key, value in state_of(transformer).items()}
    state |= {f"vae.{key}": value for key, value in state_of(autoencoder).items()}
    save_file(state, tmp_path / "a.safetensors")
    info = inspect_file(tmp_path / "a.safetensors")
    assert info.part == "checkpoint"
    assert [part.part for part in info.parts] == ["transformer", "autoencoder"]
    assert "under 'model.diffusion_model.'" in info.parts[0].format


def test_missing_and_unexpected_keys_are_listed(tmp_path, transformer):
    state = state_of(transformer)
    del state["img_in.bias"]
    state["img_in.stranger"] = torch.zeros(1)
    save_file(state, tmp_path / "a.safetensors")
    info = inspect_file(tmp_path / "a.safetensors")
    assert info.missing == ("img_in.bias",) and info.unexpected == ("img_in.stranger",)
    assert info.refused is not None


@pytest.mark.parametrize("keys, format_", [
    (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.alpha"],
     "kohya"),
    (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "diffusers / PEFT"),
    (["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"], "ai-toolkit"),
    (["base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight"], "fal"),
    (["double_blocks.0.processor.qkv_lora1.down.weight"], "XLabs"),
    (["lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight"], "OneTrainer"),
    (["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"], "LyCORIS"),
])  # fmt: skip
def test_a_lora_is_a_lora_and_not_a_broken_model(tmp_path, keys, format_):
    path = tmp_path / "a.safetensors"
    save_file({key: torch.zeros(4, 4) for key in keys}, path)
    info = inspect_file(path)
    assert info.part == "lora" and format_ in info.format
    with pytest.raises(ValueError, match="a LoRA, not a FLUX transformer"):
        load_transformer(path)


@pytest.mark.parametrize("keys, sentence", [
    (["transformer_blocks.0.attn.to_qkv.wscales", "transformer_blocks.0.attn.to_qkv.qweight"], "Nunchaku SVDQuant"),
    (["double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4", "img_in.weight"], "bitsandbytes"),
])  # fmt: skip
def test_what_only_other_kernels_run_is_refused_with_what_it_needs(tmp_path, keys, sentence):
    path = tmp_path / "a.safetensors"
    save_file({key: torch.zeros(4, dtype=torch.uint8) for key in keys}, path)
    info = inspect_file(path)
    assert sentence in info.refused and "bf16, fp8 or GGUF" in info.refused
    with pytest.raises(ValueError, match=sentence):
        load_transformer(path)


def test_other_comfyui_quantisations_are_named(tmp_path, transformer):
    text = json.dumps({"layers": {"img_in": {"format": "nvfp4"}}})
    save_file(state_of(transformer), tmp_path / "a.safetensors", metadata={"_quantization_metadata": text})
    with pytest.raises(ValueError, match=r"quantised as nvfp4 \(img_in\): only float8"):
        load_transformer(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key, name", [
    ("double_stream_modulation_img.lin.weight", r"FLUX\.2"),
    ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion"),
    ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
])  # fmt: skip
def test_other_models_are_called_by_their_names(tmp_path, key, name):
    save_file({key: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=name):
        load_transformer(tmp_path / "a.safetensors")


def test_a_fill_model_and_a_schnell_are_odd(tmp_path):
    params = TransformerParams(
        in_channels=384, vec_in_dim=16, context_in_dim=16, hidden_size=32, num_heads=1, depth=1,
        depth_single_blocks=1, axes_dim=(4, 14, 14), guidance_embed=False,
    )  # fmt: skip
    save_file(state_of(Flux(params)), tmp_path / "a.safetensors")
    info = inspect_file(tmp_path / "a.safetensors")
    assert any("384 channels" in sentence for sentence in info.odd)
    assert any("no guidance embedding" in sentence for sentence in info.odd)


def test_the_texts_hold_what_was_found(saved):
    info = inspect_file(saved)
    text = info.to_text()
    assert str(saved) in text and f"{info.parameters:,}" in text and "a FLUX transformer" in text
    assert json.loads(info.to_json())["sizes"]["num_heads"] == 4


@pytest.mark.skipif(sys.platform == "win32", reason="files are not sparse there: 24 GB would be written")
def test_a_full_size_header_is_answered_quickly_with_the_published_count(tmp_path):
    """A sparse file of the published size: 23.8 GB of holes, of which only the header is read."""

    from kontext_core.weights.safetensors_file import NAMES

    module = Flux(TransformerParams(), device="meta", dtype=torch.bfloat16)
    header, position = {}, 0
    for key, value in module.state_dict().items():
        size = value.numel() * 2
        header[key] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    path = tmp_path / "flux1-kontext-dev.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    started = time.process_time()  # the processor's own, which a busy machine does not lengthen
    info = inspect_file(path)
    assert time.process_time() - started < 5
    assert info.parameters == 11_901_408_320 and info.refused is None
    started = time.process_time()
    loaded = load_transformer(path)  # zeros; maps 23.8 GB without reading them
    assert time.process_time() - started < 20
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 11_901_408_320
