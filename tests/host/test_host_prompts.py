"""Text lengths and long prompts with the host's own FLUX text encoders and with ours; tokenizers beside the weights."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def result(inside) -> dict:
    return inside("prompts")


@pytest.mark.parametrize("clip", ["native", "ours"])
def test_t5_is_given_512_tokens_unless_another_number_is_asked_for(result, clip):
    assert result[clip]["short"]["t5"] == 512 and result[clip]["256"]["t5"] == 256
    assert result[clip]["short"]["warnings"] == result[clip]["short"]["log"] == []


@pytest.mark.parametrize("clip", ["native", "ours"])
def test_what_only_clip_does_not_read_is_one_line_of_information(result, clip):
    said = result[clip]["long for CLIP"]
    assert said["t5"] == 512 and said["warnings"] == []
    ((level, line),) = said["log"]
    assert level == "INFO" and "first 77 tokens, T5 reads all of it" in line


def test_a_prompt_over_512_tokens_is_a_warning_with_native_encoders_which_cut_nothing(result):
    said = result["native"]["long for T5"]
    (warning,) = said["warnings"]
    assert said["t5"] > 512 and f"{said['t5']} tokens long" in warning and "trained with 512" in warning
    assert said["log"] == [["WARNING", warning]]


def test_a_prompt_over_512_tokens_is_cut_by_ours_and_what_was_cut_is_shown(result):
    said = result["ours"]["long for T5"]
    (warning,) = said["warnings"]
    assert said["t5"] == 512 and "cut off and not read" in warning and "many words" in warning
    assert {level for level, _ in said["log"]} == {"WARNING"}


@pytest.mark.parametrize("files", ["tokenizer.json", "vocabulary and merges"])
def test_clips_tokenizer_beside_the_weights_comes_before_the_hosts(result, files):
    assert result["places"][files] and result["places"]["same ids"]


@pytest.mark.parametrize("files", ["nothing", "half a vocabulary"])
def test_where_there_is_no_whole_tokenizer_the_hosts_is_taken(result, files):
    assert result["places"][files]
