"""Scaled float8 as ComfyUI writes it: a tensor's largest magnitude becomes float8's largest number.

Two layouts of the same numbers. Old: an empty tensor `scaled_fp8` marks the file, each layer has `scale_weight`.
New: each layer has `weight_scale`, and the header's `_quantization_metadata` lists the layers. An old file must
hold no linear layer in another dtype (its loader would cast it to float8), a new one may: there the layers
outside of the blocks stay as they are.

Source: Comfy-Org/ComfyUI QUANTIZATION.md, comfy/ops.py scaled_fp8_ops.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from .files import WeightFile

E4M3_MAX = 448.0


def scale_for(weight: Tensor) -> Tensor:
    """The float32 scale () of a weight of any float dtype.

    Raises:
        ValueError: the weight holds NaN or infinite numbers.
    """
    largest = weight.abs().amax().float()
    if not torch.isfinite(largest):
        raise ValueError("a weight holds NaN or infinite numbers and cannot be scaled to float8.")
    return (largest / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)


def quantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn values with values * scale close to weight."""
    return (weight.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def metadata_for(layers: list[str], *, full_precision: bool = False) -> dict[str, str]:
    """The header entry of the new layout for these layers.

    Args:
        full_precision: the loader is to multiply in its own precision, not in float8; the old layout says so by
            a marker of two elements.
    """
    entry = {"format": "float8_e4m3fn"}
    if full_precision:
        entry["full_precision_matrix_mult"] = True
    table = {"format_version": "1.0", "layers": dict.fromkeys(layers, entry)}
    return {"_quantization_metadata": json.dumps(table)}


def is_scaled(file: WeightFile) -> bool:
    """Whether a file holds scaled float8 of either layout already."""
    return any(key.endswith((".scale_weight", ".weight_scale")) for key in file.tensors)


def is_full_precision(file: WeightFile) -> bool:
    """Whether a scaled file of either layout asks for products in full precision."""
    if any(key.endswith("scaled_fp8") and stored.numel == 2 for key, stored in file.tensors.items()):
        return True
    layers = json.loads(file.metadata.get("_quantization_metadata", "{}")).get("layers", {})
    return any(entry.get("full_precision_matrix_mult", False) for entry in layers.values())
