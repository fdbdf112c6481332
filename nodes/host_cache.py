"""Prompts and pictures that a CLIP or VAE of the host has encoded are not encoded again, as in `kontext_core.cache`.

What is kept belongs to the network, goes with it, and is bounded in memory. A key is everything that the result is
made of: the tokens or the pixels of one sample, the settings of the CLIP or VAE, the host's mark of its patches
(LoRAs), and a fingerprint of the weights as they are. A CLIP or VAE with hooks or patched methods is asked every time.

A limit: the host's weights are inference tensors, whose writes PyTorch does not count. A write in place that goes past
the host's patches is noticed by `_SAMPLES` values of each weight, and missed where it changes none of them.

Source: Comfy-Org/ComfyUI comfy/sd.py `CLIP`, `VAE`; comfy/model_patcher.py `patches_uuid`.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Hashable
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ..kontext_core.cache import ContentCache, content

_SAMPLES = 8  # of each weight's values in a fingerprint
_CACHES: weakref.WeakKeyDictionary[nn.Module, ContentCache] = weakref.WeakKeyDictionary()


def encode_tokens(clip: Any, tokens: dict) -> list:
    """`clip.encode_from_tokens_scheduled(tokens)`: CONDITIONING, a list of its own at each call."""
    kept = _kept_by(clip, "cond_stage_model")
    words = _plain(tokens)
    scheduled = getattr(clip, "use_clip_schedule", False) or getattr(clip, "apply_hooks_to_conds", None)
    if kept is None or words is None or scheduled:
        return clip.encode_from_tokens_scheduled(tokens)
    cache, stamp = kept

    def encode() -> tuple[Any, ...]:
        ((cond, values),) = clip.encode_from_tokens_scheduled(tokens)
        return tuple(values), cond, *values.values()

    names, cond, *values = cache.get((stamp, getattr(clip, "layer_idx", None), words), encode)
    return [[_own(cond), dict(zip(names, map(_own, values), strict=True))]]


def encode_pictures(vae: Any, image: Tensor) -> Tensor:
    """`vae.encode` of IMAGE (B, H, W, 3), each picture by itself -> raw latent (B, 16, h, w)."""
    kept = _kept_by(vae, "first_stage_model")
    if kept is None or getattr(vae, "latent_dim", 2) != 2:  # a batch is a film elsewhere
        return vae.encode(image)
    cache, stamp = kept
    rows = [
        cache.get((stamp, str(vae.vae_dtype), content(row)), lambda row=row: (vae.encode(row),))
        for row in image.split(1)
    ]
    return torch.cat([_own(row[0]) for row in rows])


def _own(value: Any) -> Any:
    """A copy, where the host keeps what lies between nodes: what others do with it does not reach the cache."""
    if not isinstance(value, Tensor):
        return value
    return value.to(comfy.model_management.intermediate_device(), copy=True)


def _kept_by(owner: Any, name: str) -> tuple[ContentCache, Hashable] | None:
    """The cache of a CLIP's or VAE's network and what marks it as it is now; None if that cannot be told."""
    network, patcher = getattr(owner, name, None), getattr(owner, "patcher", None)
    if not isinstance(network, nn.Module) or getattr(patcher, "patches_uuid", None) is None:
        return None
    changed = ("hook_patches", "forced_hooks", "wrappers", "weight_wrapper_patches")
    if any(_has_any(getattr(patcher, part, None)) for part in changed):
        return None
    # Settings in a method's place are told apart (0.33 says there which dtype it casts to); methods are not.
    settings = sorted((getattr(patcher, "object_patches", None) or {}).items())
    if not all(isinstance(value, (torch.dtype, bool, int, float, str)) for _, value in settings):
        return None
    cache = _CACHES.setdefault(network, ContentCache())
    return cache, (type(owner), patcher.patches_uuid, tuple(settings), fingerprint(network))


def _has_any(part: Any) -> bool:
    """Whether a patcher's table holds something; tables of tables count by what is in them."""
    return any(map(_has_any, part.values())) if isinstance(part, dict) else bool(part)


def fingerprint(module: nn.Module) -> str:
    """Changes when weights are written: PyTorch's count of writes where it keeps one, and some values of each."""
    digest = hashlib.sha256(str(module.training).encode())
    some: dict[torch.device, list[Tensor]] = {}
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        weight = weight.detach()
        version = -1 if weight.is_inference() else weight._version
        digest.update(f"{name} {version} {weight.dtype} {tuple(weight.shape)};".encode())
        if weight.numel() and not weight.is_meta:
            flat = weight.as_strided((weight.numel(),), (1,)) if weight.is_contiguous() else weight.flatten()
            values = flat[:: max(weight.numel() // _SAMPLES, 1)][:_SAMPLES]
            some.setdefault(weight.device, []).append(values.float())
    for parts in some.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain(tokens: dict) -> Hashable | None:
    """Token lists as a key; None if vectors (embeddings) are among the tokens."""
    lists = []
    for name, rows in tokens.items():
        pairs = tuple(tuple(map(tuple, row)) for row in rows)
        if not all(isinstance(part, (int, float)) for row in pairs for pair in row for part in pair):
            return None
        lists.append((name, pairs))
    return tuple(lists)
