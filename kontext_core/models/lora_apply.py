"""LoRAs onto networks and off again, with a report of what matched.

Plain weights are replaced by their patched values and the originals are kept: for weights that lie in a
memory map that costs no memory, since the file still has them. Packed weights (layers with a `change`
attribute: fp8, GGUF) stay as they are: plain LoRAs are added to what the layer gives (`low_rank`), all else
changes the weight each time it is unpacked. `merge=False` asks for this on plain weights too. Taking off puts
back the very same tensors.

`apply` always means "these LoRAs and no others": calling it again starts from the originals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .lora import LoraFile, Patch, Unmatched
from .lora_keys import PART_NAMES
from .low_rank import LowRank

HOST_PREFIXES = {
    "transformer": "diffusion_model.",
    "clip": "clip_l.transformer.",
    "t5": "t5xxl.transformer.",
}
"""What ComfyUI puts before a network's keys in a MODEL and in a CLIP."""

_STATE = "_kontext_lora"
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

Shapes = Mapping[str, tuple[int, ...]]
Weighted = Sequence[tuple[LoraFile, float]]


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """What became of one LoRA.

    Attributes:
        name: the LoRA's.
        format: naming scheme and kind.
        strength: as asked for.
        matched: the file's layers that change a weight.
        unmatched: what changes nothing, with the reason.
    """

    name: str
    format: str
    strength: float
    matched: tuple[str, ...]
    unmatched: tuple[Unmatched, ...]

    def __str__(self) -> str:
        total = len(self.matched) + len(self.unmatched)
        lines = [f"{self.name}: {self.format}, {len(self.matched)} of {total} layers matched"]
        lines += [f"  not used: {item.name} ({item.reason})" for item in self.unmatched]
        return "\n".join(lines)


@dataclass
class _Applied:
    """What `apply` did to a module: originals by parameter name, and the packed layers it gave a change."""

    originals: dict[str, Tensor]
    changed: list[nn.Module]


def match(file: LoraFile, shapes: Mapping[str, Shapes]) -> tuple[list[Patch], list[Unmatched]]:
    """Sort a LoRA's patches into those that fit the networks at hand and those that do not.

    Args:
        file: the LoRA.
        shapes: part -> the shapes of its weights, of the networks at hand.
    """
    fitting: list[Patch] = []
    unmatched = list(file.unmatched)
    for patch in file.patches:
        reason = _misfit(patch, shapes)
        if reason is None:
            fitting.append(patch)
        else:
            unmatched.append(Unmatched(name=patch.source, reason=reason))
    return fitting, unmatched


def matched_or_error(
    file: LoraFile, strength: float, shapes: Mapping[str, Shapes]
) -> tuple[list[Patch], LoraReport]:
    """The fitting patches and the report on them.

    Raises:
        ValueError: not one fits.
    """
    fitting, unmatched = match(file, shapes)
    if not fitting:
        shown = "; ".join(f"{item.name}: {item.reason}" for item in unmatched[:3])
        raise ValueError(
            f"{file.name} ({file.format}) changes nothing here: not one of its {len(unmatched)} layers fits "
            f"{' or '.join(PART_NAMES[part] for part in shapes)} ({shown}). Give a LoRA made for this model."
        )
    report = LoraReport(
        name=file.name,
        format=file.format,
        strength=strength,
        matched=tuple(patch.source for patch in fitting),
        unmatched=tuple(unmatched),
    )
    return fitting, report


@torch.no_grad()
def patched(weight: Tensor, changes: Sequence[tuple[Patch, float]]) -> Tensor:
    """The weight with changes made one after the other in float32 and rounded once to its own dtype."""
    result = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32, copy=True)
    for patch, strength in changes:
        rows = result if patch.offset is None else result.narrow(*patch.offset)
        rows.add_(patch.delta(rows), alpha=strength)
    if weight.dtype in _FLOAT8:  # beyond its range a cast to float8 gives NaN
        limit = torch.finfo(weight.dtype).max
        result.clamp_(-limit, limit)
    return result.to(weight.dtype)


@torch.no_grad()
def apply(modules: Mapping[str, nn.Module], loras: Weighted, *, merge: bool = True) -> list[LoraReport]:
    """Put LoRAs, and no others, onto networks.

    Args:
        modules: part ("transformer", "t5", "clip") -> network. Patches of other parts are reported as
            unmatched.
        loras: (LoRA, strength), applied in order.
        merge: replace plain weights by their patched values; False leaves every weight of a layer that can take
            its changes on use where it is (slower, no memory).

    Returns:
        A report for each LoRA.

    Raises:
        ValueError: a LoRA matches nothing, or makes a weight infinite or not a number. The networks are then
            as they were without any LoRA.
    """
    shapes = {part: weight_shapes(module) for part, module in modules.items()}
    remove(modules)
    changes: dict[str, dict[str, list[tuple[Patch, float]]]] = {part: {} for part in modules}
    reports = []
    for file, strength in loras:
        fitting, report = matched_or_error(file, strength, shapes)
        reports.append(report)
        for patch in fitting:
            if strength != 0:
                changes[patch.part].setdefault(patch.key, []).append((patch, strength))
    try:
        for part, module in modules.items():
            if changes[part]:
                _apply(module, changes[part], merge)
    except BaseException:
        remove(modules)
        raise
    return reports


