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
from ..models.attention import Attention
from ..models.clip import ClipTextEncoder
from ..models.t5 import T5Encoder
from ..models.transformer import BlockHooks, Flux
from ..schedules import Shift, training_times
from .activation import Checkpointing
from .data import LatentDataset
from .parallel import ALONE, World
from .supervision import Listening, TokenClassifier, heavier


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How examples become losses.

    Attributes:
        t_mean, t_std: of the logit-normal t; shift: what moves it afterwards, see `schedules.training_times`.
        changed_weight: extra weight of a token that the edit changes whole (0: all alike).
        caption_dropout: share of examples whose words are dropped, for guidance later.
        guidance: (low, high) the embedded guidance is drawn from; without distillation it means nothing.
        supervision: weight of the module's classifier, where the data has labels; context_supervision: of the same for
            the context's tokens, that is for seeing what is there.
        target_tokens: how many of a picture's tokens are trained on, those that the edit changes first and others at
            random; 0 for all. Fewer make a step cheaper: unchanged tokens are learnt from long before the rest.
        text_tokens: T5 tokens of a prompt, of which longer ones are cut; 0 for all. Fewer paddings, cheaper too.
    """

    t_mean: float = 0.8
    t_std: float = 1.0
    shift: Shift = "none"
    changed_weight: float = 8.0
    caption_dropout: float = 0.05
    guidance: tuple[float, float] = (1.0, 4.0)
    supervision: float = 0.5
    context_supervision: float = 0.125
    target_tokens: int = 0
    text_tokens: int = 0


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention spelled out, (B, heads, L, D) -> (B, L, heads·D): at a few hundred tokens its compiled backward
    is faster on a CPU than the flash kernel's."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    out = torch.softmax(logits.float(), dim=-1).to(q.dtype) @ v
    return out.transpose(1, 2).flatten(2)


def choose_tokens(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Numbers (B, count) of tokens in order: three quarters those with weight (B, N) above 0 as far as there are any,
    the others any at random."""
    drawn = torch.rand(weight.shape, generator=generator)
    rank = torch.where(weight > 0, drawn, drawn - 1).argsort(dim=1, descending=True).argsort(dim=1)
    first = (weight > 0) & (rank < count * 3 // 4)
    return (drawn + first).topk(count, dim=1).indices.sort(dim=1).values


def of_tokens(value: Tensor, chosen: Tensor | None) -> Tensor:
    """The chosen (B, n) of the tokens of value (B, N, …); all where none were chosen."""
    if chosen is None:
        return value
    return value[torch.arange(len(value), device=value.device)[:, None], chosen]


class KontextModule(nn.Module):
    """Transformer and text encoders together, as one thing to optimize; no encoders where words come encoded.

    `classifier` serves training alone, see `supervision`.
    """

    def __init__(
        self,
        transformer: Flux,
        t5: T5Encoder | None = None,
        clip: ClipTextEncoder | None = None,
        classifier: TokenClassifier | None = None,
    ) -> None:
        super().__init__()
        self.transformer, self.t5, self.clip, self.classifier = transformer, t5, clip, classifier


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A micro-batch on its way between data and noise, on the module's device.

    tokens (B, N+M, 64) in the compute dtype with ids (N+M, 3) or (B, N+M, 3); target (B, N, 64) float32 velocity; t,
    guidance, dropped (B,); words as the data has them; weight (B, N) in 0..1; chosen (B, N): the numbers of the
    target tokens that are there, None where all are.
    """

    tokens: Tensor
    ids: Tensor
    target: Tensor
    t: Tensor
    guidance: Tensor
    words: tuple[Tensor, Tensor]
    dropped: Tensor
    weight: Tensor
    chosen: Tensor | None = None


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
        attend: Attention = softmax_attention,
        checkpointing: Checkpointing | None = None,
        world: World = ALONE,
    ) -> None:
        """Compile the blocks if asked to.

        Args:
            empty: the empty prompt for dropped captions, as the data has its words: T5 (L,) and CLIP (77,) ids, or
                txt (L, context_in) and vec (vec_in,).
            dtype: compute in this.
            attend: `models.attention.attention` where sequences are long.
            checkpointing: which blocks compute their activations again in the backward pass.
            world: the processes that share each micro-batch.
        """
        self.module, self.data, self.config, self.empty, self.dtype = module, data, config, empty, dtype
        self.attend, self.checkpointing, self.world = attend, checkpointing, world
        if compile_blocks:
            for block in [*module.transformer.double_blocks, *module.transformer.single_blocks]:
                block.compile()

    def batch(self, step: int, micro: int, size: int) -> dict[str, Tensor]:
        return self.data.batch(step, micro, size)

    def loss(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        sample = self.noised(batch, generator)
        classifier = self.module.classifier if "labels" in batch else None
        listening = Listening(classifier.after, self.checkpointing) if classifier is not None else None
        velocity = self.velocity(sample, hooks=listening)
        error = F.mse_loss(velocity.float(), sample.target, reduction="none").mean(-1)
        # every example counts alike: within it, what the edit changes counts more
        weight = heavier(sample.weight, self.config.changed_weight)
        loss = (error * weight).mean()
        numbers: dict[str, float | Tensor] = {"mse": error.detach().mean()}
        if classifier is not None and listening is not None and listening.heard is not None:
            # dropped captions leave nothing to know: they are asked all the same, a twentieth of the examples
            labels = of_tokens(self.mine(batch["labels"]), sample.chosen)
            target = listening.heard[:, : labels.shape[1]]
            entropy, numbers["right"] = classifier.loss(target, labels, weight)
            loss = loss + self.config.supervision * entropy
            if "context_labels" in batch:
                labels = self.mine(batch["context_labels"])
                context = listening.heard[:, -labels.shape[1] :]
                seen, numbers["seen"] = classifier.loss(
                    context, labels, torch.ones(labels.shape[:2]).to(weight)
                )
                loss = loss + self.config.context_supervision * seen
        return loss, numbers

    def mine(self, value: Tensor) -> Tensor:
        """This process's rows of a micro-batch, on the module's device."""
        return value[self.world.rank :: self.world.size].to(next(self.module.parameters()).device)

    def noised(self, batch: dict[str, Tensor], generator: torch.Generator) -> Noised:
        """Draw t, noise, guidance and dropped captions for a whole micro-batch; this process's rows of it."""
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
        velocity, weight, chosen = velocity_target(x_0, eps), batch["weight"].float() / 255, None
        if 0 < config.target_tokens < x_0.shape[1]:
            chosen = choose_tokens(weight, config.target_tokens, generator)
            tokens, velocity, weight = (of_tokens(part, chosen) for part in (tokens, velocity, weight))
            ids = ids[chosen]
        if "context" in batch:
            context = batch["context"].float()
            tokens = torch.cat((tokens, latents.pack(context)), dim=1)
            place = latents.position_ids(*context.shape[-2:], index=1)
            ids = torch.cat((ids, place.expand(*ids.shape[:-2], -1, -1)), dim=-2)
        words = ("txt", "vec") if "txt" in batch else ("t5", "clip")
        return Noised(
            tokens=self.mine(tokens).to(self.dtype),
            ids=ids.to(next(self.module.parameters()).device) if ids.ndim == 2 else self.mine(ids),
            target=self.mine(velocity),
            t=self.mine(t),
            guidance=self.mine(guidance),
            words=(self.mine(batch[words[0]]), self.mine(batch[words[1]])),
            dropped=self.mine(dropped),
            weight=self.mine(weight),
            chosen=None if chosen is None else self.mine(chosen),
        )

    def velocity(
        self, sample: Noised, words: tuple[Tensor, Tensor] | None = None, hooks: BlockHooks | None = None
    ) -> Tensor:
        """The module's velocity (B, N, 64) of the target tokens; `words` (txt, vec) in place of the sample's."""
        txt, vec = words or self.encode(*sample.words, sample.dropped)
        return self.module.transformer(
            sample.tokens,
            sample.ids,
            txt,
            latents.text_ids(txt.shape[1]).to(txt.device).expand(*sample.ids.shape[:-2], -1, -1),
            sample.t,
            vec,
            sample.guidance,
            num_target=sample.target.shape[1],
            attend=self.attend,
            hooks=hooks or self.checkpointing,
        )

    def encode(self, t5: Tensor, clip: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Words -> txt (B, L, d) and vec (B, v) in the compute dtype, the dropped ones as the empty prompt.

        Words that come encoded, as txt and vec, pass through.
        """
        empty_t5, empty_clip = (part.to(t5.device) for part in self.empty)
        if self.config.text_tokens:
            t5, empty_t5 = t5[:, : self.config.text_tokens], empty_t5[: self.config.text_tokens]
        if t5.ndim == 3:
            txt = torch.where(dropped[:, None, None], empty_t5, t5)
            return txt.to(self.dtype), torch.where(dropped[:, None], empty_clip, clip).to(self.dtype)
        t5_ids = torch.where(dropped[:, None], empty_t5, t5.long())
        clip_ids = torch.where(dropped[:, None], empty_clip, clip.long())
        # CLIP is causal and pools at the end token, so what comes after the longest prompt changes nothing
        longest = int(clip_ids.argmax(-1).max()) + 1
        _, vec = self.module.clip(clip_ids[:, :longest], dtype=self.dtype)
        return self.module.t5(t5_ids, dtype=self.dtype), vec.to(self.dtype)
