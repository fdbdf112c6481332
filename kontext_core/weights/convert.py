"""One format to another, tensor by tensor: the file is never in memory as a whole, and appears when complete.

Names and layout change, numbers do not: where nothing is unpacked or rounded, converting there and back gives
the same bytes. Tensors are written in the order that the safetensors package gives them.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import fp8, keys
from .files import WeightFile, open_weights
from .formats import AUTOENCODER, CLIP, PART_NAMES, T5, TRANSFORMER, find_parts
from .load import BUILDERS
from .packed import PlainOperations
from .parts import Part, check_keys, open_part
from .safetensors_file import NAMES, replacing, write_safetensors

logger = logging.getLogger("kontext")

FORMATS = {
    "bfl": "one safetensors file with the published names (transformers' for text encoders)",
    "diffusers": "a folder for diffusers: config.json and safetensors, in shards if it is large",
    "fp8_scaled": "one safetensors file with scaled float8 layers, ComfyUI's newer layout",
    "fp8_scaled_old": "the same in ComfyUI's older layout",
}

# The order in which the safetensors package writes dtypes: by alignment, then as it lists them.
DTYPE_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")

SHARD_BYTES = 10 * 10**9  # diffusers' own limit a file

OnTensor = Callable[[int, int], None]


@dataclass(frozen=True)
class Output:
    """A tensor to be written: its dtype and shape for the header, and how to make it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def convert_file(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    part: str | None = None,
    on_tensor: OnTensor | None = None,
) -> Path:
    """Writes the weights in `src` to `dst` in the format `to`.

    Args:
        src: a file, index or folder of any format that can be read.
        dst: the file to write, or the folder for "diffusers".
        to: one of `FORMATS`.
        dtype: of plain weights in the result; by default as stored, bfloat16 for what was packed.
        part: which part of an all-in-one checkpoint; not needed otherwise.
        on_tensor: called with (tensors written, tensors in all); may raise to cancel.

    Raises:
        ValueError: the source cannot be read or is incomplete, the format is unknown or does not suit the part.
    """
    if to not in FORMATS:
        names = ", ".join(FORMATS)
        raise ValueError(
            f"the format {to!r} is unknown; convert to one of {names}, or quantize to a GGUF type."
        )
    source = open_complete(src, part)
    dst = Path(dst)
    if dst.exists() and dst.resolve() == source.file.path.resolve():
        raise ValueError(f"{dst}: source and destination are the same file; write to another.")
    kind = source.found.part
    if to == "diffusers" and kind not in (TRANSFORMER, AUTOENCODER):
        raise ValueError(f"{src}: {PART_NAMES[kind]} has the same names in diffusers; convert it to bfl.")
    if to.startswith("fp8") and kind not in (TRANSFORMER, T5):
        raise ValueError(
            f"{src}: {PART_NAMES[kind]} is small and loses too much in float8; convert it to bfl."
        )
    # A GGUF file's entries describe that file; a safetensors file's may describe the model and are kept.
    metadata = {} if source.file.container == "gguf" else dict(source.file.metadata)
    metadata.pop("_quantization_metadata", None)
    if to == "diffusers":
        return _write_diffusers(dst, source, dtype, metadata, on_tensor)
    if to == "bfl":
        outputs = _plain(source, dtype)
    else:
        outputs, more = _scaled(source, old=to == "fp8_scaled_old", dtype=dtype)
        metadata |= more
    write_outputs(dst, outputs, metadata, on_tensor)
    return dst


def open_complete(src: str | os.PathLike, part: str | None = None) -> Part:
    """The part in a file, with every key it needs.

    Raises:
        ValueError: nothing of FLUX is in it, several parts are and none was named, or keys are missing.
    """
    file: WeightFile = open_weights(src)
    found = [entry.part for entry in find_parts(file)]
    if part is None and len(set(found)) > 1:
        raise ValueError(
            f"{src}: it holds several parts ({', '.join(sorted(set(found)))}); name the one to write."
        )
    source = open_part(file, part or (found[0] if found else TRANSFORMER))
    module = BUILDERS[source.found.part](source.params, operations=PlainOperations, device="meta")
    check_keys(source, {key: tuple(value.shape) for key, value in module.named_parameters()})
    return source


