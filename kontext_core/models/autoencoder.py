"""The FLUX autoencoder: pictures (B,3,H,W) in [-1,1] to latents (B,16,H/8,W/8) and back.

Notable:
- parameter names are the published checkpoint's (`encoder.down.0.block.0.norm1.weight` ...), no quant convs;
- the encoder pads right and bottom only before each strided convolution, as the checkpoint was trained;
- "raw" latents are the plain mean; `encode` and `decode` speak scale * (mean - shift), and that scaling
  happens nowhere else in the core;
- levels are modules that can be run one by one, which is how `tiling` cuts large pictures.

Source: black-forest-labs/flux src/flux/modules/autoencoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AutoencoderParams:
    """Sizes of an autoencoder; the defaults are the published one's.

    `ch` is the width at full resolution and `ch_mult` its multiples at 1, 1/2, 1/4 ... of it. GroupNorm has
    `ch // 4` groups everywhere, which is the published 32 for `ch` = 128.
    """

    resolution: int = 256
    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self):
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        if self.ch < 4 or self.ch % 4:
            raise ValueError(
                f"ch is {self.ch}: it must be a positive multiple of 4 (GroupNorm uses ch // 4 groups)."
            )
        if not self.ch_mult or any(mult < 1 for mult in self.ch_mult):
            raise ValueError(f"ch_mult is {self.ch_mult}: it must hold at least one positive number.")
        if self.num_res_blocks < 1 or self.z_channels < 1:
            raise ValueError(
                f"num_res_blocks is {self.num_res_blocks} and z_channels {self.z_channels}: "
                "both must be at least 1."
            )
        if self.scale_factor == 0:
            raise ValueError(
                "scale_factor is 0: latents could not be scaled back; use the checkpoint's (0.3611)."
            )

    @property
    def num_groups(self) -> int:
        return self.ch // 4

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one axis."""
        return 2 ** (len(self.ch_mult) - 1)


class AttentionBlock(nn.Module):
    """x + proj(attention(norm(x))): one head over all cells of a (B,C,h,w) map."""

    def __init__(self, channels: int, num_groups: int, *, operations, dtype=None, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.norm = operations.GroupNorm(num_groups, channels, eps=1e-6, **factory)
        self.q = operations.Conv2d(channels, channels, kernel_size=1, **factory)
        self.k = operations.Conv2d(channels, channels, kernel_size=1, **factory)
        self.v = operations.Conv2d(channels, channels, kernel_size=1, **factory)
        self.proj_out = operations.Conv2d(channels, channels, kernel_size=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            rearrange(p(normed), "b c h w -> b 1 (h w) c").contiguous() for p in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[-2]))


