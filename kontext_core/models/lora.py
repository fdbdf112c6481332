"""LoRA files as changes to our weights: LoRA, LoHa, LoKr, DoRA and plain differences.

A `Patch` is one change: its `delta(W)` is what strength 1 adds to the weight W.

    LoRA   alpha/rank * B A
    LoHa   alpha/rank * (B1 A1) o (B2 A2)          o: element by element
    LoKr   alpha/rank * W1 (x) W2                  (x): Kronecker; alpha counts only if a factor is decomposed
    DoRA   m * (W + D) / |W + D| - W               D: one of the above; norms over rows or over columns
    diff   D
    set    V - W

Strength is linear in all of them, as in ComfyUI. Everything is computed in float32.

ComfyUI's DoRA differs from its trainers' in two places, where we follow the trainers (LyCORIS, OneTrainer,
PEFT): on the output axis it divides by |W| instead of |W + D| (Comfy-Org/ComfyUI#15458), and PEFT's
magnitude, a vector, it spreads along the wrong axis (#12938). diffusers writes PEFT's lora_alpha into the
file's header; ComfyUI ignores it, we and diffusers do not.

Source: arXiv 2106.09685, 2108.06098, 2309.14859, 2402.09353; KohakuBlueleaf/LyCORIS; huggingface/peft.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .lora_keys import Part, Target, find_target, scheme, split_key, unsupported_reason

Kind = Literal["lora", "loha", "lokr", "diff", "set"]

# The kind that each role belongs to.
_KIND_OF_ROLE = {
    **dict.fromkeys(("down", "up"), "lora"),
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "loha"),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"), "lokr"),
    "diff": "diff",
    "set": "set",
}
_KIND_NAMES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "diff": "differences", "set": "replacements"}
_KOHYA_PREFIX = {"transformer": "lora_unet_", "clip": "lora_te1_", "t5": "lora_te3_"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """One change to one weight of ours.

    Attributes:
        source: the layer's name in the file.
        part: which network.
        key: the weight's name in it.
        offset: (dim 0, first row, number of rows) if the change is to some rows of a fused weight; else None.
        kind: how the tensors make the change.
        tensors: by role, as the file has them.
        scale: alpha / rank.
        magnitude: DoRA's m, (rows,), (rows, 1) or (1, columns); None without DoRA.
        swap_halves: the file has the weight's two halves of rows the other way round.
    """

    source: str
    part: Part
    key: str
    offset: tuple[int, int, int] | None = None
    kind: Kind
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    magnitude: Tensor | None = None
    swap_halves: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the change: (rows, columns), or (rows,) for a bias or a norm."""
        return _shape(self.kind, self.tensors)

    @property
    def rank(self) -> int | None:
        """Rank of a LoRA; None for the other kinds."""
        return self.tensors["down"].shape[0] if self.kind == "lora" else None

    @torch.no_grad()
    def delta(self, weight: Tensor) -> Tensor:
        """What strength 1 adds to `weight` (the patched rows of it), float32, on the weight's device."""
        if self.swap_halves:
            # The file's row order is its own; DoRA's norms make the order of W matter as well.
            return _swap(self._delta(_swap(weight)))
        return self._delta(weight)

    def _delta(self, weight: Tensor) -> Tensor:
        tensors = {role: tensor.to(weight.device, torch.float32) for role, tensor in self.tensors.items()}
        if self.kind == "set":
            return tensors["set"].reshape(weight.shape) - weight.float()
        change = _product(self.kind, tensors).reshape(weight.shape).mul_(self.scale)
        if self.magnitude is None:
            return change
        weight = weight.float()
        moved = weight + change
        axis = _magnitude_axis(self.magnitude, self.shape)
        norm = moved.norm(dim=1 - axis, keepdim=True) + torch.finfo(torch.float32).eps
        magnitude = self.magnitude.to(weight.device, torch.float32).reshape(norm.shape)
        return moved * (magnitude / norm) - weight


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """Something in a LoRA that changes nothing, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraFile:
    """What a LoRA file holds for FLUX.

    Attributes:
        name: for messages.
        format: naming scheme and kind, such as "kohya LoRA" or "LyCORIS LoKr with DoRA".
        patches: the changes.
        unmatched: layers that mean nothing in FLUX, or that are not understood.
    """

    name: str
    format: str
    patches: tuple[Patch, ...]
    unmatched: tuple[Unmatched, ...]

    @property
    def parts(self) -> frozenset[str]:
        """The networks that it changes."""
        return frozenset(patch.part for patch in self.patches)


def read_lora(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, name: str = "LoRA"
) -> LoraFile:
    """Understand a LoRA's tensors; none is copied or read yet.

    Args:
        tensors: as in the file, in any of the known naming schemes.
        metadata: the file's header; PEFT's lora_alpha and rank patterns are read from it.
        name: for messages.

    Raises:
        ValueError: nothing in it is for FLUX.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    unmatched: list[Unmatched] = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            reason = unsupported_reason(key) or "not a tensor of any known LoRA format"
            unmatched.append(Unmatched(name=key, reason=reason))
        else:
            layers.setdefault(split[0], {})[split[1]] = tensor

    adapter = _adapter_config(metadata, name)
    patches: list[Patch] = []
    for layer, roles in layers.items():
        target = find_target(layer)
        if target is None:
            unmatched.append(Unmatched(name=layer, reason="FLUX has no such layer"))
            continue
        try:
            patches += _read_layer(layer, target, roles, adapter)
        except ValueError as error:
            unmatched.append(Unmatched(name=layer, reason=str(error)))
    if not patches:
        raise ValueError(_nothing_for_flux(name, list(tensors), unmatched))
    return LoraFile(name=name, format=_format(patches), patches=tuple(patches), unmatched=tuple(unmatched))


