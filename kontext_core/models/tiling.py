"""Large pictures through the autoencoder in horizontal bands, equal to the whole picture at once.

Tiles that each run through the whole network differ from the whole picture in two ways: convolutions see
nothing beyond the tile's edge, and GroupNorm takes its mean and variance from the tile. Overlap and blending
hide the first and not the second. So the picture is not cut into tiles that run one after the other; every
*layer* is run band by band before the next one starts:

- a layer's input and output lie whole in `storage` (the CPU's memory for a GPU), only a band and the one row
  its 3×3 convolution sees on either side are on the device;
- while the bands of a layer are written, the sums for the next GroupNorm are taken, so each norm uses the
  statistics of the whole picture;
- what runs at latent resolution, the attention over all cells included, runs whole: it is small.

There are no seams because there is no approximation: results differ from the whole picture's by the rounding
of sums taken in another order. No pixel is computed twice, bar the row on either side of a band.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import Autoencoder, AutoencoderParams, Level, ResnetBlock

# Copies of a band that are alive at once inside a layer: input, normalised, activated, the convolution's own
# layout, output.
BAND_COPIES = 6


class StoredMap:
    """A feature map (B,C,H,W) written band by band, with the mean and variance of each channel so far."""

    def __init__(self, data: Tensor):
        self.data = data
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def write(self, start: int, band: Tensor) -> None:
        """Puts a band at row `start` and takes its sums."""
        self.data[:, :, start : start + band.shape[2]].copy_(band)
        # Within a band in float32, between bands in float64: E[x²] - E[x]² loses the variance otherwise.
        variance, mean = torch.var_mean(band.float(), dim=(2, 3), correction=0)
        variance, mean = variance.double(), mean.double()
        size = band.shape[2] * band.shape[3]
        self.count += size
        self.total = self.total + size * mean
        self.squares = self.squares + size * (variance + mean.square())

    def factors(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """(factor, offset), each (B,C,1,1) float32: GroupNorm(x) = x * factor + offset over the whole map."""
        batch, channels = self.total.shape
        grouped = (batch, norm.num_groups, -1)
        mean = (self.total / self.count).view(grouped).mean(-1)
        squares = (self.squares / self.count).view(grouped).mean(-1)
        inverse = ((squares - mean.square()).clamp_min(0) + norm.eps).rsqrt()
        repeats = channels // norm.num_groups
        weight, bias = (
            p.detach().to(device=mean.device, dtype=torch.float64) for p in (norm.weight, norm.bias)
        )
        factor = inverse.repeat_interleave(repeats, dim=1) * weight
        offset = bias - mean.repeat_interleave(repeats, dim=1) * factor
        return factor.float()[:, :, None, None], offset.float()[:, :, None, None]


class BandRunner:
    """Runs layers over stored maps, a band at a time, on `device`."""

    def __init__(self, device: torch.device, storage: torch.device, budget: int, num_steps: int, on_step):
        self.device, self.storage, self.budget = device, storage, budget
        self.done, self.num_steps, self.on_step = 0, num_steps, on_step

    def bands(self, x: Tensor, scale: float = 1.0) -> list[tuple[int, int]]:
        """Row ranges of x that fit the budget; `scale` is a layer's output size over its input size."""
        # Four bytes a number whatever the dtype: norms are applied in float32.
        row = x.shape[0] * x.shape[1] * x.shape[3] * 4 * BAND_COPIES * max(scale, 1.0)
        rows = max(int(self.budget // row), 1)
        return [(start, min(start + rows, x.shape[2])) for start in range(0, x.shape[2], rows)]

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        return x[:, :, max(start, 0) : min(stop, x.shape[2])].to(self.device)

    def empty(self, like: Tensor, channels: int, height: int, width: int) -> Tensor:
        return torch.empty((like.shape[0], channels, height, width), dtype=like.dtype, device=self.storage)

    def step(self) -> None:
        self.done += 1
        if self.on_step is not None:
            self.on_step(self.done, self.num_steps)

    def convolve(
        self,
        x: Tensor,
        conv: nn.Module,
        *,
        scale: float = 1,
        before=None,
        after=None,
        into: Tensor | None = None,
    ) -> StoredMap:
        """Stores after(conv(before(x))) where conv sees one row beyond a band and zeros beyond the map.

        Args:
            x: whole map (B,C,H,W), on any device.
            conv: a 3×3 convolution, `Upsample` (scale 2) or `Downsample` (scale 1/2).
            before: function of a band, e.g. norm and activation.
            after: function of (band, first row, last row).
            into: an existing map to write to; rows below the current band are never read again.
        """
        result = None
        for start, stop in self.band_edges(x, scale):
            # `Downsample` looks one row down and none up, the others one row each way.
            above = 0 if scale < 1 else min(1, start)
            band = self.rows(x, start - above, stop + 1)
            band = conv(band if before is None else before(band))
            first, last = int(above * scale), int((stop - start + above) * scale)
            band = band[:, :, first:last]
            top, bottom = int(start * scale), int(stop * scale)
            if after is not None:
                band = after(band, top, bottom)
            if result is None:
                if into is None:
                    into = self.empty(band, band.shape[1], int(x.shape[2] * scale), band.shape[3])
                result = StoredMap(into)
            result.write(top, band)
        self.step()
        return result

    def band_edges(self, x: Tensor, scale: float) -> list[tuple[int, int]]:
        bands = self.bands(x, scale * scale)
        if scale >= 1:
            return bands
        # Half a row cannot be stored: bands of a strided convolution start and end on even rows.
        rows = max((bands[0][1] - bands[0][0]) // 2 * 2, 2)
        return [(start, min(start + rows, x.shape[2])) for start in range(0, x.shape[2], rows)]

    def normed(self, stored: StoredMap, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """swish(GroupNorm(band)) with the statistics of the whole map."""
        factor, offset = stored.factors(norm)

        def apply(band: Tensor) -> Tensor:
            return F.silu(torch.addcmul(offset, band.float(), factor).to(band.dtype), inplace=True)

        return apply

    def residual(self, x: StoredMap, block: ResnetBlock) -> StoredMap:
        h = self.convolve(x.data, block.conv1, before=self.normed(x, block.norm1))
        channels = h.data.shape[1]
        # The block's input is read for the last time band by band just before its output is written there.
        into = x.data[:, :channels] if channels <= x.data.shape[1] else None

        def add_shortcut(band: Tensor, top: int, bottom: int) -> Tensor:
            skipped = self.rows(x.data, top, bottom)
            return band + (skipped if block.nin_shortcut is None else block.nin_shortcut(skipped))

        return self.convolve(
            h.data, block.conv2, before=self.normed(h, block.norm2), after=add_shortcut, into=into
        )

    def level(self, x: StoredMap, level: Level) -> StoredMap:
        for block in level.block:
            x = self.residual(x, block)
        if level.resample == "down":
            return self.convolve(x.data, level.downsample, scale=0.5)
        return self.convolve(x.data, level.upsample, scale=2) if level.resample == "up" else x


@torch.no_grad()
def decode_in_bands(
    autoencoder: Autoencoder,
    latents: Tensor,
    *,
    budget: int = 256 * 2**20,
    storage: torch.device | str = "cpu",
    raw: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What `autoencoder.decode` returns (`decode_raw` when `raw`), with little memory on the latents' device.

    Args:
        latents: (B,z,h,w).
        budget: bytes of working memory that a band may take on the device; at least a row is taken.
        storage: where whole feature maps are kept; one and a half times the widest one at most.
        on_step: called with (layers done, layers in all); may raise to cancel.

    Returns:
        (B,3,8h,8w) on the latents' device.
    """
    autoencoder.check_latents(latents)
    decoder = autoencoder.decoder
    *levels, first = decoder.up
    if first.resample is None:
        return autoencoder.decode_raw(latents) if raw else autoencoder.decode(latents)
    h = decoder.mid(decoder.conv_in(latents if raw else autoencoder.unscale(latents)))
    for block in first.block:
        h = block(h)
    num_steps = 2 + sum(2 * len(level.block) + (level.resample is not None) for level in levels)
    run = BandRunner(latents.device, torch.device(storage), check_budget(budget), num_steps, on_step)
    x = run.convolve(h, first.upsample, scale=2)
    del h
    for level in reversed(levels):
        x = run.level(x, level)
    return run.convolve(x.data, decoder.conv_out, before=run.normed(x, decoder.norm_out)).data.to(
        latents.device
    )


@torch.no_grad()
def encode_in_bands(
    autoencoder: Autoencoder,
    images: Tensor,
    *,
    budget: int = 256 * 2**20,
    storage: torch.device | str = "cpu",
    raw: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What `autoencoder.encode` returns (`encode_raw` when `raw`), with little memory on their device.

    Args:
        images: (B,3,H,W) in [-1,1].
        budget, storage, on_step: as for `decode_in_bands`.
    """
    autoencoder.check_images(images)
    encoder = autoencoder.encoder
    *levels, last = encoder.down
    num_steps = 1 + sum(2 * len(level.block) + 1 for level in levels)
    run = BandRunner(images.device, torch.device(storage), check_budget(budget), num_steps, on_step)
    x = run.convolve(images, encoder.conv_in)
    for level in levels:
        x = run.level(x, level)
    mean = encoder.finish(last(x.data.to(images.device))).chunk(2, dim=1)[0]
    return mean if raw else autoencoder.scale(mean)


def whole_bytes(params: AutoencoderParams, batch: int, height: int, width: int, itemsize: int) -> int:
    """Working memory of encoding or decoding (batch,3,height,width) at once, weights not counted.

    Decoding keeps four copies of its widest map (the first block at full resolution takes the next level's
    channels); measured 3.9 to 4.4 at 512×512 on a CPU. Encoding takes three quarters of it.
    """
    widths = [params.ch * mult for mult in params.ch_mult]
    pairs = zip(widths, [*widths[1:], widths[-1]], strict=True)
    widest = max(max(pair) * (height >> i) * (width >> i) for i, pair in enumerate(pairs))
    return int(4.5 * batch * widest * itemsize)


def decode_within(
    autoencoder: Autoencoder,
    latents: Tensor,
    budget: int | None,
    *,
    storage: torch.device | str = "cpu",
    raw: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Decodes at once if that takes no more than `budget` bytes or no budget is given, else in bands."""
    scale = autoencoder.params.downscale
    batch, _, h, w = latents.shape
    needed = whole_bytes(autoencoder.params, batch, h * scale, w * scale, latents.element_size())
    if budget is None or needed <= budget:
        with torch.no_grad():
            return autoencoder.decode_raw(latents) if raw else autoencoder.decode(latents)
    band = max(check_budget(budget) // 4, 1)
    return decode_in_bands(autoencoder, latents, budget=band, storage=storage, raw=raw, on_step=on_step)


def encode_within(
    autoencoder: Autoencoder,
    images: Tensor,
    budget: int | None,
    *,
    storage: torch.device | str = "cpu",
    raw: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Encodes at once if that takes no more than `budget` bytes or no budget is given, else in bands."""
    batch, _, height, width = images.shape
    needed = whole_bytes(autoencoder.params, batch, height, width, images.element_size())
    if budget is None or needed <= budget:
        with torch.no_grad():
            return autoencoder.encode_raw(images) if raw else autoencoder.encode(images)
    band = max(check_budget(budget) // 4, 1)
    return encode_in_bands(autoencoder, images, budget=band, storage=storage, raw=raw, on_step=on_step)


def check_budget(budget: int) -> int:
    if budget < 1:
        raise ValueError(
            f"budget is {budget} bytes: it must be positive; 268435456 (256 MiB) suits most devices."
        )
    return budget
