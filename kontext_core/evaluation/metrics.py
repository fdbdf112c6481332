"""PSNR and SSIM of pictures, whole or where a mask says so."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_RADIUS = 5  # an 11x11 window


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of two (B,3,H,W) in [-1,1]; infinite for equal pictures.

    Args:
        mask: (1 or B,1,H,W), above 0 where pixels count; nan where none does.
    """
    error = (a.double() - b.double()).square().mean(1, keepdim=True) / 4  # the range of 2, squared
    counted = torch.ones_like(error) if mask is None else (mask > 0).to(error).expand_as(error)
    mean = (error * counted).sum((1, 2, 3)) / counted.sum((1, 2, 3))
    return -10 * torch.log10(mean)


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity (B,) of two (B,3,H,W) in [-1,1], the mean over the channels and over whole
    windows.

    Args:
        mask: (1 or B,1,H,W), above 0 where pixels count; a window counts when all of it does. nan where none
        does, as in a picture that is smaller than the window of 11x11.

    Source: Wang et al. 2004, "Image quality assessment", Gaussian window with sigma 1.5, K1 0.01, K2 0.03.
    """
    if min(a.shape[2:]) < 2 * SSIM_RADIUS + 1:
        return torch.full((len(a),), math.nan, dtype=torch.float64, device=a.device)
    a, b = ((t.double() + 1) / 2 for t in (a, b))
    x = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64, device=a.device)
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = window / window.sum()

    def smooth(image: Tensor) -> Tensor:
        kernel = window.expand(image.shape[1], 1, 1, -1)
        rows = F.conv2d(image, kernel, groups=image.shape[1])
        return F.conv2d(rows, kernel.transpose(2, 3), groups=image.shape[1])

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    index = index / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    index = index.mean(1, keepdim=True)
    if mask is None:
        return index.mean((1, 2, 3))
    outside = (mask <= 0).to(index).expand(len(a), -1, -1, -1)
    touched = F.max_pool2d(outside, 2 * SSIM_RADIUS + 1, 1)
    counted = 1 - touched
    return (index * counted).sum((1, 2, 3)) / counted.sum((1, 2, 3))


def in_words(psnr: float, ssim: float, digits: int = 1) -> str:
    """Both measures for a person, PSNR with `digits` decimals and SSIM with two more; nan was not measured."""
    decibels = "not measured" if math.isnan(psnr) else f"{psnr:.{digits}f} dB"
    share = "not measured" if math.isnan(ssim) else f"{ssim:.{digits + 2}f}"
    return f"PSNR {decibels}, SSIM {share}"
