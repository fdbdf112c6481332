"""Shift and colour between an edit and its original are found and undone."""

from __future__ import annotations

import pytest
import torch

from kontext_core.registration import Match, blur, match, undo


def natural(width: int, height: int, seed: int) -> torch.Tensor:
    """A picture (3,H,W) around 0.5 with the spectrum of a photograph."""
    noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2).sqrt()
    spectrum = torch.fft.rfft2(noise) / frequency.clamp(min=1 / max(width, height)) ** 1.2
    image = torch.fft.irfft2(spectrum, s=(height, width))
    return image / image.std() * 0.11 + 0.5


def moved(image: torch.Tensor, shift: tuple[float, float]) -> torch.Tensor:
    """Shifted by the Fourier theorem (not by the code under test), then cut free of what wraps around."""
    phase = torch.fft.fftfreq(image.shape[2])[None, :] * shift[0]
    phase = phase + torch.fft.fftfreq(image.shape[1])[:, None] * shift[1]
    turned = torch.fft.fft2(image.double()) * torch.exp(-2j * torch.pi * phase)
    return torch.fft.ifft2(turned).real.float()[:, 32:-32, 32:-32]


def pair(shift, gain, bias, *, seed: int, noise: float = 2 / 255, edited: bool = True):
    """An original and an edit of it that has moved, is tinted, noisy and has a quarter replaced."""
    large = natural(304, 272, seed)
    original = large[:, 32:-32, 32:-32].clamp(0, 1)
    edit = moved(large, shift) * torch.tensor(gain).view(3, 1, 1) + torch.tensor(bias).view(3, 1, 1)
    edit = edit + noise * torch.randn(edit.shape, generator=torch.Generator().manual_seed(seed + 1))
    if edited:
        edit[:, 50:160, 60:180] = natural(120, 110, seed + 2)
    return original, edit.clamp(0, 1)


CASES = [
    ((0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    ((0.1, -0.05), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    ((0.5, 0.5), (1.1, 0.95, 1.02), (0.02, -0.03, 0.01)),
    ((-3.4, 2.25), (0.9, 1.05, 1.0), (0.05, 0.0, -0.05)),
    ((9.6, -7.3), (1.0, 1.0, 1.0), (-0.04, -0.04, -0.04)),
]


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize(("shift", "gain", "bias"), CASES)
def test_shift_is_measured_to_a_twentieth_of_a_pixel_and_colour_to_a_level(shift, gain, bias, seed):
    found = match(*pair(shift, gain, bias, seed=seed))
    assert found.reliable and found.unchanged > 0.6
    assert found.shift == pytest.approx(shift, abs=0.05)
    assert found.gain == pytest.approx(gain, abs=0.01)
    # At mid-grey, where the pictures are: a gain and a bias trade with each other at 0.
    at_middle = [0.5 * g + b for g, b in zip(found.gain, found.bias, strict=True)]
    assert at_middle == pytest.approx([0.5 * g + b for g, b in zip(gain, bias, strict=True)], abs=1 / 255)


def test_with_a_mask_even_a_picture_that_is_mostly_edited_is_measured():
    original, edit = pair((1.3, -0.4), (1.05, 1.0, 0.95), (0.0, 0.02, 0.0), seed=3)
    edit[:, :, 60:] = 0.9
    known = torch.zeros(original.shape[1:])
    known[:, :55] = 1
    assert match(original, edit, known).shift == pytest.approx((1.3, -0.4), abs=0.05)


def test_undoing_what_was_measured_gives_the_original_back():
    original, edit = pair((0.4, -2.6), (1.06, 0.97, 1.0), (0.02, 0.0, -0.02), seed=4, noise=0.0, edited=False)
    restored = undo(edit, match(original, edit))
    inner = (slice(None), slice(6, -6), slice(6, -6))
    # Blurred by a pixel: what lies at the finest scale no shift by a fraction can bring back.
    before, after, moved_still = (blur(t[None], 1.0)[0][inner] for t in (original, restored, edit))
    assert (after - before).abs().mean() < 0.5 / 255
    assert (moved_still - before).abs().mean() > 5 / 255
    untouched = undo(edit, match(original, edit), align=False, match_color=False)
    assert torch.equal(untouched, edit)


def test_unrelated_pictures_give_no_correction_and_say_so():
    original, edit = natural(200, 180, 1).clamp(0, 1), natural(200, 180, 2).clamp(0, 1)
    found = match(original, edit)
    assert found == Match(unchanged=found.unchanged) and not found.reliable
    assert found.error == (float("inf"),) * 2
    assert torch.equal(undo(edit, found), edit)
    assert "shift and colour are kept" in found.report()


def test_a_flat_picture_gives_its_tint_and_no_shift():
    flat = torch.full((3, 64, 64), 0.5)
    found = match(flat, flat + 0.1)
    assert found.reliable and found.shift == pytest.approx((0, 0), abs=1e-6)
    assert found.gain == pytest.approx((1, 1, 1), abs=1e-3)
    assert torch.allclose(undo(flat + 0.1, found), flat, atol=1e-4)


def test_nothing_to_look_at_is_no_match():
    image = natural(40, 40, 0).clamp(0, 1)
    assert match(image, image, torch.zeros(40, 40)) == Match()
    assert match(image[:, :4], image[:, :4]) == Match()


def test_a_shift_beyond_the_bound_is_taken_for_an_edit():
    original, edit = pair((9.6, -7.3), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), seed=0)
    assert not match(original, edit, max_shift=4.0).reliable


def test_the_report_says_shift_colour_and_share():
    tint = {"gain": (1.05, 0.97, 1.0), "bias": (0.02, 0.0, 0.0)}
    found = Match(shift=(0.4, -0.6), error=(0.01, 0.02), unchanged=0.8, reliable=True, **tint)
    assert found.report() == (
        "moved by (+0.40, -0.60) px, colour gain (1.050, 0.970, 1.000), bias (+5.1, +0.0, +0.0) levels, "
        "80% unchanged"
    )
