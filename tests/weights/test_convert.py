"""Conversion there and back changes no bit; files of other programs are made of the same numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kontext_core.models.autoencoder import AutoencoderParams
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.weights import keys
from kontext_core.weights.convert import convert_file


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_equal_states(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and ours[key].shape == value.shape
        assert torch.equal(ours[key].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), key


@pytest.mark.parametrize("part", ["transformer", "autoencoder"])
def test_to_diffusers_and_back_gives_the_very_same_file(tmp_path, request, part):
    source = tmp_path / "a.safetensors"
    save_file(state_of(request.getfixturevalue(part)), source, metadata={"format": "pt"})
    folder = convert_file(source, tmp_path / "diffusers", to="diffusers")
    back = convert_file(folder, tmp_path / "b.safetensors", to="bfl")
    # As the safetensors package writes it: order, header and padding too.
    assert back.read_bytes() == source.read_bytes()


def test_the_diffusers_folder_is_what_diffusers_computes_the_same_with(tmp_path, transformer):
    diffusers = pytest.importorskip("diffusers")
    source = tmp_path / "a.safetensors"
    save_file(state_of(transformer), source)
    folder = convert_file(source, tmp_path / "transformer", to="diffusers", dtype=torch.float32)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    ours = Flux(transformer.params)
    ours.load_state_dict({key: value.float() for key, value in state_of(transformer).items()})
    generator = torch.Generator().manual_seed(0)
    img, txt = torch.randn(1, 4, 64, generator=generator), torch.randn(1, 3, 256, generator=generator)
    y, ids = torch.randn(1, 64, generator=generator), torch.arange(12.0).view(4, 3)
    t, guidance = torch.tensor([0.4]), torch.tensor([2.5])
    with torch.no_grad():
        expected = theirs(
            hidden_states=img, encoder_hidden_states=txt, pooled_projections=y, timestep=t, guidance=guidance,
            img_ids=ids, txt_ids=torch.zeros(3, 3),
        ).sample  # fmt: skip
        result = ours(img, ids, txt, torch.zeros(3, 3), t, y, guidance)
    assert (result - expected).norm() < 1e-4 * expected.norm()


def test_scaled_layouts_there_and_back_change_no_bit(tmp_path, fp8_state):
    state, _ = fp8_state
    state = {key: value.clone() for key, value in state.items()}
    state["img_in.scale_input"] = torch.tensor(0.25)
    source = tmp_path / "old.safetensors"
    save_file(state, source)
    new = convert_file(source, tmp_path / "new.safetensors", to="fp8_scaled")
    with safe_open(new, "pt") as file:
        assert "_quantization_metadata" in file.metadata()
        names = set(file.keys())
    assert {"img_in.weight_scale", "img_in.input_scale"} <= names
    assert not any("scale_weight" in name or name == "scaled_fp8" for name in names)
    back = convert_file(new, tmp_path / "back.safetensors", to="fp8_scaled_old")
    assert_equal_states(load_file(back), load_file(source))


def test_the_wish_for_full_precision_products_is_kept(tmp_path, fp8_state):
    state = dict(fp8_state[0]) | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    source = tmp_path / "old.safetensors"
    save_file(state, source)
    new = convert_file(source, tmp_path / "new.safetensors", to="fp8_scaled")
    with safe_open(new, "pt") as file:
        assert '"full_precision_matrix_mult": true' in file.metadata()["_quantization_metadata"]
    back = convert_file(new, tmp_path / "back.safetensors", to="fp8_scaled_old")
    assert load_file(back)["scaled_fp8"].numel() == 2


def test_unpacking_writes_what_the_packed_weights_stand_for(tmp_path, fp8_state):
    state, values = fp8_state
    save_file(dict(state), tmp_path / "a.safetensors")
    path = convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="bfl")
    plain = load_file(path)
    assert plain.keys() == values.keys()
    for key, value in values.items():
        assert torch.equal(plain[key], value.bfloat16()), key


def test_metadata_of_the_source_is_kept(tmp_path, transformer):
    source = tmp_path / "a.safetensors"
    save_file(state_of(transformer), source, metadata={"modelspec.title": "mine"})
    path = convert_file(source, tmp_path / "b.safetensors", to="fp8_scaled")
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.title"] == "mine"


def test_one_part_of_a_checkpoint_is_written_when_named(tmp_path, transformer, autoencoder):
    state = {f"model.diffusion_model.{key}": value for key, value in state_of(transformer).items()}
    state |= {f"vae.{key}": value for key, value in state_of(autoencoder).items()}
    source = tmp_path / "all.safetensors"
    save_file(state, source)
    with pytest.raises(ValueError, match=r"several parts \(autoencoder, transformer\); name the one"):
        convert_file(source, tmp_path / "b.safetensors", to="bfl")
    path = convert_file(source, tmp_path / "b.safetensors", to="bfl", part="autoencoder")
    assert_equal_states(load_file(path), state_of(autoencoder))


def test_a_cancelled_or_failed_conversion_leaves_nothing_behind(tmp_path, transformer):
    source = tmp_path / "a.safetensors"
    save_file(state_of(transformer), source)

    def cancel(done: int, total: int) -> None:
        assert total == len(transformer.state_dict())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_file(source, tmp_path / "b.safetensors", to="bfl", on_tensor=cancel)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_wrong_requests_are_refused_in_a_sentence(tmp_path, transformer, autoencoder):
    source, ae = tmp_path / "a.safetensors", tmp_path / "ae.safetensors"
    save_file(state_of(transformer), source)
    save_file(state_of(autoencoder), ae)
    with pytest.raises(ValueError, match="the format 'onnx' is unknown; convert to one of bfl, diffusers"):
        convert_file(source, tmp_path / "b", to="onnx")
    with pytest.raises(ValueError, match="source and destination are the same file"):
        convert_file(source, source, to="bfl")
    with pytest.raises(ValueError, match="loses too much in float8"):
        convert_file(ae, tmp_path / "b.safetensors", to="fp8_scaled")
    state = state_of(transformer)
    del state["final_layer.linear.bias"]
    save_file(state, source)
    with pytest.raises(ValueError, match=r"1 missing \(final_layer\.linear\.bias\)"):
        convert_file(source, tmp_path / "b.safetensors", to="bfl")


def test_every_key_of_the_published_models_has_a_diffusers_name_and_back():
    from kontext_core.models.autoencoder import Autoencoder

    for module, pairs_of in (
        (Flux(TransformerParams(), device="meta"), keys.transformer_pairs_of),
        (Autoencoder(AutoencoderParams(), device="meta"), keys.autoencoder_pairs_of),
    ):
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        there = keys.moves_to_diffusers(shapes, pairs_of(shapes))
        theirs = {name: move.shape for name, move in there.items()}
        back = keys.moves_from_diffusers(theirs, pairs_of(theirs))
        assert {key: move.shape for key, move in back.items()} == shapes
