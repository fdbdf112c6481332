"""Training the autoencoder: reconstruction with a light KL, on crops of several sizes; then the published scaling.

Source of the shape of the loss: arXiv 2112.10752 appendix G (KL-regularised), without a discriminator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.autoencoder import Autoencoder

Pictures = Callable[[int, int, int], Tensor]
"""(step, micro-batch, count) -> uint8 (B, 3, H, W)."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """Weights of the terms.

    Attributes:
        square: of the squared error beside the absolute one.
        gradient: of the absolute error of neighbouring differences, for edges.
        kl: of the divergence from a unit normal, per latent number.
        noise: standard deviation, relative to the latent's, of what is added before decoding, so that the
            decoder forgives a transformer's small errors.
        full_every: every how many steps whole pictures are taken, a quarter of the batch, instead of crops.
        crop: side of the crops in pixels.
    """

    square: float = 1.0
    gradient: float = 0.2
    kl: float = 1e-5
    noise: float = 0.03
    full_every: int = 4
    crop: int = 64


@torch.no_grad()
def init_low_pass(module: Autoencoder, generator: torch.Generator) -> None:
    """Start as a low-pass filter: a picture's means go straight through, and training adds the detail.

    Residual branches and attention end in zeros, resolution changes are box means (and, in the further channels,
    differences) down and plain repetition up, 1×1 and outer convolutions keep their first channels. PyTorch's own
    start was tried first: after 340 steps it had not got past a picture's mean colours (docs/log.md).
    """
    bands = torch.tensor([[[1.0, 1], [1, 1]], [[2, -2], [2, -2]], [[2, 2], [-2, -2]], [[2, -2], [-2, 2]]]) / 4
    for name, conv in module.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        weight, centre = conv.weight, conv.kernel_size[0] // 2
        outputs, inputs = weight.shape[:2]
        conv.bias.zero_()
        if name.endswith(("conv2", "proj_out")):
            weight.zero_()
        elif name.endswith(("conv1", ".q", ".k", ".v")):
            nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        elif "downsample" in name:
            weight.zero_()
            for k in range(outputs):
                further = k - outputs // 2
                source, band = (k, 0) if further < 0 else (further // 3, 1 + further % 3)
                weight[k, source, :2, :2] = bands[band]
        elif "upsample" in name:
            weight.zero_()
            weight[range(outputs), range(outputs), centre, centre] = 1
        else:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            keep = min(outputs, inputs, module.params.z_channels)
            weight[:keep] = 0
            weight[range(keep), range(keep), centre, centre] = 1
    # a posterior that starts narrow: unit variance would drown the picture for hundreds of steps
    z = module.params.z_channels
    module.encoder.conv_out.weight[z:] = 0
    module.encoder.conv_out.bias[z:] = -6.0


class AutoencoderTask:
    """Reconstruct pictures; a `Task` for `loop.train`."""

    def __init__(
        self, module: Autoencoder, pictures: Pictures, terms: AutoencoderLoss, dtype: torch.dtype
    ) -> None:
        self.module = module
        self.pictures = pictures
        self.terms = terms
        self.dtype = dtype

    def batch(self, step: int, micro: int, size: int) -> dict[str, Tensor]:
        whole = self.terms.full_every and step % self.terms.full_every == self.terms.full_every - 1
        pictures = self.pictures(step, micro, max(1, size // 4) if whole else size)
        if not whole:
            generator = torch.Generator().manual_seed(step * 1_009 + micro)
            pictures = random_crops(pictures, self.terms.crop, generator)
        return {"pictures": pictures}

    def loss(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        images = (batch["pictures"].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        mean, logvar = self.module.moments(images.to(self.dtype))
        mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        eps = torch.randn(mean.shape, generator=generator)
        spread = (0.5 * logvar).exp() + self.terms.noise * mean.detach().std()
        decoded = self.module.decode_raw((mean + spread * eps).to(self.dtype)).float()
        error = decoded - images
        absolute, square = error.abs().mean(), error.square().mean()
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        terms = self.terms
        loss = absolute + terms.square * square + terms.gradient * gradient + terms.kl * kl
        psnr = 10 * torch.log10(4 / square.detach())
        return loss, {"psnr": psnr, "kl": kl.detach(), "latent_std": mean.detach().std()}


def random_crops(pictures: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One square crop (side pixels) at a random place of each picture (B, C, H, W), half of them mirrored."""
    height, width = pictures.shape[-2:]
    out = []
    for picture in pictures:
        y = int(torch.randint(height - side + 1, (), generator=generator))
        x = int(torch.randint(width - side + 1, (), generator=generator))
        crop = picture[:, y : y + side, x : x + side]
        out.append(crop.flip(-1) if torch.rand((), generator=generator) < 0.5 else crop)
    return torch.stack(out)


@torch.no_grad()
def normalise_latents(module: Autoencoder, pictures: Tensor) -> None:
    """Scale the latent space so that the published shift and scale bring it to mean 0 and deviation 1.

    Rows of the encoder's last convolution are rescaled per channel and the decoder's first convolution undoes it:
    exact but for the zero padding at the border, which a short training afterwards absorbs.

    Args:
        pictures: (B, 3, H, W) float in [-1, 1] to measure on.
    """
    params = module.params
    dtype = module.encoder.conv_out.weight.dtype
    means = torch.cat([module.encode_raw(part.to(dtype)).float() for part in pictures.split(8)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    gain = 1 / (params.scale_factor * std)
    bias = params.shift_factor - gain * mean
    z = params.z_channels
    out, into = module.encoder.conv_out, module.decoder.conv_in
    out.weight[:z] *= gain[:, None, None, None]
    out.bias[:z] = out.bias[:z] * gain + bias
    out.bias[z:] += 2 * gain.log()
    into.bias -= torch.einsum("oikl,i->o", into.weight, bias / gain)
    into.weight /= gain[None, :, None, None]


@torch.no_grad()
def reconstruction_psnr(module: Autoencoder, pictures: Tensor) -> float:
    """Mean PSNR in dB over pictures (B, 3, H, W) in [-1, 1], each encoded and decoded."""
    values = []
    for part in pictures.split(8):
        decoded = module.decode_raw(module.encode_raw(part)).clamp(-1, 1)
        error = F.mse_loss(decoded, part, reduction="none").mean((1, 2, 3))
        values.append(10 * torch.log10(4 / error))
    return torch.cat(values).mean().item()