def lora_patch(
    module: str, down: Tensor, up: Tensor, alpha: float | None = None, *, part: Part = "transformer"
) -> Patch:
    """The change of one whole layer by a LoRA: down (rank, in), up (out, rank); alpha None means rank."""
    rank = down.shape[0]
    return Patch(
        source=module,
        part=part,
        key=f"{module}.weight",
        kind="lora",
        tensors={"down": down, "up": up},
        scale=1.0 if alpha is None else alpha / rank,
    )


def save_lora(
    path: str | os.PathLike,
    patches: Iterable[Patch],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write LoRAs of whole layers as safetensors under kohya's names, which every program reads.

    The file appears only once it is complete.

    Raises:
        ValueError: a patch is not a LoRA of a whole layer, or there are none, or the file cannot be written.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for patch in patches:
        if patch.kind != "lora" or patch.offset is not None or patch.swap_halves:
            raise ValueError(
                f"{patch.source} cannot be saved: only LoRAs of whole layers are written, and this is "
                f"{_KIND_NAMES[patch.kind]} of {'some rows' if patch.offset else 'a layer'}."
            )
        layer = _KOHYA_PREFIX[patch.part] + patch.key.removesuffix(".weight").replace(".", "_")
        down, up = patch.tensors["down"], patch.tensors["up"]
        tensors[f"{layer}.lora_down.weight"] = down.detach().to("cpu", dtype).contiguous().clone()
        tensors[f"{layer}.lora_up.weight"] = up.detach().to("cpu", dtype).contiguous().clone()
        tensors[f"{layer}.alpha"] = torch.tensor(patch.scale * down.shape[0], dtype=torch.float32)
        if patch.magnitude is not None:
            magnitude = patch.magnitude.detach().to("cpu", dtype)
            column = magnitude.reshape(-1, 1) if magnitude.ndim == 1 else magnitude
            tensors[f"{layer}.dora_scale"] = column.contiguous().clone()
    if not tensors:
        raise ValueError(f"{path}: there is no LoRA to save.")
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written here and not by the package, whose files nobody but their owner may read.
        partial.write_bytes(save(tensors, metadata={"format": "pt", **(metadata or {})}))
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}.") from error


