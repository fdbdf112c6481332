"""Training the flow: the transformer, and with it the text encoders, to predict velocity from latents and words.

Loss: mean of ‖v_theta(x_t, t, y, c) − (eps − x_0)‖², tokens weighted where the data says what an edit changes.
Source: arXiv 2506.15742 section 3; ../flow.py for the sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import latents
from ..flow import interpolate, velocity_target
from ..models.clip import ClipTextEncoder
from ..models.t5 import T5Encoder
from ..models.transformer import Flux
from ..schedules import Shift, training_times
from .data import LatentDataset


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How examples become losses.

    Attributes:
        t_mean, t_std: of the logit-normal t; shift: what moves it afterwards, see `schedules.training_times`.
        changed_weight: extra weight of a token that the edit changes whole (0: all alike).
        caption_dropout: share of examples whose words are dropped, for guidance later.
        guidance: (low, high) the embedded guidance is drawn from; without distillation it means nothing.
    """

    t_mean: float = 0.5
    t_std: float = 1.0
    shift: Shift = "none"
    changed_weight: float = 8.0
    caption_dropout: float = 0.05
    guidance: tuple[float, float] = (1.0, 4.0)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention spelled out, (B, heads, L, D) -> (B, L, heads·D): at a few hundred tokens its compiled backward
    is faster on a CPU than the flash kernel's."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    out = torch.softmax(logits.float(), dim=-1).to(q.dtype) @ v
    return out.transpose(1, 2).flatten(2)


class KontextModule(nn.Module):
    """Transformer and text encoders together, as one thing to optimize."""

    def __init__(self, transformer: Flux, t5: T5Encoder, clip: ClipTextEncoder) -> None:
        super().__init__()
        self.transformer, self.t5, self.clip = transformer, t5, clip


class FlowTask:
    """Rectified flow on latents; a `Task` for `loop.train`."""

    def __init__(
        self,
        module: KontextModule,
        data: LatentDataset,
        config: FlowConfig,
        *,
        empty: tuple[Tensor, Tensor],
        dtype: torch.dtype = torch.bfloat16,
        compile_blocks: bool = False,
    ) -> None:
        """empty: the T5 (L,) and CLIP (77,) ids of the empty prompt, for dropped captions."""
        self.module, self.data, self.config, self.empty, self.dtype = module, data, config, empty, dtype
        if compile_blocks:
            for block in [*module.transformer.double_blocks, *module.transformer.single_blocks]:
                block.compile()

    def batch(self, step: int, micro: int, size: int) -> dict[str, Tensor]:
        return self.data.batch(step, micro, size)

    def loss(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        config = self.config
        target = batch["target"].float()
        size, _, h, w = target.shape
        x_0 = latents.pack(target)
        t = training_times(
            size, x_0.shape[1], generator, mean=config.t_mean, std=config.t_std, shift=config.shift
        )
        eps = torch.randn(x_0.shape, generator=generator)
        guidance = config.guidance[0] + (config.guidance[1] - config.guidance[0]) * torch.rand(
            size, generator=generator
        )
        dropped = torch.rand(size, generator=generator) < config.caption_dropout
        tokens, ids = interpolate(x_0, eps, t), latents.position_ids(h, w)
        if "context" in batch:
            context = batch["context"].float()
            tokens = torch.cat((tokens, latents.pack(context)), dim=1)
            ids = torch.cat((ids, latents.position_ids(*context.shape[-2:], index=1)))
        txt, vec = self.encode(batch["t5"].long(), batch["clip"].long(), dropped)
        velocity = self.module.transformer(
            tokens.to(self.dtype),
            ids,
            txt,
            latents.text_ids(txt.shape[1]),
            t,
            vec,
            guidance,
            num_target=x_0.shape[1],
            attend=softmax_attention,
        )
        error = F.mse_loss(velocity.float(), velocity_target(x_0, eps), reduction="none").mean(-1)
        weight = 1 + config.changed_weight * batch["weight"].float() / 255
        # every example counts alike: within it, what the edit changes counts more
        loss = (error * weight / weight.mean(1, keepdim=True)).mean()
        return loss, {"mse": error.detach().mean()}

    def encode(self, t5_ids: Tensor, clip_ids: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Words -> txt (B, L, d) and vec (B, v) in the compute dtype, the dropped ones as the empty prompt."""
        t5_ids = torch.where(dropped[:, None], self.empty[0], t5_ids)
        clip_ids = torch.where(dropped[:, None], self.empty[1], clip_ids)
        # CLIP is causal and pools at the end token, so what comes after the longest prompt changes nothing
        longest = int(clip_ids.argmax(-1).max()) + 1
        _, vec = self.module.clip(clip_ids[:, :longest], dtype=self.dtype)
        return self.module.t5(t5_ids, dtype=self.dtype), vec.to(self.dtype)