class ResnetBlock(nn.Module):
    """shortcut(x) + conv2(swish(norm2(conv1(swish(norm1(x))))))"""

    def __init__(
        self, in_channels: int, out_channels: int, num_groups: int, *, operations, dtype=None, device=None
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.norm1 = operations.GroupNorm(num_groups, in_channels, eps=1e-6, **factory)
        self.conv1 = operations.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, **factory)
        self.norm2 = operations.GroupNorm(num_groups, out_channels, eps=1e-6, **factory)
        self.conv2 = operations.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, **factory)
        self.nin_shortcut = None
        if in_channels != out_channels:
            self.nin_shortcut = operations.Conv2d(in_channels, out_channels, kernel_size=1, **factory)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Downsample(nn.Module):
    """Halves h and w. Zeros are added on the right and the bottom only: part of what the weights learned."""

    def __init__(self, channels: int, *, operations, dtype=None, device=None):
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, kernel_size=3, stride=2, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles h and w by repeating cells, then convolves."""

    def __init__(self, channels: int, *, operations, dtype=None, device=None):
        super().__init__()
        self.conv = operations.Conv2d(
            channels, channels, kernel_size=3, padding=1, dtype=dtype, device=device
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then the way to the next one unless this is the last."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        num_groups: int,
        resample: str | None,
        *,
        operations,
        dtype=None,
        device=None,
    ):
        super().__init__()
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, num_groups, **factory)
            for i in range(num_blocks)
        )
        if resample == "down":
            self.downsample = Downsample(out_channels, **factory)
        elif resample == "up":
            self.upsample = Upsample(out_channels, **factory)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.resample == "down":
            return self.downsample(x)
        return self.upsample(x) if self.resample == "up" else x


class Middle(nn.Module):
    """Residual block, attention over all cells, residual block, at latent resolution."""

    def __init__(self, channels: int, num_groups: int, *, operations, dtype=None, device=None):
        super().__init__()
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.block_1 = ResnetBlock(channels, channels, num_groups, **factory)
        self.attn_1 = AttentionBlock(channels, num_groups, **factory)
        self.block_2 = ResnetBlock(channels, channels, num_groups, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(B,3,H,W) -> (B,2*z,H/8,W/8): mean and log variance, stacked."""

    def __init__(self, params: AutoencoderParams, *, operations, dtype=None, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        widths = [params.ch * mult for mult in params.ch_mult]
        last = len(widths) - 1
        self.conv_in = operations.Conv2d(params.in_channels, params.ch, kernel_size=3, padding=1, **factory)
        self.down = nn.ModuleList(
            Level(
                widths[i - 1] if i else params.ch,
                widths[i],
                params.num_res_blocks,
                params.num_groups,
                None if i == last else "down",
                operations=operations,
                **factory,
            )
            for i in range(last + 1)
        )
        self.mid = Middle(widths[-1], params.num_groups, operations=operations, **factory)
        self.norm_out = operations.GroupNorm(params.num_groups, widths[-1], eps=1e-6, **factory)
        self.conv_out = operations.Conv2d(
            widths[-1], 2 * params.z_channels, kernel_size=3, padding=1, **factory
        )

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.finish(h)

    def finish(self, h: Tensor) -> Tensor:
        """Everything after the levels, at latent resolution."""
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B,z,h,w) -> (B,3,8h,8w). `up` is indexed by resolution as in the encoder, run last to first."""

    def __init__(self, params: AutoencoderParams, *, operations, dtype=None, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        widths = [params.ch * mult for mult in params.ch_mult]
        last = len(widths) - 1
        self.conv_in = operations.Conv2d(params.z_channels, widths[-1], kernel_size=3, padding=1, **factory)
        self.mid = Middle(widths[-1], params.num_groups, operations=operations, **factory)
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                widths[i],
                params.num_res_blocks + 1,
                params.num_groups,
                "up" if i else None,
                operations=operations,
                **factory,
            )
            for i in range(last + 1)
        )
        self.norm_out = operations.GroupNorm(params.num_groups, widths[0], eps=1e-6, **factory)
        self.conv_out = operations.Conv2d(widths[0], params.out_ch, kernel_size=3, padding=1, **factory)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            h = level(h)
        return self.finish(h)

    def finish(self, h: Tensor) -> Tensor:
        """Everything after the levels, at picture resolution."""
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Encoder and decoder with the scaling of the latents the transformer works in."""

    def __init__(self, params: AutoencoderParams | None = None, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.params = params or AutoencoderParams()
        factory = {"operations": operations, "dtype": dtype, "device": device}
        self.encoder = Encoder(self.params, **factory)
        self.decoder = Decoder(self.params, **factory)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B,z,H/8,W/8) of the posterior, unscaled: what training needs.

        Raises:
            ValueError: if the pictures are not (B,3,H,W) with H and W multiples of the downscale.
        """
        self.check_images(images)
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        return mean, logvar

    def encode_raw(self, images: Tensor) -> Tensor:
        """Pictures (B,3,H,W) in [-1,1] -> the posterior's mean (B,z,H/8,W/8), unscaled and deterministic."""
        return self.moments(images)[0]

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B,3,H,W) in [-1,1] -> latents (B,z,H/8,W/8) as the transformer sees them."""
        return self.scale(self.encode_raw(images))

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B,z,h,w) -> pictures (B,3,8h,8w), in about [-1,1] and not clamped."""
        self.check_latents(latents)
        return self.decoder(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """The transformer's latents (B,z,h,w) -> pictures (B,3,8h,8w), in about [-1,1] and not clamped."""
        return self.decode_raw(self.unscale(latents))

    def scale(self, raw: Tensor) -> Tensor:
        return self.params.scale_factor * (raw - self.params.shift_factor)

    def unscale(self, latents: Tensor) -> Tensor:
        return latents / self.params.scale_factor + self.params.shift_factor

    def check_images(self, images: Tensor) -> None:
        step = self.params.downscale
        shape = tuple(images.shape)
        if (
            images.ndim != 4
            or shape[1] != self.params.in_channels
            or shape[2] % step
            or shape[3] % step
            or 0 in shape
        ):
            raise ValueError(
                f"pictures of shape {shape} cannot be encoded: (B,{self.params.in_channels},H,W) is needed, "
                f"H and W multiples of {step}; fit the picture first."
            )

    def check_latents(self, latents: Tensor) -> None:
        shape = tuple(latents.shape)
        if latents.ndim != 4 or shape[1] != self.params.z_channels or 0 in shape:
            raise ValueError(
                f"latents of shape {shape} cannot be decoded: "
                f"this autoencoder takes (B,{self.params.z_channels},h,w)."
            )


def params_from_shapes(shapes: dict[str, tuple[int, ...]]) -> AutoencoderParams:
    """Sizes of the autoencoder whose parameters have these shapes (published key names).

    Scale and shift are in no tensor: they stay the published ones.

    Raises:
        ValueError: if a key that fixes a size is missing.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in shapes or len(shapes[key]) != 4:
            raise ValueError(
                f"not a FLUX autoencoder: {key} is {shapes.get(key, 'missing')}, a convolution is needed."
            )
        return tuple(shapes[key])

    ch, in_channels = shape("encoder.conv_in.weight")[:2]
    num_levels = 0
    while f"encoder.down.{num_levels}.block.0.conv1.weight" in shapes:
        num_levels += 1
    num_res_blocks = 0
    while f"encoder.down.0.block.{num_res_blocks}.conv1.weight" in shapes:
        num_res_blocks += 1
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(num_levels)]
    if ch < 4 or any(width % ch for width in widths):
        raise ValueError(f"not a FLUX autoencoder: level widths {widths} are no multiples of {ch}.")
    return AutoencoderParams(
        in_channels=in_channels,
        ch=ch,
        out_ch=shape("decoder.conv_out.weight")[0],
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=num_res_blocks,
        z_channels=shape("decoder.conv_in.weight")[1],
    )
