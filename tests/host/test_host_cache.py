"""Kontext Edit encodes a prompt and a picture once, whatever else changes, and never takes what is out of date."""

from __future__ import annotations

import pytest

NOTHING = {"t5": 0, "clip": 0, "pictures": 0}
PROMPT = {"t5": 1, "clip": 1, "pictures": 0}
PICTURE = {"t5": 0, "clip": 0, "pictures": 1}


@pytest.fixture(scope="module")
def result(inside) -> dict:
    return inside("encode_once")


@pytest.mark.parametrize("run", ["seed", "steps and guidance", "Kontext Prompt", "Kontext Reference"])
def test_nothing_is_encoded_again_when_only_other_settings_change(result, run):
    assert result["first"] == {"t5": 1, "clip": 1, "pictures": 1}
    assert result[run] == NOTHING


def test_what_is_kept_gives_the_same_bits(result):
    assert result["same_bits"]


@pytest.mark.parametrize(
    ("run", "calls"),
    [
        ("prompt", PROMPT),
        ("picture", PICTURE),
        ("batch", PICTURE),  # of three pictures two are known
        ("two references", NOTHING),
        ("other size", PICTURE),
    ],
)
def test_only_what_is_new_is_encoded(result, run, calls):
    assert result[run] == calls
    assert result["prompt_matters"]


def test_another_text_length_is_another_prompt(result):
    # kontext-tiny reads 48 tokens; black-forest-labs/flux pads to 512
    assert result["text length"]["t5"] == 1


def test_changes_that_others_make_to_a_conditioning_do_not_come_back(result):
    assert result["own_copies"]


def test_a_lora_on_the_text_encoders_and_off_again_is_noticed(result):
    assert result["lora"]["t5"] == 1 and result["lora_matters"]
    assert result["lora_off"]
    assert result["lora again"] == NOTHING and result["lora_again"]


def test_a_write_to_the_weights_is_noticed(result):
    assert result["weights"] == PICTURE and result["weights_matter"]


def test_memory_is_bounded(result):
    assert all(0 < size <= 256 * 2**20 for size in result["bytes"])
    assert all(0 < size <= 100_000 for size in result["bounded"])
