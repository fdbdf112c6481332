"""Prompt and references -> what the transformer is conditioned on, as frozen dataclasses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from . import latents
from .cache import cache_of

if TYPE_CHECKING:
    from .weights.load import KontextModel

logger = logging.getLogger("kontext")

Convention = Literal["offset", "index", "uxo"]
CONVENTIONS: tuple[Convention, ...] = ("offset", "index", "uxo")


@dataclass(frozen=True, kw_only=True)
class PromptConditioning:
    """Encoded prompts: `txt` (B, L, context_in) of T5, `vec` (B, vec_in) of CLIP, and what was cut or unknown."""

    txt: Tensor
    vec: Tensor
    warnings: tuple[str, ...] = ()

    def expand(self, batch: int) -> PromptConditioning:
        """The same for a batch; one prompt is repeated.

        Raises:
            ValueError: neither one prompt nor `batch` of them.
        """
        if len(self.txt) == batch:
            return self
        if len(self.txt) != 1:
            raise ValueError(f"{len(self.txt)} prompts for a batch of {batch}: give one, or one a picture")
        txt, vec = self.txt.expand(batch, -1, -1), self.vec.expand(batch, -1)
        return PromptConditioning(txt=txt, vec=vec, warnings=self.warnings)


@dataclass(frozen=True, kw_only=True)
class References:
    """Context pictures as tokens (B or 1, M, 64) with ids (M, 3); `lengths` are each reference's tokens."""

    tokens: Tensor
    ids: Tensor
    lengths: tuple[int, ...]


def encode_prompt(model: KontextModel, prompts: Sequence[str]) -> PromptConditioning:
    """Encode prompts with the model's T5 and CLIP, each padded to the model's own length.

    Text over T5's limit is cut, and unknown words are passed as the tokenizer's unknown token; both are told in
    `warnings`. What CLIP cuts is no loss, for T5 reads it: it is logged. Each prompt is encoded by itself and
    only once; see `cache`.
    """
    if not prompts:
        raise ValueError("no prompt given: pass at least one, '' for none")
    cache = cache_of(model.t5, model.clip, model.t5_tokenizer, model.clip_tokenizer)
    rows = [cache.get(prompt, partial(_encode_one, model, prompt)) for prompt in prompts]
    txt, vec = (torch.cat([row[i].to(model.device) for row in rows]) for i in (0, 1))
    return PromptConditioning(txt=txt, vec=vec, warnings=tuple(line for row in rows for line in row[2]))


def _encode_one(model: KontextModel, prompt: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """(txt (1, L, context_in), vec (1, vec_in), warnings) of one prompt."""
    warnings: list[str] = []
    with torch.inference_mode():
        t5_tokens = model.t5_tokenizer.encode([prompt])
        clip_tokens = model.clip_tokenizer.encode([prompt])
        limit, cut, unknown = t5_tokens.ids.shape[1], t5_tokens.cut[0], t5_tokens.unknown[0]
        if cut:
            warnings.append(f"the prompt is over {limit} tokens; cut off and not read: “{cut}”")
        elif clip_tokens.cut[0]:
            logger.info(long_for_clip(clip_tokens.ids.shape[1]))
        if unknown:
            warnings.append(f"{model.name} does not know: {', '.join(unknown)} (in “{prompt}”)")
        txt = model.t5(t5_tokens.ids.to(model.device))
        _, vec = model.clip(clip_tokens.ids.to(model.device))
    return txt, vec, tuple(warnings)


def long_for_clip(limit: int) -> str:
    """What is said of a prompt that T5 reads to its end and CLIP does not."""
    return f"CLIP takes the gist of the prompt from its first {limit} tokens, T5 reads all of it: as usual with FLUX"


def place_references(
    sizes: Sequence[tuple[int, int]], target: tuple[int, int], convention: Convention = "offset"
) -> list[Tensor]:
    """Position ids (M_i, 3) of references of (h, w) latent cells beside a target of (h, w) cells.

    offset: index 1 for all, packed greedily to the side that keeps the canvas small (ComfyUI's default);
    index: 1, 2, … with no shift (the paper's); uxo: index 0, on a diagonal that starts at the target's corner.
    Source: Comfy-Org/ComfyUI comfy/ldm/flux/model.py `_forward`.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; use one of {', '.join(CONVENTIONS)}")
    placed: list[Tensor] = []
    below = beside = 0  # the extent, in cells, of what is placed so far
    for number, (height, width) in enumerate(sizes, start=1):
        if convention == "index":
            index, y, x = number, 0, 0
        elif convention == "uxo":
            index, y, x = 0, target[0] + below, target[1] + beside
            below, beside = below + height, beside + width
        else:
            index = 1
            y, x = (0, beside) if height + below > width + beside else (below, 0)
            below, beside = max(below, height + y), max(beside, width + x)
        half = latents.PATCH
        placed.append(
            latents.position_ids(height, width, index, (y + half // 2) // half, (x + half // 2) // half)
        )
    return placed


def make_references(
    reference_latents: Sequence[Tensor], target: tuple[int, int], convention: Convention = "offset"
) -> References | None:
    """Scaled latents (B or 1, 16, h, w), one a reference, as context tokens for a target of (h, w) cells."""
    if not reference_latents:
        return None
    batch = max(len(latent) for latent in reference_latents)
    tokens = [latents.pack(latent) for latent in reference_latents]
    ids = place_references([tuple(latent.shape[-2:]) for latent in reference_latents], target, convention)
    return References(
        tokens=torch.cat([part.expand(batch, -1, -1) for part in tokens], dim=1),
        ids=torch.cat(ids),
        lengths=tuple(part.shape[1] for part in tokens),
    )