def _read_layer(layer: str, target: Target, roles: dict[str, Tensor], adapter: dict) -> list[Patch]:
    """The patches of one layer: its weight's, and its bias's if it has one.

    Raises:
        ValueError: the layer's tensors are incomplete or contradict each other.
    """
    patches: list[Patch] = []
    kinds = {_KIND_OF_ROLE[role] for role in roles if role in _KIND_OF_ROLE}
    if len(kinds) > 1:
        raise ValueError(f"tensors of {' and '.join(sorted(kinds))} together")
    hidden, scale = None, 1.0
    if kinds:
        (kind,) = kinds
        tensors = {role: tensor for role, tensor in roles.items() if role in _KIND_OF_ROLE}
        shape = _shape(kind, tensors)
        hidden = shape[1] if len(shape) == 2 else None
        scale = _scale(kind, tensors, roles.get("alpha"), layer, adapter)
        if "dora" in roles:
            _magnitude_axis(roles["dora"], shape)
        rows = target.row_range(shape[0], hidden)
        patches.append(
            Patch(
                source=layer,
                part=target.part,
                key=f"{target.module}.{target.parameter}",
                offset=None if rows is None else (0, *rows),
                kind=kind,
                tensors=tensors,
                scale=scale,
                magnitude=roles.get("dora"),
                swap_halves=target.swap_halves,
            )
        )
    for role, bias_scale in (("diff_b", 1.0), ("up_bias", scale)):
        if role in roles:
            rows = target.row_range(roles[role].shape[0], hidden)
            patches.append(
                Patch(
                    source=f"{layer} (bias)",
                    part=target.part,
                    key=f"{target.module}.bias",
                    offset=None if rows is None else (0, *rows),
                    kind="diff",
                    tensors={"diff": roles[role]},
                    scale=bias_scale,
                    swap_halves=target.swap_halves,
                )
            )
    if not patches:
        raise ValueError(f"only {', '.join(sorted(roles))}, nothing that changes a weight")
    return patches


