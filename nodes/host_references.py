"""Strength, mask, steps and place of single references, for our models and native ones with any sampler.

The settings lie on the conditioning and act through one of the host's hooks, a DIFFUSION_MODEL wrapper that is there
only for this conditioning:

    strength s, mask m   log(s * m) is added to the attention scores of the reference's tokens; at 0 nobody sees them
    steps                outside them it counts as strength 0
    place                `post_input` puts the position ids where each reference's own convention wants them

A reference that nobody sees is not computed when none that is seen follows it: the place of the others depends on it.
With settings that change nothing there is no hook, and the model runs as it would without.

Source: Comfy-Org/ComfyUI comfy/hooks.py `TransformerOptionsHook`, comfy/ldm/flux/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.hooks
import comfy.patcher_extension
import torch
from torch import Tensor

from ..kontext_core import latents
from ..kontext_core.conditioning import place_references

HOOK = "kontext references"
SETTINGS = "kontext_references"


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceSettings:
    """What holds for one reference.

    Attributes:
        convention: where it is placed.
        strength: factor on the attention that it gets.
        mask: (1 or B, tokens) in 0..1, where it is seen; None for everywhere.
        start, end: the part of the steps in which it is seen, 0..1.
    """

    convention: str
    strength: float = 1.0
    mask: Tensor | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"start is {self.start:g} and end {self.end:g}: start must be below end, both between 0 and 1"
            )

    @property
    def plain(self) -> bool:
        """Whether it changes nothing but the place."""
        return self.strength == 1 and self.mask is None and (self.start, self.end) == (0, 1)

    def sees(self, progress: float) -> bool:
        """Whether it is seen at this part of the steps."""
        return self.strength > 0 and self.start <= progress and (progress < self.end or self.end == 1)


def with_settings(conditioning: list, settings: ReferenceSettings) -> list:
    """The conditioning whose last reference has these settings."""
    result = []
    for tensor, values in conditioning:
        number = len(values["reference_latents"]) - 1
        known = {**values.get(SETTINGS, {}), number: settings}
        values = {**values, SETTINGS: known}
        hooks = _others(values.get("hooks"))
        conventions = {item.convention for item in known.values()}
        if len(conventions) > 1 or not all(item.plain for item in known.values()):
            hooks.add(_hook(known))
        if len(hooks):
            values["hooks"] = hooks
        else:
            values.pop("hooks", None)
        result.append([tensor, values])
    return result


def _others(hooks: comfy.hooks.HookGroup | None) -> comfy.hooks.HookGroup:
    """The hooks of a conditioning without ours."""
    kept = comfy.hooks.HookGroup()
    for hook in () if hooks is None else hooks.hooks:
        if hook.hook_id != HOOK:
            kept.add(hook)
    return kept


def _hook(settings: Mapping[int, ReferenceSettings]) -> comfy.hooks.TransformerOptionsHook:
    def wrapper(
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
        references, options, kwargs = _changed(settings, x, context, ref_latents, options or {}, kwargs)
        return executor(x, timestep, context, y, guidance, references, control, options, **kwargs)

    wrappers = {comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL: {HOOK: [wrapper]}}
    hook = comfy.hooks.TransformerOptionsHook({"wrappers": wrappers}, comfy.hooks.EnumHookScope.HookedOnly)
    hook.hook_id = HOOK
    return hook


def _changed(
    settings: Mapping[int, ReferenceSettings],
    x: Tensor,
    context: Tensor,
    ref_latents: Sequence[Tensor] | None,
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[list[Tensor] | None, dict[str, Any], dict[str, Any]]:
    """(references, transformer_options, further arguments) of one call of the model."""
    references = list(ref_latents or ())
    now = progress(options)
    while references and (last := settings.get(len(references) - 1)) is not None and not last.sees(now):
        references.pop()
    if not references:
        return None, options, kwargs
    target = _grid(x)
    weights = [_weights(settings.get(i), ref, now, len(x)) for i, ref in enumerate(references)]
    if any(weight is not None for weight in weights):
        bias = _bias(weights, references, context.shape[1] + target[0] * target[1]).to(x)
        given = kwargs.get("attention_mask")
        kwargs = {**kwargs, "attention_mask": bias if given is None else bias + _as_bias(given, x)}
    method = kwargs.get("ref_latents_method", "offset")
    conventions = [settings[i].convention if i in settings else method for i in range(len(references))]
    if len(set(conventions)) > 1:
        sizes = [tuple(2 * n for n in _grid(ref)) for ref in references]
        ids = place_mixed(sizes, (2 * target[0], 2 * target[1]), conventions)
        patches = options.get("patches", {})
        moved = [*patches.get("post_input", ()), _placer(ids, target[0] * target[1])]
        options = {**options, "patches": {**patches, "post_input": moved}}
    return references, options, kwargs


def progress(options: Mapping[str, Any]) -> float:
    """The part of the steps that is done, 0..1; by the noise level where the host does not name the steps."""
    sigma = float(options["sigmas"].flatten()[0])
    steps = options.get("sample_sigmas")
    if steps is None or len(steps) < 2:
        return 1 - sigma
    return int((steps[:-1] > sigma * (1 + 1e-4)).sum()) / (len(steps) - 1)


def place_mixed(
    sizes: Sequence[tuple[int, int]], target: tuple[int, int], conventions: Sequence[str]
) -> Tensor:
    """Position ids (M, 3) of references of (h, w) cells, each placed by its own convention beside those of the same.

    An indexed reference has the number that it has among all of them.
    """
    ids: list[Tensor | None] = [None] * len(sizes)
    for convention in set(conventions):
        if convention == "index":
            placed = place_references(sizes, target, "index")
            members = range(len(sizes))
        else:
            members = [i for i, name in enumerate(conventions) if name == convention]
            known = convention if convention in ("offset", "uxo") else "offset"
            placed = place_references([sizes[i] for i in members], target, known)
        for i, part in zip(members, placed, strict=True):
            if conventions[i] == convention:
                ids[i] = part
    return torch.cat(ids)


def _placer(ids: Tensor, num_target: int):
    def place(values: dict) -> dict:
        img_ids = values["img_ids"].clone()
        img_ids[:, num_target : num_target + len(ids)] = ids.to(img_ids)
        return {**values, "img_ids": img_ids}

    return place


def _grid(latent: Tensor) -> tuple[int, int]:
    """(rows, columns) of a latent's tokens."""
    return tuple(-(-n // latents.PATCH) for n in latent.shape[-2:])


def _weights(settings: ReferenceSettings | None, reference: Tensor, now: float, batch: int) -> Tensor | None:
    """(1 or B, tokens) factors on the attention to a reference; None for 1 everywhere."""
    if settings is None or (settings.plain and settings.sees(now)):
        return None
    rows, columns = _grid(reference)
    if not settings.sees(now):
        return torch.zeros(1, rows * columns)
    if settings.mask is None:
        return torch.full((1, rows * columns), settings.strength)
    mask = settings.mask
    if mask.shape[1] != rows * columns:
        raise ValueError(f"the mask has {mask.shape[1]} tokens and its reference {rows * columns}")
    if len(mask) > 1:
        mask = mask.repeat(-(-batch // len(mask)), 1)[:batch]
    return mask * settings.strength


def _bias(weights: Sequence[Tensor | None], references: Sequence[Tensor], num_before: int) -> Tensor:
    """(1 or B, 1, 1, tokens) to be added to the scores; text and target come first and keep theirs."""
    parts = [torch.ones(1, num_before)]
    for weight, reference in zip(weights, references, strict=True):
        rows, columns = _grid(reference)
        parts.append(torch.ones(1, rows * columns) if weight is None else weight)
    batch = max(len(part) for part in parts)
    return torch.cat([part.expand(batch, -1) for part in parts], dim=1).log()[:, None, None]


def _as_bias(mask: Tensor, x: Tensor) -> Tensor:
    """Another pack's attention mask, (Q, K), (B, Q, K) or (B, H, Q, K), as something to add."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    while mask.dim() < 4:
        mask = mask[None] if mask.dim() == 2 else mask[:, None]
    return mask.to(x)
