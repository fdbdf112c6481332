"""Layers whose weights the host must not unpack or load as it does its own: packed ones, and modulation's.

Both make their weight anew at each use, with the host's patches (LoRAs) of that moment, and keep what is stored as
it is. `PackedLinear` has the file's bytes as its one parameter, so that the host counts, moves and offloads them as
they are. `AsideLinear` is for what is used up before sampling: its weights are no parameters, stay in main memory
(the file's memory map) and are brought to the device for the moment of their use; in the state dict they are where
they always were, so that every LoRA finds them.

Source: Comfy-Org/ComfyUI comfy/model_patcher.py `load`, `patch_weight_to_device`, `get_key_weight`; comfy/lora.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ..kontext_core.models.lora import Patch
from ..kontext_core.models.low_rank import LowRank
from ..kontext_core.models.transformer import Flux
from ..kontext_core.weights import ggml_types, offload, packed
from ..kontext_core.weights.mapped import MappedFile


class _AtUse(packed.Linear):
    """What both have in common: the host's patches, taken at each use."""

    weight_key = ""
    weight_patches: tuple = ()
    bias_patches: tuple = ()

    def take_patches(self, key: str, patches: Mapping[str, list]) -> None:
        """The host's patches of this layer, from now on; `key` is the layer's in the host's state dict."""
        mine = patches.get(f"{key}.weight") or []
        self.weight_key, self.weight_patches = f"{key}.weight", tuple(mine)
        changes = [_low_rank_change(patch) for patch in mine]
        self.low_rank = self.change = None
        if mine and None not in changes and LowRank.fits(changes):
            self.low_rank = LowRank(changes)
        elif mine:
            self.change = partial(_changed, list(mine), f"{key}.weight")

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """Stored bytes as values, also when the host has cast the bytes to floats first."""
        if self.packing is None:
            return weight
        if self.kind == "fp8":
            scale = self.scale if self.row_scale is None else self.row_scale
            return packed.unpack_fp8(weight, scale, torch.float32)
        return ggml_types.unpack(weight.to(torch.uint8), self.kind, torch.float32)

    def set_weight(self, weight: Tensor, *_: Any, return_weight: bool = False, **__: Any) -> Tensor | None:
        """Plain values in the packed ones' place, until the host puts those back."""
        if return_weight:
            return weight
        self.weight = nn.Parameter(weight, requires_grad=False)
        return None

    def values_to_save(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values with the host's patches in them): bfloat16 where packed, else as stored."""
        change, self.change = self.change, None
        try:
            weight = self.unpacked(torch.float32)
        finally:
            self.change = change
        if self.weight_patches:
            weight = _changed(list(self.weight_patches), self.weight_key, weight)
        yield "weight", weight.to(torch.bfloat16 if self.packing else self.weight.dtype)
        if self.bias_patches:
            bias = _changed(list(self.bias_patches), self.bias_key, self.bias.float())
            yield "bias", bias.to(self.bias.dtype)

    @classmethod
    def of(cls, layer: nn.Linear) -> _AtUse:
        """A layer with another one's weights, packed or plain, as they are."""
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.kind = getattr(layer, "kind", None)
        new.scale, new.row_scale = getattr(layer, "scale", None), getattr(layer, "row_scale", None)
        new.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        return new


def _low_rank_change(patch: tuple) -> tuple[Patch, float] | None:
    """One of the core's patches with its strength; None for anything else that the host may have."""
    strength, value, strength_model, _, function = patch
    core = getattr(value, "patch", None)
    return (core, strength) if isinstance(core, Patch) and strength_model == 1 and function is None else None


def _changed(patches: list, key: str, weight: Tensor) -> Tensor:
    """The host's own arithmetic, in float32."""
    return comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), key).to(weight.dtype)


