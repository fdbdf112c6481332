"""Where a NaN began: a wrapper that costs nothing while all is well.

The model's answer is checked. If it is not finite the same call is made once more with a look at what goes in and at
every block's result, and the first bad one is named.

Source: Comfy-Org/ComfyUI comfy/patcher_extension.py; comfy/ldm/flux/model.py `blocks_replace`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

KEY = "kontext guard"
BLACK = 2 / 255  # the brightest value of a black picture
ADVICE = {
    torch.float16: "load the model with weight_dtype bfloat16 or float32: float16 ends at 65504",
    torch.bfloat16: "load the model with weight_dtype float32, and lower the strength of LoRAs",
    torch.float32: "lower the strength of LoRAs and of model patches, and check the file with `kontext inspect`",
}


class BadNumbers(FloatingPointError):
    """NaN or infinite values, with where they began."""


def guarded(model: Any) -> Any:
    """A clone of MODEL that stops at the first NaN or infinite value."""
    model = model.clone()
    model.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY, _watch)
    return model


def _watch(
    executor,
    x,
    timestep,
    context,
    y=None,
    guidance=None,
    ref_latents=None,
    control=None,
    options=None,
    **kwargs,
):
    options = options if options is not None else {}
    out = executor(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)
    if finite(out):
        return out
    network = executor.class_obj
    at = f"at t = {float(timestep.flatten()[0]):.3f}"
    given = {"the latent": x, "the prompt (T5)": context, "the prompt (CLIP)": y}
    given |= {f"reference {i + 1}": ref for i, ref in enumerate(ref_latents or ())}
    for name, tensor in given.items():
        if tensor is not None and not finite(tensor):
            raise BadNumbers(
                f"{name} holds {kind(tensor)} {at}, before the model has done anything: look at the node it comes "
                "from; for pictures start ComfyUI with --fp32-vae, for prompts use text encoders in a wider dtype"
            )
    patches = options.get("patches_replace", {})
    watched = _watched_blocks(network, patches.get("dit", {}), at)
    options = {**options, "patches_replace": {**patches, "dit": watched}}
    executor(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)
    advice = _advice(network.final_layer, out.dtype)
    raise BadNumbers(f"the last layer, in {_dtype(out)}, gives {kind(out)} {at}: {advice}")


def _watched_blocks(network: Any, replace: dict, at: str) -> dict:
    """Replacements of all blocks that do what was there before and look at the result."""
    watched = dict(replace)
    for kind_of, blocks in (("double_block", network.double_blocks), ("single_block", network.single_blocks)):
        for index, block in enumerate(blocks):
            watched[kind_of, index] = _watched(
                replace.get((kind_of, index)), f"{kind_of}s.{index}", block, at
            )
    return watched


def _watched(before: Callable | None, name: str, block: Any, at: str) -> Callable:
    def run(arguments: dict, extra: dict) -> dict:
        largest = max(float(arguments[key].abs().max()) for key in ("img", "txt") if key in arguments)
        out = before(arguments, extra) if before is not None else extra["original_block"](arguments)
        for stream, tensor in out.items():
            if isinstance(tensor, Tensor) and not finite(tensor):
                raise BadNumbers(
                    f"{name} gives {kind(tensor)} in its {stream} stream, in {_dtype(tensor)}, {at}; what went in was "
                    f"finite, up to {largest:.4g}: {_advice(block, tensor.dtype)}"
                )
        return out

    return run


def _advice(module: Any, dtype: torch.dtype) -> str:
    """What to try: weights that are bad themselves, or a dtype that is too narrow."""
    for name, parameter in module.named_parameters():
        if not finite(parameter):
            return f"its weight {name} holds {kind(parameter)}: the file, or a LoRA on it, is damaged"
    return ADVICE.get(dtype, ADVICE[torch.float16])


def finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and nothing infinite."""
    values = tensor if tensor.element_size() > 1 else tensor.float()
    return bool(torch.isfinite(values).all())


def kind(tensor: Tensor) -> str:
    """NaN or infinite values, whichever there are."""
    return "NaN" if bool(torch.isnan(tensor.float()).any()) else "infinite values"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_latent(samples: Tensor) -> None:
    """Raises BadNumbers for a latent that is not finite."""
    if not finite(samples):
        raise BadNumbers(
            f"the latent holds {kind(samples)}: put a Kontext Guard on the MODEL before the sampler to see which block "
            "they come from"
        )


def check_image(image: Tensor, latent_is_finite: bool = False) -> None:
    """Stop at a picture of a batch (B, H, W, C) that is not finite, or black.

    A picture cannot say which block it came from: the stage is named, and for sure only when its latent was looked at.

    Raises:
        BadNumbers: with the stage and what to try.
    """
    if latent_is_finite:
        stage = "its latent is finite, so it began in the VAE's decode"
        tries = "start ComfyUI with --fp32-vae, and check the VAE's file with `kontext inspect`"
    else:
        stage = "it began in the VAE's decode, or in the model before it"
        tries = (
            "connect the latent too, to see which, and put a Kontext Guard on the MODEL, which names the block; for "
            "the VAE start ComfyUI with --fp32-vae"
        )
    for number, picture in enumerate(image, start=1):
        if not finite(picture):
            raise BadNumbers(
                f"picture {number} holds {kind(picture)}, in {_dtype(picture)}: {stage}; {tries}"
            )
        if float(picture[..., :3].max()) <= BLACK:
            raise BadNumbers(
                f"picture {number} is black, which is what NaN becomes where it is not caught: {stage}; {tries}"
            )
