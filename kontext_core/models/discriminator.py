"""The discriminator of latent adversarial distillation: small convolutional heads on a frozen teacher's features.

Notable:
- the teacher itself is the feature extractor: its target tokens after every block, read by `BlockFeatures`;
- every block has a head of its own; heads share nothing;
- a head knows how noisy its input is (t̂) and what was asked for (pooled text): by FiLM and by projection;
- features are standardised channel by channel with fixed numbers, measured once (`Discriminator.calibrate`): a norm
  over each token would hide how strong its contents are, and with that a student that overshoots.

Source: arXiv 2403.12015 section 3; projection: arXiv 1802.05637 eq. 3; FiLM: arXiv 1709.07871.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .blocks import timestep_embedding
from .transformer import BlockHooks, TransformerParams

TIME_DIM = 256


@dataclass(frozen=True, kw_only=True)
class DiscriminatorParams:
    """Sizes of the heads.

    Attributes:
        num_blocks: heads, one a block of the teacher.
        hidden_size: the teacher's width; vec_in_dim: the pooled text's.
        channels: a head's own width.
    """

    num_blocks: int
    hidden_size: int
    vec_in_dim: int
    channels: int = 64

    def __post_init__(self) -> None:
        for name in ("num_blocks", "hidden_size", "vec_in_dim", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"DiscriminatorParams.{name} is {getattr(self, name)}; it must be at least 1"
                )


def discriminator_params(teacher: TransformerParams, channels: int = 64) -> DiscriminatorParams:
    """The heads that fit a teacher: one for each of its blocks."""
    return DiscriminatorParams(
        num_blocks=teacher.depth + teacher.depth_single_blocks,
        hidden_size=teacher.hidden_size,
        vec_in_dim=teacher.vec_in_dim,
        channels=channels,
    )


class BlockFeatures(BlockHooks):
    """Keeps the target tokens (B, N, hidden) that leave every block of one forward, double blocks first."""

    def __init__(self, num_target: int) -> None:
        self.num_target = num_target
        self.features: list[Tensor] = []

    def double(
        self, index: int, run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], img: Tensor, txt: Tensor
    ) -> tuple[Tensor, Tensor]:
        img, txt = run(img, txt)
        self.features.append(img[:, : self.num_target])
        return img, txt

    def single(self, index: int, run: Callable[[Tensor], Tensor], x: Tensor, num_text: int) -> Tensor:
        x = run(x)
        self.features.append(x[:, num_text : num_text + self.num_target])
        return x


class DiscriminatorHead(nn.Module):
    """Tokens of one block as a picture -> a score for each token: high is real."""

    def __init__(self, params: DiscriminatorParams, operations: Any, dtype: Any, device: Any) -> None:
        super().__init__()
        channels = params.channels
        place = {"dtype": dtype, "device": device}
        self.time = operations.Linear(TIME_DIM, channels, **place)
        self.text = operations.Linear(params.vec_in_dim, channels, **place)
        self.film = operations.Linear(channels, 2 * channels, **place)
        self.project = operations.Linear(channels, channels, **place)
        self.reduce = operations.Conv2d(params.hidden_size, channels, 1, **place)
        self.mix = operations.Conv2d(channels, channels, 3, padding=1, **place)
        self.score = operations.Conv2d(channels, 1, 1, **place)
        # of the teacher's features on real latents
        self.register_buffer("center", torch.zeros(params.hidden_size, device=device))
        self.register_buffer("spread", torch.ones(params.hidden_size, device=device))

    def forward(self, features: Tensor, rows: int, columns: int, time: Tensor, vec: Tensor) -> Tensor:
        """features (B, N, hidden), N = rows·columns; time (B, 256) sinusoids; vec (B, vec_in) -> (B, N) float32."""
        # the residual stream's scale differs by block and channel, by orders of magnitude
        x = ((features.float() - self.center) / self.spread).to(features.dtype)
        x = rearrange(x, "b (h w) c -> b c h w", h=rows, w=columns)
        condition = F.silu(self.time(time) + self.text(vec))
        scale, shift = self.film(condition)[..., None, None].chunk(2, dim=1)
        x = F.leaky_relu(torch.addcmul(shift, self.reduce(x), 1 + scale), 0.2)
        x = x + F.leaky_relu(self.mix(x), 0.2)
        # no norm in between: the contrast of the features tells a blurred picture from a sharp one
        projected = (self.project(condition)[..., None, None] * x).mean(1, keepdim=True)
        return (self.score(x) + projected).flatten(1).float()


class Discriminator(nn.Module):
    """All heads; the teacher stays outside, so its weights are no part of what is trained or saved."""

    def __init__(
        self, params: DiscriminatorParams, *, operations: Any = nn, dtype: Any = None, device: Any = None
    ) -> None:
        super().__init__()
        self.params = params
        self.heads = nn.ModuleList(
            DiscriminatorHead(params, operations, dtype, device) for _ in range(params.num_blocks)
        )

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Kaiming layers, zero biases, FiLM that starts as identity."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or ".film." in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=1.0, generator=generator)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Take each channel's mean and deviation from batches of features of real latents, (B, N, hidden) a head."""
        count, sums = 0, [torch.zeros(2, head.center.numel(), dtype=torch.float64) for head in self.heads]
        for features in batches:
            count += features[0].shape[:2].numel()
            for total, block in zip(sums, features, strict=True):
                values = block.double().flatten(0, 1)
                total += torch.stack((values.sum(0), values.square().sum(0))).cpu()
        for head, total in zip(self.heads, sums, strict=True):
            center, square = total / count
            spread = (square - center.square()).clamp(min=0).sqrt()
            head.center.copy_(center)
            # a channel that never moves says nothing: it is not blown up
            head.spread.copy_(spread.clamp(min=float(1e-3 * spread.mean()) + 1e-6))

    def forward(
        self, features: Sequence[Tensor], rows: int, columns: int, t: Tensor, vec: Tensor
    ) -> list[Tensor]:
        """Scores (B, N) float32 of each head.

        Args:
            features: (B, N, hidden) a block, as `BlockFeatures` keeps them.
            rows: of the target's tokens as a picture; columns likewise.
            t: (B,) how noisy the input was; vec: (B, vec_in) pooled text.

        Raises:
            ValueError: not one tensor of features a head.
        """
        if len(features) != len(self.heads):
            raise ValueError(
                f"{len(features)} blocks' features for {len(self.heads)} heads: the discriminator is for another "
                "teacher"
            )
        dtype = features[0].dtype
        time = timestep_embedding(t, TIME_DIM).to(dtype)
        return [
            head(block, rows, columns, time, vec.to(dtype))
            for head, block in zip(self.heads, features, strict=True)
        ]
