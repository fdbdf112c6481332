"""Quantised files: errors of the size their steps imply, readable by the gguf package, nothing forgotten."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext_core.models.lora import lora_patch, save_lora
from kontext_core.training.checkpoint import save_weights
from kontext_core.weights.files import open_weights
from kontext_core.weights.parts import open_part
from kontext_core.weights.quantize import GGUF_TYPES, quantize_file
from kontext_core.weights.safetensors_file import save_tensors

# Root mean square of a uniform error of one step, over the root mean square of normal weights whose largest of a
# block of 32 is about 2.1 sigma: step/sqrt(12) with steps 2.1/127, 4.2/31, 4.2/15 …, a quarter more for rounding
# the scale. K-types: see test_k_quants. float8: 3 mantissa bits, relative error at most 2^-4, 2^-4/sqrt(3)*0.7 on
# average.
ERRORS = {
    "fp8_scaled": 0.033,
    "fp8_scaled_old": 0.033,
    "Q8_0": 0.007,
    "Q5_0": 0.05,
    "Q5_1": 0.05,
    "Q4_0": 0.11,
    "Q4_1": 0.10,
    "Q2_K": 0.29,
    "Q3_K": 0.16,
    "Q4_K": 0.08,
    "Q5_K": 0.04,
    "Q6_K": 0.019,
    "F16": 0.0004,
    "BF16": 0.003,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory, transformer):
    path = tmp_path_factory.mktemp("source") / "a.safetensors"
    save_file({key: value.clone() for key, value in transformer.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("kind", ERRORS)
def test_weights_read_back_with_the_error_their_steps_imply(tmp_path, transformer, source, kind):
    suffix = ".safetensors" if kind.startswith("fp8") else ".gguf"
    part = open_part(quantize_file(source, tmp_path / f"a{suffix}", type=kind), "transformer")
    assert part.shapes == {key: tuple(value.shape) for key, value in transformer.state_dict().items()}
    quantised = 0
    for key, value in transformer.state_dict().items():
        values = part.weight(key).values(torch.float32)
        error = ((values - value.float()).norm() / value.float().norm()).item()
        if part.is_packed(key):
            quantised += value.numel()
            assert ERRORS[kind] / 4 < error < ERRORS[kind], key
        else:
            assert error <= 0.0004, key
    if kind not in ("F16", "BF16"):
        assert quantised > 0.9 * sum(value.numel() for value in transformer.state_dict().values())


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_the_gguf_package_reads_every_tensor(tmp_path, transformer, source, kind):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(quantize_file(source, tmp_path / "a.gguf", type=kind))
    assert reader.get_field("general.architecture").contents() == "flux"
    small = "_S" if kind in ("Q3_K", "Q4_K", "Q5_K") else ""
    assert (
        reader.get_field("general.file_type").contents() == gguf.LlamaFileType[f"MOSTLY_{kind}{small}"].value
    )
    part = open_part(tmp_path / "a.gguf", "transformer")
    assert {tensor.name for tensor in reader.tensors} == part.shapes.keys()
    for tensor in reader.tensors:
        theirs = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(
            theirs.view(part.shapes[tensor.name]), part.weight(tensor.name).values(torch.float32)
        )


def test_a_t5_gguf_has_llama_cpps_names(tmp_path, t5):
    gguf = pytest.importorskip("gguf")
    save_file({key: value.clone() for key, value in t5.state_dict().items()}, tmp_path / "t5.safetensors")
    reader = gguf.GGUFReader(quantize_file(tmp_path / "t5.safetensors", tmp_path / "t5.gguf", type="Q8_0"))
    names = {tensor.name for tensor in reader.tensors}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    theirs = {table.get_name(key, try_suffixes=(".weight",)) for key in t5.state_dict()}
    assert names == theirs
    packed = {tensor.name for tensor in reader.tensors if tensor.tensor_type.name == "Q8_0"}
    assert "enc.blk.1.ffn_down.weight" in packed and "token_embd.weight" not in packed


def test_what_is_quantised_already_is_copied_as_it_is(tmp_path, source):
    first = quantize_file(source, tmp_path / "a.gguf", type="Q4_0")
    second = quantize_file(first, tmp_path / "b.gguf", type="Q4_0")
    assert first.read_bytes() == second.read_bytes()


def test_float8_scales_use_the_whole_range(tmp_path, source):
    state = load_file(quantize_file(source, tmp_path / "a.safetensors", type="fp8_scaled"))
    scaled = [key.removesuffix("_scale") for key in state if key.endswith("weight_scale")]
    assert len(scaled) == 2 * 10 + 2 * 3
    for key in scaled:
        assert state[key].float().abs().max() == 448
    assert state["img_in.weight"].dtype == state["final_layer.linear.weight"].dtype == torch.bfloat16


def test_types_that_cannot_be_written_are_refused(tmp_path, source):
    with pytest.raises(ValueError, match=r"'IQ2_XS' cannot be written\. Use one of fp8_scaled"):
        quantize_file(source, tmp_path / "b.gguf", type="IQ2_XS")


def test_small_parts_are_not_quantised(tmp_path, autoencoder):
    save_file(
        {key: value.clone() for key, value in autoencoder.state_dict().items()}, tmp_path / "ae.safetensors"
    )
    with pytest.raises(ValueError, match="is small and is not quantised"):
        quantize_file(tmp_path / "ae.safetensors", tmp_path / "b.gguf", type="Q8_0")


def test_without_the_gguf_package_the_message_says_what_to_install_and_what_can_be_written(
    tmp_path, source, monkeypatch
):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(
        ValueError, match=r"Q8_0 needs the package gguf, .*pip install gguf.*Q4_K.*fp8_scaled"
    ):
        quantize_file(source, tmp_path / "a.gguf", type="Q8_0")
    assert not list(tmp_path.iterdir())
    assert quantize_file(source, tmp_path / "a.gguf", type="Q4_K").is_file()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_are_as_readable_as_the_umask_says(tmp_path, source):
    before = os.umask(0o027)
    try:
        quantize_file(source, tmp_path / "a.gguf", type="F16")
        quantize_file(source, tmp_path / "b.safetensors", type="fp8_scaled")
        save_weights(tmp_path / "c.safetensors", {"a": torch.ones(2)})
        save_lora(tmp_path / "d.safetensors", [lora_patch("img_in", torch.ones(1, 2), torch.ones(2, 1))])
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("a.gguf", "b.safetensors", "c.safetensors", "d.safetensors"), "0o640")


def test_tensors_of_several_dtypes_are_written_aligned_and_read_back(tmp_path):
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(3, 2).t(),
        "c": torch.tensor(7),
        "d": torch.ones(3, dtype=torch.bfloat16),
        "e": torch.zeros(0, 4),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"made": "here"})
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)
    file = open_weights(tmp_path / "a.safetensors")
    assert file.metadata == {"made": "here"}
    assert all(file.tensors[key].start % tensors[key].dtype.itemsize == 0 for key in tensors)
