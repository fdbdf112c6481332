"""Loading: every format gives the same model, nothing is copied, and what does not fit is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext_core.devices import fast_dtype
from kontext_core.edit import edit_image
from kontext_core.presets import KONTEXT_TINY
from kontext_core.weights import locate
from kontext_core.weights.convert import convert_file
from kontext_core.weights.load import load_autoencoder, load_clip, load_model, load_t5, load_transformer
from kontext_core.weights.packed import PackedOperations
from kontext_core.weights.parts import open_part
from kontext_core.weights.quantize import pack, quantize_file


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, state = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == state.keys()
    for key, value in state.items():
        assert mine[key].dtype == value.dtype and torch.equal(mine[key], value), key


def transformer_inputs(params, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ids = torch.randint(0, 4, (6, 3), generator=generator).float()
    return {
        "img": random(1, 6, params.in_channels),
        "img_ids": ids,
        "txt": random(1, 3, params.context_in_dim),
        "txt_ids": torch.zeros(3, 3),
        "timesteps": torch.tensor([0.7], dtype=dtype),
        "y": random(1, params.vec_in_dim),
        "guidance": torch.tensor([2.5], dtype=dtype),
    }


def test_each_part_of_a_folder_loads_as_it_was_saved(model_folder, transformer, autoencoder, t5, clip):
    assert_same(load_transformer(model_folder / "flux1-small.safetensors"), transformer)
    assert_same(load_autoencoder(model_folder / "ae.safetensors"), autoencoder)
    assert_same(load_t5(model_folder / "text_encoder_2"), t5)
    assert_same(load_clip(model_folder / "text_encoder"), clip)


def test_weights_are_views_of_the_memory_map(model_folder, transformer):
    loaded = load_transformer(model_folder / "flux1-small.safetensors")
    start = min(p.data_ptr() for p in loaded.parameters())
    end = max(p.data_ptr() + p.nbytes for p in loaded.parameters())
    # One file's bytes lie in one piece; copies would lie anywhere.
    assert end - start == sum(p.nbytes for p in loaded.parameters())
    assert not any(p.requires_grad for p in loaded.parameters())
    # Writing to a weight changes the model, not the file.
    with torch.no_grad():
        loaded.img_in.weight.zero_()
    assert_same(load_transformer(model_folder / "flux1-small.safetensors"), transformer)


def test_a_dtype_is_cast_to_only_when_asked_for(model_folder, transformer):
    loaded = load_transformer(model_folder / "flux1-small.safetensors", dtype=torch.float32)
    for key, value in transformer.state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[key], value.float())


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_prefix_before_all_keys_is_no_obstacle(tmp_path, transformer, prefix):
    save_file(
        {prefix + key: value for key, value in state_of(transformer).items()}, tmp_path / "a.safetensors"
    )
    assert_same(load_transformer(tmp_path / "a.safetensors"), transformer)


def test_all_parts_load_from_one_checkpoint(
    tmp_path, transformer, autoencoder, t5, clip, model_folder, monkeypatch
):
    monkeypatch.setattr("kontext_core.weights.load.fast_dtype", lambda device, dtype: dtype)
    prefixes = {
        "model.diffusion_model.": transformer,
        "vae.": autoencoder,
        "text_encoders.t5xxl.transformer.": t5,
        "text_encoders.clip_l.transformer.": clip,
    }
    state = {
        prefix + key: value for prefix, part in prefixes.items() for key, value in state_of(part).items()
    }
    path = tmp_path / "all.safetensors"
    save_file(state, path)
    model = load_model(
        path,
        t5_tokenizer=model_folder / "tokenizer_2",
        clip_tokenizer=model_folder / "tokenizer",
    )
    assert_same(model.transformer, transformer)
    assert_same(model.autoencoder, autoencoder)
    assert_same(model.t5, t5)
    assert_same(model.clip, clip)


def test_a_diffusers_folder_in_shards_loads(tmp_path, transformer, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr("kontext_core.weights.convert.SHARD_BYTES", 1_000_000)
    source = tmp_path / "a.safetensors"
    save_file(state_of(transformer), source)
    folder = convert_file(source, tmp_path / "transformer", to="diffusers")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(load_transformer(folder), transformer)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="2MB")
    assert_same(load_transformer(tmp_path / "theirs"), transformer)


def test_a_diffusers_autoencoder_loads_with_its_own_scale(tmp_path, autoencoder):
    diffusers = pytest.importorskip("diffusers")
    source = tmp_path / "ae.safetensors"
    save_file(state_of(autoencoder), source)
    folder = convert_file(source, tmp_path / "vae", to="diffusers")
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loaded = load_autoencoder(folder)
    assert_same(loaded, autoencoder)
    expected = theirs.encode(images).latent_dist.mean
    assert (loaded.encode_raw(images) - expected).norm() < 1e-5 * expected.norm()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5, "shift_factor": 0.25}))
    assert load_autoencoder(folder).params.scale_factor == 0.5


def scaled_new(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The older scaled layout as the newer one."""
    result, layers = {}, {}
    for key, value in state.items():
        if key.endswith("scale_weight"):
            layers[key.removesuffix(".scale_weight")] = {"format": "float8_e4m3fn"}
            key = key.replace("scale_weight", "weight_scale")
        if key != "scaled_fp8":
            result[key] = value
    return result, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def comfy_quant(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The newest one, where every layer carries its own description."""
    result, metadata = scaled_new(state)
    for layer, entry in json.loads(metadata["_quantization_metadata"])["layers"].items():
        result[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
    return result, {}


def uint8_container(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    result, metadata = scaled_new(state)
    return {
        key: value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value
        for key, value in result.items()
    }, metadata


def old(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return dict(state), {}


@pytest.mark.parametrize("layout", [old, scaled_new, comfy_quant, uint8_container])
@torch.no_grad()
def test_scaled_float8_stays_packed_and_computes_with_its_scales(tmp_path, transformer, fp8_state, layout):
    state, values = fp8_state
    state, metadata = layout(state)
    save_file(state, tmp_path / "a.safetensors", metadata=metadata)
    loaded = load_transformer(tmp_path / "a.safetensors", dtype=torch.float32)
    layer = loaded.double_blocks[1].img_attn.qkv
    assert layer.weight.dtype == torch.float8_e4m3fn and isinstance(layer, PackedOperations.Linear)
    assert torch.equal(
        layer.unpacked(torch.float32),
        values["double_blocks.1.img_attn.qkv.weight"],
    )
    reference = type(transformer)(transformer.params)
    reference.load_state_dict(values)
    inputs = transformer_inputs(transformer.params)
    # The same float32 products of the same numbers.
    torch.testing.assert_close(loaded(**inputs), reference(**inputs), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_plain_float8_is_cast_on_use(tmp_path, transformer):
    state = {key: value.to(torch.float8_e4m3fn) for key, value in state_of(transformer).items()}
    save_file(state, tmp_path / "a.safetensors")
    loaded = load_transformer(tmp_path / "a.safetensors")
    assert loaded.txt_in.weight.dtype == torch.float8_e4m3fn
    # What no packed layer takes is unpacked: norms and biases.
    assert loaded.txt_in.bias.dtype == torch.bfloat16
    reference = type(transformer)(transformer.params)
    reference.load_state_dict({key: value.float() for key, value in state.items()})
    inputs = transformer_inputs(transformer.params, torch.bfloat16)
    ours = loaded(**inputs)
    exact = reference(**{key: value.float() for key, value in inputs.items()})
    plain = reference.bfloat16()(**inputs)
    # Weights are exact in bfloat16, so the error is that of the same model in bfloat16.
    assert (ours.float() - exact).norm() < 1.5 * (plain.float() - exact).norm()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
@torch.no_grad()
def test_gguf_computes_with_what_the_gguf_package_unpacks(tmp_path, transformer, kind):
    gguf = pytest.importorskip("gguf")
    save_file(state_of(transformer), tmp_path / "a.safetensors")
    path = quantize_file(tmp_path / "a.safetensors", tmp_path / "a.gguf", type=kind)
    reader = gguf.GGUFReader(path)
    values = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        unpacked = gguf.dequantize(tensor.data, tensor.tensor_type).copy()
        values[tensor.name] = torch.from_numpy(unpacked).view(shape)
    reference = type(transformer)(transformer.params)
    reference.load_state_dict(values)
    loaded = load_transformer(path, dtype=torch.float32)
    inputs = transformer_inputs(transformer.params)
    torch.testing.assert_close(loaded(**inputs), reference(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "fp8_scaled_old"])
@torch.no_grad()
def test_a_packed_t5_encodes_as_with_its_unpacked_weights(tmp_path, model_folder, t5, kind):
    suffix = ".gguf" if kind == "Q8_0" else ".safetensors"
    path = quantize_file(model_folder / "text_encoder_2", tmp_path / f"t5{suffix}", type=kind)
    loaded = load_t5(path, dtype=torch.float32)
    part = open_part(path, "t5")
    values = {key: part.weight(key).values(torch.float32) for key in part.shapes}
    assert values.keys() == t5.state_dict().keys()
    for key, value in t5.state_dict().items():
        error = (values[key] - value.float()).norm() / value.float().norm()
        # A step of 2^-7 of a block's largest of 32 (Q8_0), or of 3 mantissa bits (float8): measured 0.005, 0.026.
        assert error < (0.008 if kind == "Q8_0" else 0.03), key
    reference = type(t5)(t5.params)
    reference.load_state_dict(values)
    ids = torch.tensor([[3, 4, 5, 1, 0, 0]])
    torch.testing.assert_close(loaded(ids), reference(ids), rtol=1e-5, atol=1e-5)


def test_a_quantised_embedding_gives_its_rows(t5):
    table = t5.shared.weight.float()
    layer = PackedOperations.Embedding(*table.shape)
    layer.assign(pack(table, "Q8_0"), "Q8_0", None)
    ids = torch.tensor([[5, 0], [511, 7]])
    assert torch.equal(layer(ids), layer.unpacked(torch.float32)[ids])
    layer.assign((table * 64).to(torch.float8_e4m3fn), "fp8", torch.tensor(1 / 64))
    assert torch.equal(layer(ids), layer.unpacked(torch.float32)[ids])


def test_a_whole_folder_becomes_a_model(model_folder, transformer):
    model = load_model(model_folder)
    assert model.name == model_folder.name and model.few_step is None
    assert model.preset.transformer == transformer.params
    assert model.clip.params.eos_token_id == model.clip_tokenizer.eos_id == 53
    model.release("t5", "clip")  # gives pages back; the weights read the same afterwards
    assert torch.isfinite(model.t5(torch.tensor([[3, 4, 1]]))).all()


def test_the_text_length_is_the_presets_whatever_the_tokenizers_files_say(model_folder):
    said = json.loads((model_folder / "tokenizer_2" / "tokenizer_config.json").read_text())[
        "model_max_length"
    ]
    model = load_model(model_folder)
    assert model.t5_tokenizer.max_length == model.preset.text_length == KONTEXT_TINY.text_length != said
    other = load_model(model_folder, text_length=20)
    assert other.t5_tokenizer.max_length == other.preset.text_length == 20


def test_a_distilled_transformer_in_the_folder_is_the_few_step_one(model_folder, tmp_path, transformer):
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    state = state_of(transformer)
    state["img_in.bias"].zero_()
    save_file(state, folder / "flux1-small-fewstep.safetensors")
    model = load_model(folder, dtype=torch.bfloat16)
    assert_same(model.transformer, transformer)
    assert not model.few_step.img_in.bias.any()


def test_comfyui_names_and_a_transformer_file_work_as_well(model_folder, tmp_path, transformer):
    for source, name in (
        ("flux1-small.safetensors", "some-finetune.safetensors"),
        ("ae.safetensors", "ae.safetensors"),
        ("text_encoder_2/model.safetensors", "t5xxl_fp16.safetensors"),
        ("text_encoder/model.safetensors", "clip_l.safetensors"),
    ):
        shutil.copy(model_folder / source, tmp_path / name)
    words = {"t5_tokenizer": model_folder / "tokenizer_2", "clip_tokenizer": model_folder / "tokenizer"}
    assert_same(load_model(tmp_path, dtype=torch.bfloat16, **words).transformer, transformer)
    model = load_model(tmp_path / "some-finetune.safetensors", **words)
    assert model.name == "some-finetune"
    (tmp_path / "ae.safetensors").unlink()
    with pytest.raises(ValueError, match=r"autoencoder.*missing.*ae\.safetensors.*vae/.*vae="):
        load_model(tmp_path, **words)
    load_model(tmp_path, vae=model_folder / "ae.safetensors", **words)


def test_every_missing_part_is_listed_at_once(tmp_path, transformer):
    save_file(state_of(transformer), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"autoencoder.*missing.*T5.*missing.*CLIP.*missing"):
        load_model(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="neither a file nor a folder, nor a bundled model"):
        load_model(tmp_path / "absent")


def test_a_missing_tokenizer_says_where_it_was_looked_for(model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    with pytest.raises(ValueError, match=r"no tokenizer for a T5.*tokenizer_2.*COMFYUI_PATH"):
        load_model(folder)


def test_a_comfyui_lends_its_tokenizers(model_folder, tmp_path, monkeypatch):
    folder, host = tmp_path / "copy", tmp_path / "ComfyUI" / "comfy"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(model_folder / "tokenizer_2", host / "text_encoders" / "t5_tokenizer")
    shutil.copytree(model_folder / "tokenizer", host / "sd1_tokenizer")
    monkeypatch.setenv("COMFYUI_PATH", str(host.parent))
    lent, own = load_model(folder), load_model(model_folder)
    for tokenizer, other in (
        (lent.t5_tokenizer, own.t5_tokenizer),
        (lent.clip_tokenizer, own.clip_tokenizer),
    ):
        assert torch.equal(tokenizer.encode(["make it red"]).ids, other.encode(["make it red"]).ids)
    (folder / "tokenizer").mkdir()  # one beside the weights comes first
    own.clip_tokenizer.tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    places = locate.find_model(folder)
    assert locate.find_tokenizer("clip", places, None) == folder / "tokenizer"
    assert locate.find_tokenizer("t5", places, None) == host / "text_encoders" / "t5_tokenizer"


def test_keys_that_do_not_fit_are_named_with_the_file(tmp_path, transformer):
    path = tmp_path / "a.safetensors"

    def message(state: dict[str, torch.Tensor]) -> str:
        save_file(state, path)
        with pytest.raises(ValueError) as error:
            load_transformer(path)
        return str(error.value)

    state = state_of(transformer)
    del state["double_blocks.1.txt_mlp.2.bias"]
    text = message(state)
    assert "a.safetensors" in text and "1 missing (double_blocks.1.txt_mlp.2.bias)" in text
    state = state_of(transformer)
    state["double_blocks.0.stranger.weight"] = torch.zeros(2)
    assert "1 unexpected (double_blocks.0.stranger.weight)" in message(state)
    state = state_of(transformer)
    state["single_blocks.1.linear2.weight"] = torch.zeros(256, 9, dtype=torch.bfloat16)
    text = message(state)
    assert "1 of the wrong shape (single_blocks.1.linear2.weight is (256, 9), (256, 1280) is needed)" in text


def test_the_wrong_part_is_called_by_its_name(model_folder):
    with pytest.raises(ValueError, match="a T5 text encoder, where a FLUX transformer is needed"):
        load_transformer(model_folder / "text_encoder_2")
    with pytest.raises(ValueError, match="a FLUX transformer, where a CLIP text encoder is needed"):
        load_clip(model_folder / "flux1-small.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_weights_are_found_on_loading(tmp_path, transformer, bad):
    state = state_of(transformer)
    state["single_blocks.0.linear1.weight"][-1, 7] = bad
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"single_blocks\.0\.linear1\.weight holds NaN"):
        load_transformer(tmp_path / "a.safetensors")


def test_a_folder_of_packed_files_makes_a_model_that_edits(model_folder, tmp_path):
    quantize_file(
        model_folder / "flux1-small.safetensors", tmp_path / "flux1-kontext-Q4_K_S.gguf", type="Q4_K_S"
    )
    quantize_file(
        model_folder / "text_encoder_2", tmp_path / "t5xxl_fp8_scaled.safetensors", type="fp8_scaled_old"
    )
    shutil.copy(model_folder / "text_encoder" / "model.safetensors", tmp_path / "clip_l.safetensors")
    shutil.copy(model_folder / "ae.safetensors", tmp_path)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(model_folder / name, tmp_path / name)
    model = load_model(tmp_path)
    assert model.transformer.compute_dtype == fast_dtype("cpu", torch.bfloat16)
    assert model.transformer.double_blocks[0].img_attn.qkv.kind == "Q4_K"
    result = edit_image(model, torch.zeros(1, 3, 32, 32), "make it red", num_steps=1, size=(32, 32))
    assert torch.isfinite(result.images).all()


def test_a_file_with_a_part_in_two_layouts_is_ambiguous(tmp_path, transformer):
    save_file(state_of(transformer), tmp_path / "a.safetensors")
    folder = convert_file(tmp_path / "a.safetensors", tmp_path / "d", to="diffusers")
    both = state_of(transformer) | load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(both, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="it holds a FLUX transformer 2 times"):
        load_transformer(tmp_path / "b.safetensors")
