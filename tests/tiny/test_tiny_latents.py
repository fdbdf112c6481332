"""The bundled autoencoder's latents are what the published shift and scale normalise."""

from __future__ import annotations

import pytest
import torch

from kontext_core.models.autoencoder import AutoencoderParams
from kontext_core.tiny.autoencode import picture_pool
from kontext_core.weights.load import load_autoencoder
from kontext_core.weights.locate import BUNDLED


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """Scaled latents of pictures that it never saw."""
    autoencoder = load_autoencoder(BUNDLED["kontext-tiny"] / "ae.safetensors", dtype=torch.float32)
    published = AutoencoderParams()
    assert autoencoder.params.scale_factor == published.scale_factor == 0.3611
    assert autoencoder.params.shift_factor == published.shift_factor == 0.1159
    pictures = picture_pool(96, "test")
    with torch.inference_mode():
        return torch.cat([autoencoder.encode(part.float() / 127.5 - 1) for part in pictures.split(16)])


def test_every_channel_has_mean_0_and_deviation_1(latents):
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    # Set on the pictures it was trained with. On these 96 the channels' means reach 0.17 and their deviations lie in
    # 0.93 to 1.07; all channels together have 0.006 and 1.008. Other pictures' own chance is half as much again.
    assert mean.abs().max() < 0.25 and (std - 1).abs().max() < 0.11
    assert latents.mean().abs() < 0.02 and (latents.std() - 1).abs() < 0.03