def _shape(kind: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Shape of the change that a layer's tensors make; ValueError if they make none."""
    if kind == "lora":
        down, up = _both(tensors, "down", "up")
        # Some trainers write a linear layer's factors as 1x1 convolutions.
        return _matrix_shape(*(factor.flatten(1) if factor.ndim > 1 else factor for factor in (up, down)))
    if kind == "loha":
        first = _matrix_shape(*_both(tensors, "hada_w1_a", "hada_w1_b"))
        second = _matrix_shape(*_both(tensors, "hada_w2_a", "hada_w2_b"))
        if first != second:
            raise ValueError(f"its two products have shapes {first} and {second}")
        return first
    if kind == "lokr":
        shapes = []
        for name in ("lokr_w1", "lokr_w2"):
            if name in tensors:
                shapes.append(_matrix_shape(tensors[name]))
            else:
                shapes.append(_matrix_shape(*_both(tensors, f"{name}_a", f"{name}_b")))
        (rows1, columns1), (rows2, columns2) = shapes
        return rows1 * rows2, columns1 * columns2
    return tuple(tensors[kind].shape)


def _both(tensors: Mapping[str, Tensor], first: str, second: str) -> tuple[Tensor, Tensor]:
    missing = [role for role in (first, second) if role not in tensors]
    if missing:
        raise ValueError(f"{' and '.join(missing)} is missing")
    return tensors[first], tensors[second]


def _matrix_shape(*factors: Tensor) -> tuple[int, int]:
    """Shape of a matrix, or of the product of two."""
    shapes = " and ".join(str(tuple(factor.shape)) for factor in factors)
    if any(factor.ndim != 2 or factor.numel() == 0 for factor in factors):
        raise ValueError(f"a shape that is no matrix's: {shapes}")
    if len(factors) == 2 and factors[0].shape[1] != factors[1].shape[0]:
        raise ValueError(f"factors of shapes {shapes} cannot be multiplied")
    return factors[0].shape[0], factors[-1].shape[1]


def _product(kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The change without its scale, float32."""
    if kind == "lora":
        return tensors["up"].flatten(1) @ tensors["down"].flatten(1)
    if kind == "loha":
        first = tensors["hada_w1_a"] @ tensors["hada_w1_b"]
        return first.mul_(tensors["hada_w2_a"] @ tensors["hada_w2_b"])
    if kind == "lokr":
        factors = [
            tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
            for name in ("lokr_w1", "lokr_w2")
        ]
        return torch.kron(*factors)
    return tensors["diff"].clone()


def _scale(
    kind: str, tensors: Mapping[str, Tensor], alpha: Tensor | None, layer: str, adapter: dict
) -> float:
    """alpha / rank; 1 where no alpha is known or none counts."""
    if kind == "lora":
        rank = tensors["down"].shape[0]
    elif kind == "loha":
        rank = tensors["hada_w1_b"].shape[0]
    elif kind == "lokr":
        decomposed = [tensors[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in tensors]
        if not decomposed:
            return 1.0
        rank = decomposed[0].shape[0]
    else:
        return 1.0
    if alpha is None:
        return _adapter_scale(adapter, layer, rank)
    if alpha.numel() != 1:
        raise ValueError(f"its alpha has shape {tuple(alpha.shape)}; one number is expected")
    value = float(alpha)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"its alpha is {value}")
    return value / rank


def _magnitude_axis(magnitude: Tensor, shape: tuple[int, ...]) -> int:
    """Whether DoRA's magnitude has a number for each row (0) or each column (1) of the weight.

    PEFT has (rows,), LyCORIS and OneTrainer (rows, 1) or (1, columns).
    """
    if magnitude.numel() == shape[0] and (magnitude.ndim == 1 or magnitude.shape[0] == shape[0]):
        return 0
    if len(shape) == 2 and magnitude.numel() == shape[1]:
        return 1
    raise ValueError(f"a DoRA magnitude of shape {tuple(magnitude.shape)} for a weight of shape {shape}")


def _swap(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2, dim=0)
    return torch.cat((second, first), dim=0)


def _adapter_config(metadata: Mapping[str, str] | None, name: str) -> dict:
    """PEFT's settings as diffusers keeps them in the header: {"transformer.lora_alpha": 32, ...}."""
    text = (metadata or {}).get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: lora_adapter_metadata in its header is not JSON: {error}.") from error
    return config if isinstance(config, dict) else {}


def _adapter_scale(adapter: dict, layer: str, rank: int) -> float:
    """lora_alpha / rank from PEFT's settings for a layer such as `transformer.x_embedder`; 1 without any.

    diffusers puts `transformer.` before the settings' names; an adapter_config.json has them bare.
    """
    module = layer.removeprefix("base_model.model.")
    component = module.partition(".")[0] + "."
    if f"{component}lora_alpha" in adapter:
        module = module.removeprefix(component)
    elif "lora_alpha" in adapter:
        component = ""
    else:
        return 1.0
    alpha = adapter[f"{component}lora_alpha"]
    for pattern, value in (adapter.get(f"{component}alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if adapter.get(f"{component}use_rslora") else rank)


def _format(patches: list[Patch]) -> str:
    schemes = {scheme(patch.source): None for patch in patches}
    kinds = {_KIND_NAMES[patch.kind]: None for patch in patches if not patch.key.endswith(".bias")}
    dora = " with DoRA" if any(patch.magnitude is not None for patch in patches) else ""
    return f"{' + '.join(schemes)} {' + '.join(kinds) or 'biases'}{dora}"


def _nothing_for_flux(name: str, keys: list[str], unmatched: list[Unmatched]) -> str:
    joined = " ".join(keys)
    if not keys:
        what = "it is empty"
    elif any(mark in joined for mark in ("down_blocks", "input_blocks", "up_blocks", "output_blocks")):
        what = "it is for Stable Diffusion (U-Net layers)"
    elif "joint_blocks" in joined:
        what = "it is for Stable Diffusion 3"
    else:
        shown = "; ".join(f"{item.name}: {item.reason}" for item in unmatched[:3])
        what = f"none of its {len(keys)} tensors is for FLUX ({shown}{'; ...' if len(unmatched) > 3 else ''})"
    return f"{name} cannot be used: {what}. Give a LoRA made for FLUX.1."