class PackedLinear(_AtUse):
    """A packed weight inside the host's memory management. Its parameter is called `packed`, lest it be patched."""

    # What the host asks of a layer that it may leave in main memory.
    comfy_cast_weights = False
    weight_function: list = []
    bias_function: list = []

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("packed" if name == "weight" else name, value)

    @property
    def weight(self) -> Tensor:
        return self.packed

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination.pop(f"{prefix}packed")

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        patches = comfy.model_patcher.LowVramPatch  # taken at each use already
        others = [function for function in self.weight_function if not isinstance(function, patches)]
        if not others and not self.bias_function:
            return super().forward(x, rows)
        weight = self.unpacked(x.dtype, x.device)
        for function in others:
            weight = function(weight)
        bias = None if self.bias is None else self.bias.to(x)
        for function in self.bias_function:
            bias = function(bias)
        return self._product(x, weight, bias)


class AsideLinear(_AtUse):
    """Weights that are never the host's to move: attributes, not parameters."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            self._parameters.pop(name, None)
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            value = getattr(self, name)
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()

    def take_patches(self, key: str, patches: Mapping[str, list]) -> None:
        super().take_patches(key, patches)
        self.bias_key, self.bias_patches = f"{key}.bias", tuple(patches.get(f"{key}.bias") or ())

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        if not self.bias_patches:
            return super().forward(x, rows)
        bias = _changed(list(self.bias_patches), self.bias_key, self.bias.to(x.device)).to(x.dtype)
        return self._product(x, self.unpacked(x.dtype, x.device), bias)


class SavableFlux(comfy.model_base.Flux):
    """The host's FLUX, which its saving nodes find with values where a layer makes its weight at each use."""

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        values = {
            f"{name}.{which}": value
            for name, layer in self.diffusion_model.named_modules()
            if isinstance(layer, _AtUse)
            for which, value in layer.values_to_save()
        }
        state = super().state_dict_for_saving(*args, **kwargs)
        return state | self.model_config.process_unet_state_dict_for_saving(values)


def move_weights(core: nn.Module, target: nn.Module, files: Iterable[MappedFile] = ()) -> nn.Module:
    """The target (same class, on the meta device, the host's layers) with the core's weights, not copied.

    Packed linear layers become `PackedLinear`, those of a transformer that are used up before sampling
    `AsideLinear`; pages of the latter that lie in `files` go back to the system after each use.
    """
    files = list(files)
    # Layers that cast on use may have kept another dtype; the host's transformer layers do not cast.
    dtype = core.compute_dtype if isinstance(core, Flux) else None
    ahead = {id(layer) for layer in offload.layers_ahead(core)} if isinstance(core, Flux) else set()
    for name, layer in list(core.named_modules()):
        if id(layer) in ahead:
            aside = AsideLinear.of(layer)
            pages = offload.PageRanges(
                [value for value in (layer.weight, layer.bias) if value is not None], files
            )
            if pages.ranges:
                aside.register_forward_hook(lambda *_, pages=pages: pages.release())
            _put(target, name, aside)
        elif isinstance(layer, packed.Linear) and layer.packing is not None:
            _put(target, name, PackedLinear.of(layer))
        elif isinstance(layer, packed.Embedding) and layer.packing is not None:
            values = layer.unpacked(torch.bfloat16)
            target.get_submodule(name).weight = nn.Parameter(values, requires_grad=False)
        else:
            for key, parameter in layer.named_parameters(recurse=False):
                value = parameter.data if dtype is None else parameter.data.to(dtype)
                setattr(target.get_submodule(name), key, nn.Parameter(value, requires_grad=False))
    missing = [name for name, parameter in target.named_parameters() if parameter.is_meta]
    assert not missing, f"no weights for {missing[:3]}"
    return target.eval()


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, layer)


def logical_shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of packed weights as their layers use them, by state dict key."""
    return {
        f"{prefix}{name}.weight": (layer.out_features, layer.in_features)
        for name, layer in module.named_modules()
        if isinstance(layer, _AtUse)
    }


def loaded_bytes(module: nn.Module) -> int:
    """Bytes of what the host brings to the device: what is aside is not counted."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def watch(patcher: Any) -> None:
    """Have the host hand over its patches whenever it loads this MODEL or CLIP, or a clone with others."""
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_LOAD, _take_patches)


def _take_patches(patcher: Any, *_: Any) -> None:
    for name, layer in patcher.model.named_modules():
        if isinstance(layer, _AtUse):
            layer.take_patches(name, patcher.patches)
