"""Live preview colours: the linear map from a latent to the picture it decodes to, one pixel a latent cell.

A host shows what is being sampled by multiplying each cell's channels with a small matrix. The published
autoencoder's matrix is built into hosts; any other autoencoder needs its own, fitted here by least squares.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .models.autoencoder import Autoencoder

FILE = "preview.json"


@torch.inference_mode()
def fit_preview(autoencoder: Autoencoder, images: Tensor, *, batch: int = 16) -> dict[str, list]:
    """The map that best predicts each cell's mean colour from its scaled latent.

    Args:
        images: (B, 3, H, W) in [-1, 1], of the kind the model makes; a hundred are plenty.

    Returns:
        {"latent_rgb_factors": [[r, g, b]] * channels, "latent_rgb_factors_bias": [r, g, b]}, for colours in
        [-1, 1]; the names are those of Comfy-Org/ComfyUI comfy/latent_formats.py.
    """
    weight = next(autoencoder.parameters())
    rows, colours = [], []
    for part in images.split(batch):
        latent = autoencoder.encode(part.to(weight)).double().cpu()
        rows.append(latent.movedim(1, -1).flatten(0, 2))
        small = F.avg_pool2d(part.double().cpu(), autoencoder.params.downscale)
        colours.append(small.movedim(1, -1).flatten(0, 2))
    latents = torch.cat(rows)
    latents = torch.cat((latents, latents.new_ones(len(latents), 1)), dim=1)
    *factors, bias = torch.linalg.lstsq(latents, torch.cat(colours)).solution.tolist()
    shorten = [[round(value, 5) for value in row] for row in [*factors, bias]]
    return {"latent_rgb_factors": shorten[:-1], "latent_rgb_factors_bias": shorten[-1]}


def write_preview(folder: str | Path, autoencoder: Autoencoder, images: Tensor) -> Path:
    """Fit and write `preview.json` into a model folder; returns its path."""
    path = Path(folder) / FILE
    path.write_text(json.dumps(fit_preview(autoencoder, images), indent=1) + "\n", encoding="utf-8")
    return path


def preview(latent: Tensor, factors: dict[str, list]) -> Tensor:
    """Scaled latent (B, C, h, w) -> its preview (B, 3, h, w) in [-1, 1]."""
    matrix = torch.tensor(factors["latent_rgb_factors"], dtype=latent.dtype, device=latent.device)
    bias = torch.tensor(factors["latent_rgb_factors_bias"], dtype=latent.dtype, device=latent.device)
    colours = torch.einsum("bchw,cd->bdhw", latent, matrix) + bias[:, None, None]
    return colours.clamp(-1, 1)
