"""The host's native values between nodes: conditioning lists, latents, encoded pictures, texts on a node.

Conditioning is a list of [tensor, values] and is never changed in place: other nodes hold it too.
"""

from __future__ import annotations

import logging
import time

import comfy.model_management
import comfy.sd
import node_helpers
from torch import Tensor

from ..kontext_core.conditioning import long_for_clip
from ..kontext_core.models.tokenizers import CLIP_LENGTH
from ..kontext_core.presets import KONTEXT_DEV
from . import host_cache, host_runs
from .host_clip import HostTokenizer

logger = logging.getLogger("kontext")


def encode_prompt(clip: comfy.sd.CLIP, text: str, text_length: int = 0) -> tuple[list, list[str]]:
    """CONDITIONING of a prompt as it is written, and what the encoders will not see of it.

    Args:
        clip: ours or native.
        text_length: tokens that T5 is padded to; 0 for the number that the model was trained with: our encoders'
            own, and FLUX.1 Kontext's for native FLUX encoders, which the host would pad to 256.

    Raises:
        ValueError: there is no CLIP.
    """
    if clip is None:
        raise ValueError("there are no text encoders: the loader this comes from found none in its file")
    ours = isinstance(clip.tokenizer, HostTokenizer)
    if not text_length and not ours and hasattr(clip.tokenizer, "t5xxl"):
        text_length = KONTEXT_DEV.text_length
    options = {"t5xxl_min_length": text_length} if text_length else {}
    tokens = clip.tokenize(text, disable_weights=True, tokenizer_options=options)
    warnings = clip.tokenizer.warnings(text) if ours else native_warnings(tokens)
    return host_cache.encode_tokens(clip, tokens), warnings


def native_warnings(tokens: dict[str, list]) -> list[str]:
    """What the host's own FLUX encoders make of a prompt that is over a limit; logged too, as ours log theirs.

    The host cuts nothing off for T5. CLIP's text it breaks into chunks, of which FLUX is given the first.
    """
    length, known = max(map(len, tokens.get("t5xxl", [[]]))), KONTEXT_DEV.text_length
    if length > known:
        warning = (
            f"the prompt is {length} tokens long for T5, and FLUX.1 Kontext was trained with {known}: nothing is cut, "
            "but its end may not be followed"
        )
        logger.warning(warning)
        return [warning]
    if len(tokens.get("l", [])) > 1:
        logger.info(long_for_clip(CLIP_LENGTH))
    return []


def with_values(conditioning: list, values: dict) -> list:
    """The conditioning with these values set."""
    return node_helpers.conditioning_set_values(conditioning, values)


def with_reference(conditioning: list, latent: Tensor, convention: str) -> list:
    """The conditioning with one more reference, a raw latent (B, 16, h, w)."""
    added = node_helpers.conditioning_set_values(conditioning, {"reference_latents": [latent]}, append=True)
    return with_values(added, {"reference_latents_method": convention})


def encode(vae: comfy.sd.VAE, image: Tensor) -> Tensor:
    """IMAGE (B, H, W, 3) -> raw latent (B, 16, h, w), each picture once."""
    return host_cache.encode_pictures(vae, image[..., :3])


def decode(vae: comfy.sd.VAE, latent: Tensor) -> Tensor:
    """Raw latent (B, 16, h, w) -> IMAGE (B, H, W, 3)."""
    return vae.decode(latent)


def zeros(batch: int, rows: int, columns: int, channels: int = 16) -> Tensor:
    """An empty latent where the host keeps what lies between nodes."""
    import torch

    return torch.zeros(batch, channels, rows, columns, device=comfy.model_management.intermediate_device())


def tell(node_id: str | None, lines: list[str]) -> None:
    """Show lines of text on the node that runs, in place of what it said before; web/js/kontext.js `showLines` does."""
    host_runs.send("kontext.lines", node_id, {"lines": lines})


class Report:
    """What several parts have to say under one node: each replaces its own lines only."""

    def __init__(self, node_id: str | None) -> None:
        self._node_id = node_id
        self._lines: dict[str, list[str]] = {}

    def say(self, part: str, lines: list[str]) -> None:
        self._lines[part] = lines
        tell(self._node_id, [line for some in self._lines.values() for line in some])


def check_finite(tensor: Tensor, what: str) -> None:
    """Stop before a black picture.

    Raises:
        FloatingPointError: NaN or infinite values.
    """
    if not tensor.isfinite().all():
        raise FloatingPointError(
            f"{what} holds NaN or infinite values: the weights are damaged, or need a wider dtype (load the "
            "model with weight_dtype bfloat16 or float32; start ComfyUI with --fp32-vae for the VAE)"
        )


def log_time(text: str, started: float) -> None:
    """Log what was done and how long it took since `started` (time.perf_counter)."""
    logger.info("%s: %.1f s", text, time.perf_counter() - started)