def write_outputs(
    path: Path, outputs: dict[str, Output], metadata: dict[str, str], on_tensor: OnTensor | None
) -> None:
    """Writes outputs in the safetensors package's order."""
    order = sorted(outputs, key=lambda key: (DTYPE_ORDER.index(NAMES[outputs[key].dtype]), key))
    layout = {key: (outputs[key].dtype, outputs[key].shape) for key in order}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, key in enumerate(order, 1):
            yield key, outputs[key].make()
            if on_tensor is not None:
                on_tensor(done, len(order))

    write_safetensors(path, layout, tensors(), metadata)


def _plain_dtype(source: Part, key: str, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return torch.bfloat16 if source.is_packed(key) else names[source.dtype_name(key)]


def _plain(source: Part, dtype: torch.dtype | None) -> dict[str, Output]:
    outputs = {}
    for key, shape in source.shapes.items():
        kept = _plain_dtype(source, key, dtype)
        outputs[key] = Output(kept, tuple(shape), lambda key=key, kept=kept: released(source, key, kept))
    return outputs


def released(source: Part, key: str, dtype: torch.dtype) -> Tensor:
    """A tensor's values as memory of their own, its pages in the source given back."""
    values = source.weight(key).values(dtype).clone()
    _release(source, key)
    return values


def _release(source: Part, key: str) -> None:
    for piece in source.moves[key].pieces:
        source.file.release(piece.key)


def is_scaled_layer(source: Part, key: str, *, everywhere: bool) -> bool:
    """Whether a weight is a linear layer's that quantised files hold packed."""
    if not key.endswith(".weight") or len(source.shapes[key]) != 2:
        return False
    if source.found.part == T5:
        return (
            ".SelfAttention." in key and "relative_attention_bias" not in key
        ) or ".DenseReluDense." in key
    if source.found.part == CLIP:
        return ".layers." in key
    return everywhere or key.startswith(("double_blocks.", "single_blocks."))


def _scaled(
    source: Part, *, old: bool, dtype: torch.dtype | None
) -> tuple[dict[str, Output], dict[str, str]]:
    """Outputs and header entries of a scaled float8 file; layers that are float8 already are taken as they are."""
    outputs: dict[str, Output] = {}
    layers = []
    for key, shape in source.shapes.items():
        packed_already = source.is_packed(key) and source.dtype_name(key) in ("F8_E4M3", "U8", "I8")
        if not is_scaled_layer(source, key, everywhere=old or packed_already):
            kept = _plain_dtype(source, key, dtype)
            outputs[key] = Output(kept, tuple(shape), lambda key=key, kept=kept: released(source, key, kept))
            continue
        layer = key.removesuffix(".weight")
        layers.append(layer)
        scale_name = f"{layer}.{'scale_weight' if old else 'weight_scale'}"
        both = _LayerScaler(source, key)
        outputs[key] = Output(torch.float8_e4m3fn, tuple(shape), both.values)
        outputs[scale_name] = Output(torch.float32, (), both.scale)
        for theirs in ("scale_input", "input_scale"):
            stored = f"{source.moves[key].pieces[0].key.removesuffix('.weight')}.{theirs}"
            if len(source.moves[key].pieces) == 1 and stored in source.file.tensors:
                given = source.file.read(stored).float()
                ours = f"{layer}.{'scale_input' if old else 'input_scale'}"
                outputs[ours] = Output(torch.float32, tuple(given.shape), given.clone)
    # Weights that are scaled here come without scales for the layers' inputs, which products in float8 need.
    full_precision = fp8.is_full_precision(source.file) or not fp8.is_scaled(source.file)
    if old:
        marker = torch.zeros(2 if full_precision else 0, dtype=torch.float8_e4m3fn)
        outputs["scaled_fp8"] = Output(torch.float8_e4m3fn, tuple(marker.shape), lambda: marker)
        return outputs, {}
    return outputs, fp8.metadata_for(layers, full_precision=full_precision)


class _LayerScaler:
    """A layer's float8 values and its scale, which are written far apart; float8 layers are taken as they are."""

    def __init__(self, source: Part, key: str):
        self.source, self.key = source, key
        self.scale_value: Tensor | None = None

    def _stored(self) -> tuple[Tensor, Tensor] | None:
        weight = self.source.weight(self.key)
        if weight.kind != "fp8" or weight.data.dtype != torch.float8_e4m3fn:
            return None
        if weight.scale is None:
            return weight.data, torch.ones((), dtype=torch.float32)
        return (weight.data, weight.scale.reshape(()).clone()) if weight.scale.numel() == 1 else None

    def scale(self) -> Tensor:
        if self.scale_value is None:
            stored = self._stored()
            if stored is None:
                self.scale_value = fp8.scale_for(self.source.weight(self.key).values(torch.float32))
                _release(self.source, self.key)
            else:
                self.scale_value = stored[1]
        return self.scale_value

    def values(self) -> Tensor:
        stored = self._stored()
        if stored is None:
            values = fp8.quantize_fp8(self.source.weight(self.key).values(torch.float32), self.scale())
        else:
            values = stored[0].clone()
        _release(self.source, self.key)
        return values


def _write_diffusers(
    folder: Path,
    source: Part,
    dtype: torch.dtype | None,
    metadata: dict[str, str],
    on_tensor: OnTensor | None,
) -> Path:
    pairs = (keys.transformer_pairs_of if source.found.part == TRANSFORMER else keys.autoencoder_pairs_of)(
        source.shapes
    )
    moves = keys.moves_to_diffusers(source.shapes, pairs)
    outputs: dict[str, Output] = {}
    for name, move in moves.items():
        kept = _plain_dtype(source, move.pieces[0].key, dtype)
        outputs[name] = Output(
            kept, tuple(move.shape), lambda move=move, kept=kept: _moved(source, move, kept)
        )
    if folder.is_file():
        raise ValueError(f"{folder}: diffusers weights are a folder, and a file of this name is there.")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = metadata or {"format": "pt"}
    shards = _shards(outputs)
    name = "diffusion_pytorch_model"
    if len(shards) == 1:
        write_outputs(folder / f"{name}.safetensors", shards[0], metadata, on_tensor)
    else:
        weight_map, done = {}, 0
        for index, shard in enumerate(shards, 1):
            file = f"{name}-{index:05d}-of-{len(shards):05d}.safetensors"
            total, before = len(outputs), done
            told = (
                None
                if on_tensor is None
                else (lambda n, _, before=before, total=total: on_tensor(before + n, total))
            )
            write_outputs(folder / file, shard, metadata, told)
            weight_map |= dict.fromkeys(shard, file)
            done += len(shard)
        index_text = {
            "metadata": {"total_size": sum(output.nbytes for output in outputs.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / f"{name}.safetensors.index.json", index_text)
    _write_json(folder / "config.json", diffusers_config(source))
    return folder


def _moved(source: Part, move: keys.Move, dtype: torch.dtype) -> Tensor:
    (piece,) = move.pieces
    values = source.weight(piece.key).values(dtype)
    values = values if piece.stop is None else values[piece.start : piece.stop]
    if move.swap_halves:
        values = torch.cat(values.chunk(2)[::-1])
    return values.reshape(move.shape).clone()


def _shards(outputs: dict[str, Output]) -> list[dict[str, Output]]:
    shards: list[dict[str, Output]] = [{}]
    size = 0
    for key, output in outputs.items():
        if shards[-1] and size + output.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = output
        size += output.nbytes
    return shards


def _write_json(path: Path, value: dict) -> None:
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def diffusers_config(source: Part) -> dict[str, object]:
    """The config.json that lets diffusers build the model of these sizes."""
    params = source.params
    if source.found.part == TRANSFORMER:
        return {
            "_class_name": "FluxTransformer2DModel",
            "attention_head_dim": params.hidden_size // params.num_heads,
            "axes_dims_rope": list(params.axes_dim),
            "guidance_embeds": params.guidance_embed,
            "in_channels": params.in_channels,
            "joint_attention_dim": params.context_in_dim,
            "num_attention_heads": params.num_heads,
            "num_layers": params.depth,
            "num_single_layers": params.depth_single_blocks,
            "out_channels": params.out_channels,
            "patch_size": 1,
            "pooled_projection_dim": params.vec_in_dim,
        }
    levels = len(params.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [params.ch * mult for mult in params.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": params.in_channels,
        "latent_channels": params.z_channels,
        "layers_per_block": params.num_res_blocks,
        "norm_num_groups": params.num_groups,
        "out_channels": params.out_ch,
        "scaling_factor": params.scale_factor,
        "shift_factor": params.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
