"""Presets: the published sizes, the bundled model's, and what is inferred from loaded parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kontext_core.models.autoencoder import AutoencoderParams
from kontext_core.presets import KONTEXT_DEV, KONTEXT_TINY, infer_preset
from kontext_core.weights.load import load_model


def infer(name: str, like) -> object:
    return infer_preset(
        name,
        transformer=like.transformer,
        autoencoder=like.autoencoder,
        t5=like.t5,
        clip=like.clip,
    )


def test_the_bundled_model_has_the_sizes_of_its_preset():
    assert load_model("kontext-tiny").preset == KONTEXT_TINY


def test_a_model_of_the_published_width_behaves_as_the_published_one():
    preset = infer("a finetune", KONTEXT_DEV)
    assert preset == replace(KONTEXT_DEV, name="a finetune")
    assert preset.max_area == 1024 * 1024 and preset.text_length == 512


def test_a_small_one_behaves_as_the_bundled_one():
    preset = infer("mine", KONTEXT_TINY)
    assert preset.max_area == 128 * 128 and preset.text_length == 48


def test_parts_that_do_not_belong_together_are_named():
    with pytest.raises(
        ValueError, match="T5 encoder gives 192 text channels, and the transformer takes 4096"
    ):
        replace(KONTEXT_DEV, t5=KONTEXT_TINY.t5)
    with pytest.raises(
        ValueError, match="autoencoder packs into 16 latents channels, and the transformer takes 64"
    ):
        replace(KONTEXT_DEV, autoencoder=AutoencoderParams(z_channels=4))
