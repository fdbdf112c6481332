"""The core's samplers as ComfyUI SAMPLERs, and one call that samples with the host's guider, preview and cancel.

Source: Comfy-Org/ComfyUI comfy/samplers.py `KSAMPLER`, `CFGGuider`; comfy_extras/nodes_custom_sampler.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..kontext_core.latents import seed_after
from ..kontext_core.samplers import SAMPLERS, StepInfo
from . import host_runs


def make_sampler(name: str, seeds: Sequence[int] | None = None) -> comfy.samplers.KSAMPLER:
    """One of the core's samplers for any flow model of the host, ours or native.

    Args:
        seeds: of the noise that `few_step` adds, one a picture; from the sampling's own seed when None.

    Raises:
        ValueError: there is no sampler of this name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}; use one of {', '.join(SAMPLERS)}")
    return comfy.samplers.KSAMPLER(_run, {"name": name, "seeds": seeds})


def _run(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: Any = None,
    disable: bool | None = None,
    *,
    name: str,
    seeds: Sequence[int] | None,
) -> Tensor:
    """The host's sampler function: `model` gives x_0 at (x, sigma), where sigma is our t."""
    extra_args = extra_args or {}
    _check_range(sigmas)
    bar = tqdm(total=len(sigmas) - 1, disable=disable)

    def velocity(x: Tensor, t: float) -> Tensor:
        denoised = model(x, torch.full((len(x),), t, dtype=sigmas.dtype, device=x.device), **extra_args)
        return (x.float() - denoised.float()) / t

    def on_step(info: StepInfo) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not torch.isfinite(info.x_0).all():
            raise FloatingPointError(
                f"the model gave NaN or infinite numbers in step {info.index + 1} of {info.num_steps}: its "
                "weights are damaged, or need a wider dtype (weight_dtype bfloat16 or float32)"
            )
        bar.update()
        if callback is not None:
            sigma = sigmas[info.index]
            state = {"x": info.x, "i": info.index, "sigma": sigma, "sigma_hat": sigma, "denoised": info.x_0}
            callback(state)

    options = {}
    if name == "few_step":
        first = int(extra_args.get("seed") or 0)
        options["seed"] = list(seeds) if seeds is not None else [seed_after(first, i) for i in range(len(x))]
    with bar:
        return SAMPLERS[name](velocity, x, sigmas, on_step, **options)


def _check_range(sigmas: Tensor) -> None:
    if len(sigmas) and float(sigmas[0]) > 1.0001:
        raise ValueError(
            f"these SIGMAS start at {float(sigmas[0]):g}; a flow model's lie between 1 and 0: "
            "use Kontext Schedule, or a scheduler that is given the model"
        )


def _progress(model: Any, num_steps: int):
    """What the host calls after a step: the progress bar, and the picture so far for the view on the node.

    The picture is the host's preview as its settings ask for, and none where they say so. A new installation asks for
    nothing; a view needs one, so its colours are then worked out from the latent, a product of 16 by 3 for each cell.
    """
    latent_format = model.model.latent_format
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    if previewer is None and latent_format.latent_rgb_factors is not None and host_runs.wants_preview():
        previewer = latent_preview.Latent2RGBPreviewer(
            latent_format.latent_rgb_factors,
            latent_format.latent_rgb_factors_bias,
            latent_format.latent_rgb_factors_reshape,
        )
    bar = comfy.utils.ProgressBar(num_steps)

    def on_step(step: int, x_0: Tensor, _: Tensor, num_steps: int) -> None:
        shown = previewer.decode_latent_to_preview_image("JPEG", x_0) if previewer is not None else None
        bar.update_absolute(step + 1, num_steps, shown)

    return on_step


def sample(
    model: Any,
    positive: list,
    noise: Tensor,
    latent: Tensor,
    sampler: comfy.samplers.KSAMPLER,
    sigmas: Tensor,
    *,
    seed: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Raw latents (B, C, h, w) sampled as the host's SamplerCustomAdvanced with a BasicGuider does it.

    Args:
        model: MODEL, ours or native.
        positive: CONDITIONING.
        noise: (B, C, h, w).
        latent: raw latents that the noise is mixed with, zeros to start from noise alone.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    samples = guider.sample(
        noise,
        latent,
        sampler,
        sigmas,
        denoise_mask=mask,
        callback=_progress(model, sigmas.shape[-1] - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return samples.to(comfy.model_management.intermediate_device())