@torch.no_grad()
def remove(modules: Mapping[str, nn.Module]) -> None:
    """Take every LoRA off again: the same tensors as before, bit for bit. Nothing to take off is fine."""
    for module in modules.values():
        applied: _Applied | None = module.__dict__.pop(_STATE, None)
        if applied is None:
            continue
        parameters = dict(module.named_parameters())
        for name, original in applied.originals.items():
            parameter = parameters[name]
            parameter.data = original.to(parameter.device)
        for layer in applied.changed:
            layer.change = layer.low_rank = None


def patch_state(
    state: Mapping[str, Tensor], loras: Weighted, *, part: str = "transformer"
) -> tuple[dict[str, Tensor], list[LoraReport]]:
    """A state dict with LoRAs applied; what no LoRA changes is shared with the given one, which stays as it
    is.

    Raises:
        ValueError: a LoRA matches nothing.
    """
    shapes = {part: {key: tuple(tensor.shape) for key, tensor in state.items()}}
    changes: dict[str, list[tuple[Patch, float]]] = {}
    reports = []
    for file, strength in loras:
        fitting, report = matched_or_error(file, strength, shapes)
        reports.append(report)
        for patch in fitting:
            changes.setdefault(patch.key, []).append((patch, strength))
    return {
        **state,
        **{key: _finite(patched(state[key], todo), key, todo) for key, todo in changes.items()},
    }, reports


def host_patches(
    file: LoraFile, strength: float, shapes: Shapes
) -> tuple[list[tuple[str, tuple[int, int, int] | None, Patch]], LoraReport]:
    """A LoRA as (key, (dim, start, length) or None, patch), in ComfyUI's keys, for any FLUX model of the
    host.

    The host narrows the weight to the offset; what it adds is strength * patch.delta(that weight).

    Args:
        file: the LoRA.
        strength: for the report.
        shapes: the host's state dict keys and shapes, `diffusion_model.` (MODEL), `clip_l.transformer.` and
            `t5xxl.transformer.` (CLIP) included.

    Raises:
        ValueError: nothing matches.
    """
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    host_keys: dict[tuple[str, str], str] = {}
    for key, shape in shapes.items():
        for part, prefix in HOST_PREFIXES.items():
            if key.startswith(prefix):
                ours = key[len(prefix) :]
                if part == "transformer":  # newer hosts call the QK norms' scale `weight`
                    ours = ours.replace("_norm.weight", "_norm.scale")
                parts.setdefault(part, {})[ours] = tuple(shape)
                host_keys[part, ours] = key
    fitting, report = matched_or_error(file, strength, parts)
    return [(host_keys[patch.part, patch.key], patch.offset, patch) for patch in fitting], report


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights as their layers use them; packed ones are stored otherwise."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            shapes[f"{name}.weight"] = (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Embedding):
            shapes[f"{name}.weight"] = (layer.num_embeddings, layer.embedding_dim)
    return shapes


def _misfit(patch: Patch, shapes: Mapping[str, Shapes]) -> str | None:
    """Why a patch does not fit; None if it does."""
    if patch.part not in shapes:
        return f"it is for {PART_NAMES[patch.part]}, which is not here"
    shape = shapes[patch.part].get(patch.key)
    if shape is None:
        return f"this model has no {patch.key}"
    if patch.offset is None:
        if patch.shape == tuple(shape):
            return None
    else:
        _, start, length = patch.offset
        if patch.shape[1:] == tuple(shape[1:]) and start + length <= shape[0]:
            return None
    sizes = " and ".join("x".join(str(size) for size in sizes) for sizes in (patch.shape, shape))
    return f"its size does not fit: {sizes}"


def _apply(module: nn.Module, changes: dict[str, list[tuple[Patch, float]]], merge: bool) -> None:
    """Change one network's weights and remember how they were."""
    applied = _Applied(originals={}, changed=[])
    module.__dict__[_STATE] = applied
    layers = dict(module.named_modules())
    parameters = dict(module.named_parameters())
    for key, todo in changes.items():
        layer_name, _, last = key.rpartition(".")
        layer = layers[layer_name]
        packed = getattr(layer, "kind", None) is not None
        if last == "weight" and hasattr(layer, "change") and (packed or not merge):
            applied.changed.append(layer)
            if LowRank.fits(todo):
                layer.low_rank = LowRank(todo)
                if not layer.low_rank.is_finite:
                    raise _not_finite(key, todo)
            else:
                layer.change = partial(patched, changes=tuple(todo))
            continue
        parameter = parameters[key]
        original = parameter.data
        # On an accelerator memory is what is short: the original waits on the CPU.
        applied.originals[key] = original if original.device.type == "cpu" else original.to("cpu")
        parameter.data = _finite(patched(original, todo), key, todo)


def _finite(weight: Tensor, key: str, todo: Sequence[tuple[Patch, float]]) -> Tensor:
    values = weight.float() if weight.dtype in _FLOAT8 else weight
    if not bool(torch.isfinite(values).all()):
        raise _not_finite(key, todo)
    return weight


def _not_finite(key: str, todo: Sequence[tuple[Patch, float]]) -> ValueError:
    names = ", ".join(f"{patch.source} at strength {strength:g}" for patch, strength in todo)
    return ValueError(
        f"{key} would not be finite with {names}: the LoRA is damaged, or its strength is far too high."
    )
