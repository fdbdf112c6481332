"""Encoding and decoding in bands gives what the whole picture gives, and leaves no seam."""

from __future__ import annotations

import pytest
import torch

from kontext_core.models.autoencoder import Autoencoder, AutoencoderParams
from kontext_core.models.tiling import (
    decode_in_bands,
    decode_within,
    encode_in_bands,
    encode_within,
    whole_bytes,
)

# Sums over a band instead of the map, in fp32: about 2e-6 after thirty norms.
ROUNDING = 1e-5


def make_autoencoder(**sizes) -> Autoencoder:
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderParams(**sizes)).eval()
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return autoencoder


def uneven_picture(height: int, width: int) -> torch.Tensor:
    """Smooth above, noisy below right: group statistics of a part are not those of the whole."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    image = torch.stack([y, x, (9 * x).sin() * (7 * y).cos()])[None]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + 0.4 * noise * ((x > 0) & (y > 0.2))).clamp(-1, 1)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("ch_mult", [(1, 2, 4, 4), (1, 2, 4, 8), (2, 1), (1,)])
@pytest.mark.parametrize("budget", [1, 10**6, 10**9])
@torch.no_grad()
def test_bands_of_any_height_equal_the_whole_picture(ch_mult, budget):
    autoencoder = make_autoencoder(ch=16, ch_mult=ch_mult)
    step = autoencoder.params.downscale
    image = torch.cat([uneven_picture(9 * step, 5 * step), uneven_picture(9 * step, 5 * step).flip(1)])
    latents = autoencoder.encode(image)
    assert relative_error(encode_in_bands(autoencoder, image, budget=budget), latents) < ROUNDING
    decoded = autoencoder.decode(latents)
    assert relative_error(decode_in_bands(autoencoder, latents, budget=budget), decoded) < ROUNDING


@torch.no_grad()
def test_rows_where_bands_meet_are_no_worse_than_the_others():
    autoencoder = make_autoencoder(ch=16, ch_mult=(1, 2, 4, 8))
    latents = autoencoder.encode_raw(uneven_picture(128, 96))
    whole = autoencoder.decode_raw(latents)
    # 96 * 32 channels * 4 bytes * 6 copies a row at full resolution: 8 rows a band there.
    bands = decode_in_bands(autoencoder, latents, budget=8 * 96 * 32 * 4 * 6, raw=True)
    error = (bands - whole).abs().amax(dim=(0, 1, 3))
    # A seam would be a step of parts of a colour value (1/127.5) at every eighth row; there is rounding only.
    assert error.max() < 0.01 / 127.5
    vertical = (bands[:, :, 1:] - bands[:, :, :-1]) - (whole[:, :, 1:] - whole[:, :, :-1])
    assert vertical.abs().max() < 0.01 / 127.5


@torch.no_grad()
def test_bf16_bands_are_as_close_to_fp32_as_the_whole_in_bf16():
    autoencoder = make_autoencoder(ch=16, ch_mult=(1, 2, 4, 4))
    image = uneven_picture(64, 64)
    exact = autoencoder.encode_raw(image)
    autoencoder.bfloat16()
    error = relative_error(autoencoder.encode_raw(image.bfloat16()).float(), exact)
    bands = encode_in_bands(autoencoder, image.bfloat16(), budget=10**5, raw=True)
    assert bands.dtype == torch.bfloat16
    assert relative_error(bands.float(), exact) < 1.5 * error


@torch.no_grad()
def test_the_budget_decides_between_whole_and_bands():
    autoencoder = make_autoencoder(ch=16, ch_mult=(1, 2))
    image = uneven_picture(32, 32)
    needed = whole_bytes(autoencoder.params, 1, 32, 32, 4)
    steps = []

    def count(done: int, total: int) -> None:
        steps.append((done, total))

    whole = encode_within(autoencoder, image, needed, on_step=count)
    assert steps == [] and torch.equal(whole, autoencoder.encode(image))
    banded = encode_within(autoencoder, image, needed - 1, on_step=count)
    assert steps[-1][0] == steps[-1][1] == len(steps)
    assert relative_error(banded, whole) < ROUNDING
    steps.clear()
    decoded = decode_within(autoencoder, whole, needed // 8, on_step=count)
    assert steps[-1][0] == steps[-1][1] == len(steps)
    assert relative_error(decoded, decode_within(autoencoder, whole, None)) < ROUNDING


def test_a_step_callback_can_cancel():
    autoencoder = make_autoencoder(ch=16, ch_mult=(1, 2))

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_in_bands(autoencoder, torch.zeros(1, 16, 4, 4), on_step=cancel)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="budget is 0 bytes"):
        decode_in_bands(make_autoencoder(ch=16, ch_mult=(1, 2)), torch.zeros(1, 16, 4, 4), budget=0)
