"""Our tokenizers, autoencoder and LoRA keys against the host's own, in the host."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def result(inside) -> dict:
    return inside("parts")


def test_prompts_become_the_native_tokens_weights_and_all(result):
    for prompt, same in result["tokens"]["same"].items():
        assert same["t5xxl"], prompt
        # The host starts a second chunk where CLIP's 77 tokens end; only the first one is pooled.
        assert same["l"] or len(prompt) > 300, prompt


def test_brackets_are_read_as_written_when_asked(result):
    assert result["tokens"]["literal_weights"] == [1.0]
    assert result["tokens"]["native_literal"], "of a CLIP that the host loaded too"


def test_t5_gets_512_tokens_of_its_own_accord_and_never_more(result):
    assert result["tokens"]["own_length"] == 512
    assert result["tokens"]["long_length"] == 512
    assert result["tokens"]["long_end"] == 1  # the end token is kept


def test_what_a_long_prompt_loses_is_said(result):
    (warning,) = result["tokens"]["warnings"]
    assert "512 tokens" in warning and warning.endswith("many ”")


# The published sizes in float32: rounding of another order of sums in a network of about 60 layers.
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_the_vae_gives_what_the_hosts_gives(result, way):
    assert result["vae"]["range"] > 0.01
    assert result["vae"][way] < 1e-4


@pytest.mark.parametrize("way", ["tiled", "tiled_encode"])
def test_tiles_give_what_the_whole_picture_gives(result, way):
    assert result["vae"][way] < 1e-4


def test_the_vae_saves_the_published_keys_and_asks_for_the_published_memory(result):
    assert result["vae"]["keys"]
    assert result["vae"]["memory"] == pytest.approx(1)


@pytest.mark.parametrize("naming", ["bfl", "kohya", "diffusers"])
def test_a_lora_finds_every_layer_that_it_finds_in_the_native_model(result, naming):
    lora = result["loras"][naming]
    assert lora["patched"] >= 4 and lora["same_keys"]
    assert lora["difference"] < 1e-6


@pytest.mark.parametrize("case", ["plain", "lora"])
def test_a_partly_loaded_model_gives_what_a_loaded_one_gives(result, case):
    """As on a card too small for it; a LoRA is then added to each weight when it is used."""
    partial = result["partial"][case]
    assert partial["partly"]
    assert partial["difference"] < 1e-5
