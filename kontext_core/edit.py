"""Editing an image, straight down: fit, encode, condition, sample, decode, back to the size it came in."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import geometry, latents, schedules
from .accelerate import Accelerate, Saved
from .cache import cache_of, content
from .conditioning import Convention, encode_prompt, make_references
from .denoise import Denoiser
from .models.backends import choose_attention
from .models.tiling import decode_within, encode_within
from .samplers import SAMPLERS, OnStep

if TYPE_CHECKING:
    from .weights.load import KontextModel


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """What an edit gives.

    Attributes:
        images: (B, 3, H, W) float32 in [-1, 1], at the size the first picture came in (or the size asked for).
        latent: (B, 16, h, w) scaled latent that was decoded, for chaining without decoding.
        geometry: how the first picture was fitted; None for text to image.
        seeds: each picture's own seed.
        seconds: of "encode", "sample", "decode".
        warnings: what was cut from or not known in the prompts.
        saved: what `accelerate` skipped; None without it.
    """

    images: Tensor
    latent: Tensor
    geometry: geometry.Geometry | None
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    saved: Saved | None = None


def edit_image(
    model: KontextModel,
    images: Tensor | Sequence[Tensor] | None,
    prompt: str | Sequence[str],
    *,
    num_steps: int | None = None,
    guidance: float | None = None,
    seed: int | Sequence[int] = 0,
    size: tuple[int, int] | str = "auto",
    fit: str = "stretch",
    pad_color: tuple[int, int, int] | None = None,
    shift: schedules.Shift = "resolution",
    sampler: str = "euler",
    few_step: int | None = None,
    convention: Convention = "offset",
    batch: int | None = None,
    reference_latents: Sequence[Tensor] = (),
    bfl_noise: bool = False,
    accelerate: Accelerate | None = None,
    attention: str = "auto",
    on_step: OnStep | None = None,
) -> EditResult:
    """Edit pictures by instruction, or make them from text when there is none.

    Args:
        images: None, one picture (B or 1, 3, H, W) in [-1, 1], or several: the first is edited, the others are
            further references.
        prompt: one instruction, or one a picture of the batch.
        num_steps: the model's own number when None.
        guidance: the embedded (distilled) guidance; the model's own when None.
        seed: one for the batch (picture i uses seed + i), or one a picture.
        size: "auto" (the bucket nearest to the first picture, and the result back at the picture's own size), or
            (width, height) in multiples of 16, which the result then has.
        fit: how pictures meet the bucket: "stretch", "crop", "pad" or "keep".
        pad_color: red, green, blue (0..255) of what "pad" adds; None mirrors the picture.
        shift: of the schedule; see `schedules.timesteps`.
        few_step: 1, 2 or 4 steps with the model's distilled transformer; overrides num_steps, shift and sampler.
        convention: placement of several references: "offset", "index" or "uxo".
        batch: pictures to make; by default as many as there are prompts or pictures.
        reference_latents: scaled latents (B or 1, 16, h, w) taken as references as they are; the first one sets the
            size when there is no picture.
        bfl_noise: draw noise as black-forest-labs/flux does.
        accelerate: approximations that skip work between steps; none by default, which is exact.
        attention: "auto" (the fastest exact one on the device, measured once), "torch", or another of
            `models.backends.NAMES`.
        on_step: progress, preview and cancel.

    Raises:
        ValueError: an argument out of range, pictures and prompts that do not go together, or few-step sampling
            without a distilled model.
        FloatingPointError: the model gave NaN or infinite numbers.
    """
    preset = model.preset
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    pictures = [] if images is None else [images] if isinstance(images, Tensor) else list(images)
    batch = _batch(batch, prompts, pictures, reference_latents)
    seeds = tuple(latents.seed_after(seed, i) for i in range(batch)) if isinstance(seed, int) else tuple(seed)
    guidance = preset.default_guidance if guidance is None else float(guidance)
    if not math.isfinite(guidance) or guidance < 0:
        raise ValueError(f"guidance is {guidance}; use 0 or more ({preset.default_guidance} is usual)")
    transformer, sample, grid_of = _sampling(model, sampler, few_step, num_steps, shift, seeds)

    started = time.perf_counter()
    fitted = [_fit(picture, size, fit, preset.max_area, pad_color) for picture in pictures]
    width, height = _target_size(size, fitted, reference_latents, preset.max_area)
    h, w = height // latents.CELL, width // latents.CELL
    context = [encode_image(model, geometry.apply(plan, picture)) for plan, picture in fitted]
    conditioning = encode_prompt(model, prompts)
    warnings = conditioning.warnings
    conditioning = conditioning.expand(batch)
    references = make_references([*context, *reference_latents], (h, w), convention)
    encoded = time.perf_counter()

    grid = grid_of(h * w // latents.PATCH**2)
    num_tokens = conditioning.txt.shape[1] + h * w // latents.PATCH**2
    attend = choose_attention(
        attention,
        model.device,
        transformer.compute_dtype,
        head_dim=transformer.params.hidden_size // transformer.params.num_heads,
        num_tokens=num_tokens + (0 if references is None else sum(references.lengths)),
    )
    denoiser = Denoiser(
        transformer,
        conditioning,
        references,
        h,
        w,
        guidance=guidance,
        planned=grid[:-1].tolist(),
        accelerate=accelerate,
        attend=attend,
    )
    x = latents.pack(latents.noise(batch, h, w, seeds, bfl=bfl_noise)).to(denoiser.device)
    x = sample(denoiser, x, grid, on_step)
    if not torch.isfinite(x).all():
        raise FloatingPointError(
            f"{model.name} gave NaN or infinite numbers while sampling in {denoiser.dtype}: "
            "its weights are damaged, or need a wider dtype (bfloat16 or float32)"
        )
    latent = latents.unpack(x, h, w)
    sampled = time.perf_counter()

    decoded = decode_latent(model, latent)
    plan = fitted[0][0] if fitted else None
    if plan is not None and size == "auto":
        decoded = geometry.invert(plan, decoded, _repeat(fitted[0][1], batch))
    return EditResult(
        images=decoded,
        latent=latent,
        geometry=plan,
        seeds=seeds,
        steps=len(grid) - 1,
        guidance=guidance,
        seconds={
            "encode": encoded - started,
            "sample": sampled - encoded,
            "decode": time.perf_counter() - sampled,
        },
        warnings=warnings,
        saved=denoiser.saved,
    )


@torch.inference_mode()
def encode_image(model: KontextModel, image: Tensor) -> Tensor:
    """Picture (B, 3, H, W) in [-1, 1] -> scaled latent (B, 16, h, w), float32; each picture once, see `cache`."""
    weight = next(model.autoencoder.parameters())
    cache = cache_of(model.autoencoder)

    def encode(picture: Tensor) -> tuple[Tensor]:
        return (encode_within(model.autoencoder, picture.to(weight), model.autoencoder_budget).float(),)

    key = model.autoencoder_budget  # by which a large picture is encoded in tiles or not
    rows = [cache.get((content(picture), key), partial(encode, picture)) for picture in image.split(1)]
    return torch.cat([row[0].to(weight.device) for row in rows])


@torch.inference_mode()
def decode_latent(model: KontextModel, latent: Tensor) -> Tensor:
    """Scaled latent (B, 16, h, w) -> picture (B, 3, H, W) in [-1, 1], float32 on the CPU."""
    weight = next(model.autoencoder.parameters())
    images = decode_within(model.autoencoder, latent.to(weight), model.autoencoder_budget)
    return images.float().clamp(-1, 1).cpu()


def _batch(
    asked: int | None, prompts: list[str], pictures: list[Tensor], reference_latents: Sequence[Tensor]
) -> int:
    sizes = {"prompts": len(prompts)}
    sizes |= {f"picture {i + 1}": len(picture) for i, picture in enumerate(pictures)}
    sizes |= {f"reference latent {i + 1}": len(latent) for i, latent in enumerate(reference_latents)}
    batch = asked if asked is not None else max(sizes.values())
    wrong = {name: count for name, count in sizes.items() if count not in (1, batch)}
    if batch < 1 or wrong:
        raise ValueError(f"a batch of {batch} needs 1 or {batch} of everything; got {wrong or asked}")
    return batch


def _sampling(
    model: KontextModel,
    sampler: str,
    few_step: int | None,
    num_steps: int | None,
    shift: Any,
    seeds: tuple[int, ...],
):
    """(transformer, sampler, token count -> grid) of the settings."""
    if few_step is not None:
        if model.few_step is None:
            raise ValueError(
                f"few-step sampling needs a distilled model and {model.name} has none: "
                "leave few-step out, or use a model folder that holds one"
            )
        grid = schedules.few_steps(few_step)
        return model.few_step, partial(SAMPLERS["few_step"], seed=seeds), lambda _: grid
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; use one of {', '.join(SAMPLERS)}")
    steps = model.preset.default_steps if num_steps is None else num_steps
    sample = partial(SAMPLERS["few_step"], seed=seeds) if sampler == "few_step" else SAMPLERS[sampler]
    return model.transformer, sample, partial(schedules.timesteps, steps, shift=shift)


def _fit(
    picture: Tensor,
    size: tuple[int, int] | str,
    policy: str,
    max_area: int,
    pad_color: tuple[int, int, int] | None,
):
    if picture.ndim != 4 or picture.shape[1] != 3 or not len(picture):
        raise ValueError(f"a picture is (B, 3, H, W) in [-1, 1], not {tuple(picture.shape)}")
    if not torch.isfinite(picture).all():
        raise ValueError("the picture holds NaN or infinite values")
    height, width = picture.shape[-2:]
    plan = geometry.fit((width, height), policy, size, max_area=max_area, pad_color=pad_color)
    return plan, picture.float()


def _target_size(size, fitted, reference_latents: Sequence[Tensor], max_area: int) -> tuple[int, int]:
    """(width, height) in pixels of what is made."""
    if size != "auto":
        width, height = size
        if width % 16 or height % 16 or width < 16 or height < 16:
            raise ValueError(f"size is {width}×{height}; both sides must be multiples of 16, 16 or more")
        return width, height
    if fitted:
        return fitted[0][0].size
    if reference_latents:
        h, w = reference_latents[0].shape[-2:]
        return w * latents.CELL, h * latents.CELL
    return geometry.nearest_size((1, 1), max_area)


def _repeat(picture: Tensor, batch: int) -> Tensor:
    return picture.expand(batch, -1, -1, -1)
