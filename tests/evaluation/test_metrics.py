"""PSNR and SSIM against an independent computation, whole and masked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from kontext_core.evaluation.metrics import in_words, psnr, ssim


def pair(seed: int = 0, height: int = 40, width: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
    return a, (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def scipy_ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Wang's index of two (H,W) in [0,1], with scipy's Gaussian of radius 5."""
    blur = lambda x: ndimage.gaussian_filter(x, 1.5, radius=5)  # noqa: E731
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    return (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))


def test_psnr_is_that_of_the_definition():
    a, b = pair()
    errors = ((a - b).numpy().astype(np.float64) / 2) ** 2
    expected = [-10 * np.log10(error.mean()) for error in errors]
    assert psnr(a, b).tolist() == pytest.approx(expected)
    assert torch.isinf(psnr(a, a)).all()


def test_ssim_is_that_of_an_independent_implementation():
    a, b = pair()
    values = ssim(a, b)
    for i in range(2):
        maps = [scipy_ssim_map(*((t[i, c].double().numpy() + 1) / 2 for t in (a, b))) for c in range(3)]
        inner = np.mean([m[5:-5, 5:-5] for m in maps])
        # Both in float64 with the same window; only the order of sums differs.
        assert values[i].item() == pytest.approx(inner, abs=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


def test_a_mask_leaves_out_what_is_outside():
    a, b = pair()
    mask = torch.zeros(1, 1, 40, 50)
    mask[:, :, :, :25] = 1
    b[:, :, :, :25] = a[:, :, :, :25]
    assert torch.isinf(psnr(a, b, mask)).all()
    assert torch.allclose(ssim(a, b, mask), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(psnr(a, b, 1 - mask), psnr(a[..., 25:], b[..., 25:]))
    # Windows that touch the other half do not count, so the half alone gives the same.
    assert torch.allclose(ssim(a, b, 1 - mask), ssim(a[..., 25:], b[..., 25:]))


def test_where_nothing_can_be_measured_there_is_nan_and_the_words_say_so():
    a, b = pair()
    assert torch.isnan(psnr(a, b, torch.zeros(1, 1, 40, 50))).all()
    assert torch.isnan(ssim(a, b, torch.zeros(1, 1, 40, 50))).all()
    assert torch.isnan(ssim(a[..., :10], b[..., :10])).all()
    assert torch.isfinite(ssim(a[..., :11], b[..., :11])).all()
    assert torch.isfinite(psnr(a[..., :8], b[..., :8])).all()
    assert in_words(31.24, math.nan) == "PSNR 31.2 dB, SSIM not measured"
    assert in_words(math.nan, 0.98765, digits=2) == "PSNR not measured, SSIM 0.9877"
