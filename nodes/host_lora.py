"""LoRA files of any known format as weight patches of the host's models, ours and native ones alike.

The host patches, unpatches, streams and casts as with its own LoRAs; what is added to a weight is the core's.

Source: Comfy-Org/ComfyUI comfy/lora.py `calculate_weight`, comfy/weight_adapter/base.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ..kontext_core.models.lora import Patch
from ..kontext_core.models.lora_apply import LoraReport, host_patches
from ..kontext_core.weights.lora_file import load_lora
from .host import BUNDLED_LORAS, LORAS, SUFFIXES, LoadedLora
from .host_layers import logical_shapes


def list_loras() -> list[str]:
    """Names of the LoRA files in the host's folder, then the bundled model's."""
    found = [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(SUFFIXES)]
    return found + [f"{file.stem} (bundled)" for file in sorted(BUNDLED_LORAS.glob("*.safetensors"))]


class CorePatch(WeightAdapterBase):
    """One of the core's patches where the host expects a weight adapter."""

    name = "kontext"

    def __init__(self, patch: Patch):
        self.patch = patch
        self.loaded_keys: set[str] = set()
        self.weights: list[Tensor] = list(patch.tensors.values())

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: Any = None,
        original_weight: Any = None,
    ) -> Tensor:
        """The weight, which the host has narrowed to the patched rows, changed in place."""
        weight.add_(function(self.patch.delta(weight)).to(weight.dtype), alpha=strength)
        return weight


def add_lora(
    model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float
) -> tuple[Any, Any, LoraReport]:
    """(MODEL, CLIP, report): clones with the LoRA of a file on them. CLIP may be None.

    Raises:
        ValueError: no LoRA for FLUX, not one layer fits, or a layer that should fit was refused by the host.
    """
    file = load_lora(path)
    shapes = _shapes(model.model)
    if clip is not None:
        shapes |= _shapes(clip.patcher.model)
    patches, report = host_patches(file, strength_model, shapes)
    model = model.clone()
    clip = clip.clone() if clip is not None else None
    for_text = file.parts != {"transformer"}
    for patcher, strength in (
        (model, strength_model),
        (clip.patcher if for_text and clip else None, strength_clip),
    ):
        if patcher is not None and strength:
            loaded = LoadedLora(path=path, strength=strength, for_text=for_text)
            patcher.set_attachments(LORAS, (*(patcher.get_attachment(LORAS) or ()), loaded))
    sides = [(model, "diffusion_model.", strength_model)]
    if clip is not None:
        sides.append((clip, "", strength_clip))
    for patcher, prefix, strength in sides:
        todo = [item for item in patches if item[0].startswith("diffusion_model.") == bool(prefix)]
        refused = _add(patcher, todo, strength) if strength else []
        if refused:
            raise ValueError(f"{file.name}: ComfyUI does not take a patch for {', '.join(refused[:3])}")
    return model, clip, report


def _add(patcher: Any, patches: list, strength: float) -> list[str]:
    """Hand patches to the host; the keys that it did not take. One call takes each key once."""
    refused = []
    while patches:
        now, later = {}, []
        for key, offset, patch in patches:
            where = key if offset is None else (key, offset)
            if where in now:
                later.append((key, offset, patch))
            else:
                now[where] = CorePatch(patch)
        taken = set(patcher.add_patches(now, strength))
        refused += [str(where) for where in now if where not in taken]
        patches = later
    return refused


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return shapes | logical_shapes(module)
