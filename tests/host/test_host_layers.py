"""Packed weights and modulation in the host's hands: what is moved, what LoRAs do, what comes out."""

from __future__ import annotations

import pytest

STORED = {"plain": "torch.float32", "fp8_scaled": "torch.float8_e4m3fn", "Q8_0": "torch.uint8"}

# float32 sums of 64 products in another order, through four blocks.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def result(inside, tmp_path_factory) -> dict:
    return inside("layers", str(tmp_path_factory.mktemp("layers")))


@pytest.fixture(params=STORED)
def case(request, result) -> dict:
    return {**result[request.param], "kind": request.param}


def test_modulation_is_never_the_hosts_to_move(case):
    assert case["parameters"], "what is used up before sampling is no parameter, all else is"
    assert case["devices"] == {"loaded": ["meta"], "aside": ["cpu"]}


def test_the_state_dict_has_every_published_key_and_the_size_what_is_loaded(case):
    assert case["keys"] and case["size"]


def test_packed_weights_stay_packed_also_under_a_lora(case):
    assert case["stored"] == case["stored_with_lora"] == STORED[case["kind"]]


def test_the_model_computes_what_its_unpacked_weights_do(case):
    assert case["forward"] == 0
    assert case["halves"] == 0, "with some layers left in main memory"
    assert case["planned"] < ROUNDING, "from tables of the whole schedule"


@pytest.mark.parametrize("loader", ["ours", "native"])
@pytest.mark.parametrize("way", ["", "_planned", "_halves"])
def test_loras_reach_packed_layers_and_modulation(case, loader, way):
    assert case["matched"] == [4, 0] and case["lora_matters"] > 0.1
    assert case[f"{loader}_lora{way}"] < ROUNDING


def test_a_lora_comes_off_to_the_bit(case):
    assert case["off_again"]


def test_a_saved_model_is_values_with_the_lora_in_them(case):
    # What was packed is saved in bfloat16: 8 bits, through four blocks.
    assert case["saved"] < (ROUNDING if case["kind"] == "plain" else 2e-2)


def test_nodes_that_merge_models_get_values(case):
    assert case["merged"] < ROUNDING


def test_a_packed_text_encoder_stays_packed_and_encodes_the_same(result):
    assert result["t5"]["stored"] == ["torch.uint8"]
    assert result["t5"]["difference"] < ROUNDING


def test_gguf_files_are_listed_and_load_by_name(result):
    assert result["lists"]["listed"] == ["a.safetensors", "c.gguf"]
    assert result["lists"]["stored"] == "torch.uint8"


def test_a_diffusers_folder_in_shards_is_one_entry_of_the_list_and_loads(result):
    assert result["lists"]["shards"] > 1
    assert result["lists"]["sharded"] == ["diffusion_pytorch_model.safetensors.index.json"]
    assert result["lists"]["difference"] == 0


def test_a_shard_that_is_replaced_is_loaded_again_and_nothing_else_is(result):
    assert result["lists"]["seen to change"] == [True, True, False]
