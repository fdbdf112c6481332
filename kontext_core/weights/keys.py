"""Names of the same weights in other formats, as moves that read in both directions.

The models keep the published names: black-forest-labs' for transformer and autoencoder, transformers' for the
text encoders. A `Move` says which rows of which stored tensors make one of them, so loading, checking and
converting share one table for each part:

- diffusers keeps q, k and v apart (and, in a single-stream block, the MLP's first layer): rows of one tensor;
- diffusers' final adaLN gives (scale, shift), ours (shift, scale): its halves are swapped;
- diffusers' autoencoder attention is made of linear layers, ours of 1×1 convolutions: another shape.

Source: huggingface/diffusers scripts/convert_flux_to_diffusers.py, loaders/single_file_utils.py;
ggml-org/llama.cpp gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of a stored tensor; all of it when stop is None."""

    key: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Move:
    """How one tensor is made: pieces one below the other, halves swapped, then seen in another shape."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    swap_halves: bool = False

    @property
    def is_plain(self) -> bool:
        return len(self.pieces) == 1 and self.pieces[0].stop is None and not self.swap_halves


@dataclass(frozen=True)
class Pair:
    """One of our layers and the layers of the other format that hold its rows, in order."""

    ours: str
    theirs: tuple[str, ...]
    swap_halves: bool = False


def _numbers(keys: Iterable[str], pattern: str) -> range:
    found = [int(match.group(1)) for match in (re.match(pattern, key) for key in keys) if match]
    return range(max(found) + 1 if found else 0)


def transformer_pairs(num_double: int, num_single: int) -> Iterator[Pair]:
    """Tensors without their last name (weight, bias) of our transformer and of diffusers'."""
    yield Pair("img_in", ("x_embedder",))
    yield Pair("txt_in", ("context_embedder",))
    embedders = {
        "time_in": "timestep_embedder",
        "vector_in": "text_embedder",
        "guidance_in": "guidance_embedder",
    }
    for ours, theirs in embedders.items():
        yield Pair(f"{ours}.in_layer", (f"time_text_embed.{theirs}.linear_1",))
        yield Pair(f"{ours}.out_layer", (f"time_text_embed.{theirs}.linear_2",))
    for i in range(num_double):
        ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
        qkv = tuple(f"{theirs}.attn.to_{name}" for name in "qkv")
        added = tuple(f"{theirs}.attn.add_{name}_proj" for name in "qkv")
        yield Pair(f"{ours}.img_attn.qkv", qkv)
        yield Pair(f"{ours}.txt_attn.qkv", added)
        yield Pair(f"{ours}.img_attn.proj", (f"{theirs}.attn.to_out.0",))
        yield Pair(f"{ours}.txt_attn.proj", (f"{theirs}.attn.to_add_out",))
        for stream, norm in (("img", "norm_"), ("txt", "norm_added_")):
            yield Pair(f"{ours}.{stream}_attn.norm.query_norm", (f"{theirs}.attn.{norm}q",))
            yield Pair(f"{ours}.{stream}_attn.norm.key_norm", (f"{theirs}.attn.{norm}k",))
        for stream, suffix in (("img", ""), ("txt", "_context")):
            yield Pair(f"{ours}.{stream}_mod.lin", (f"{theirs}.norm1{suffix}.linear",))
            yield Pair(f"{ours}.{stream}_mlp.0", (f"{theirs}.ff{suffix}.net.0.proj",))
            yield Pair(f"{ours}.{stream}_mlp.2", (f"{theirs}.ff{suffix}.net.2",))
    for i in range(num_single):
        ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        fused = (*(f"{theirs}.attn.to_{name}" for name in "qkv"), f"{theirs}.proj_mlp")
        yield Pair(f"{ours}.linear1", fused)
        yield Pair(f"{ours}.linear2", (f"{theirs}.proj_out",))
        yield Pair(f"{ours}.norm.query_norm", (f"{theirs}.attn.norm_q",))
        yield Pair(f"{ours}.norm.key_norm", (f"{theirs}.attn.norm_k",))
        yield Pair(f"{ours}.modulation.lin", (f"{theirs}.norm.linear",))
    yield Pair("final_layer.linear", ("proj_out",))
    yield Pair("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True)


def autoencoder_pairs(num_levels: int, num_blocks: int) -> Iterator[Pair]:
    """As `transformer_pairs`, for the autoencoder; num_blocks is the encoder's blocks a level."""

    def block(ours: str, theirs: str) -> Iterator[Pair]:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            yield Pair(f"{ours}.{name}", (f"{theirs}.{name}",))
        yield Pair(f"{ours}.nin_shortcut", (f"{theirs}.conv_shortcut",))

    for side, path, count in (("encoder", "down", num_blocks), ("decoder", "up", num_blocks + 1)):
        yield Pair(f"{side}.conv_in", (f"{side}.conv_in",))
        yield Pair(f"{side}.conv_out", (f"{side}.conv_out",))
        yield Pair(f"{side}.norm_out", (f"{side}.conv_norm_out",))
        for i in range(1, 3):
            yield from block(f"{side}.mid.block_{i}", f"{side}.mid_block.resnets.{i - 1}")
        attention = f"{side}.mid_block.attentions.0"
        yield Pair(f"{side}.mid.attn_1.norm", (f"{attention}.group_norm",))
        for name in "qkv":
            yield Pair(f"{side}.mid.attn_1.{name}", (f"{attention}.to_{name}",))
        yield Pair(f"{side}.mid.attn_1.proj_out", (f"{attention}.to_out.0",))
        for level in range(num_levels):
            # diffusers counts the decoder's levels in the order they run, ours by resolution.
            theirs = f"{side}.{path}_blocks.{level if path == 'down' else num_levels - 1 - level}"
            for i in range(count):
                yield from block(f"{side}.{path}.{level}.block.{i}", f"{theirs}.resnets.{i}")
            yield Pair(f"{side}.{path}.{level}.{path}sample.conv", (f"{theirs}.{path}samplers.0.conv",))


def _last_names(ours: str) -> tuple[tuple[str, str], ...]:
    """(our parameter's name, theirs) of a layer."""
    if ours.endswith(("query_norm", "key_norm")):
        return (("scale", "weight"),)
    return (("weight", "weight"), ("bias", "bias"))


def moves_from_diffusers(shapes: Shapes, pairs: Iterable[Pair]) -> dict[str, Move]:
    """Our keys, made of a diffusers file's; a pair of which a part is missing gives no move."""
    moves = {}
    for pair in pairs:
        for our_name, their_name in _last_names(pair.ours):
            keys = [f"{layer}.{their_name}" for layer in pair.theirs]
            if not all(key in shapes for key in keys) or len({shapes[key][1:] for key in keys}) > 1:
                continue  # a part is missing, or they do not fit on each other
            rows = sum(shapes[key][0] if shapes[key] else 1 for key in keys)
            shape = (rows, *shapes[keys[0]][1:])
            # 1×1 convolutions of the autoencoder's attention, kept as linear layers over there.
            if ".mid.attn_1." in pair.ours and len(shape) == 2:
                shape = (*shape, 1, 1)
            pieces = tuple(Piece(key) for key in keys)
            moves[f"{pair.ours}.{our_name}"] = Move(pieces, shape, pair.swap_halves)
    return moves


def moves_to_diffusers(shapes: Shapes, pairs: Iterable[Pair]) -> dict[str, Move]:
    """A diffusers file's keys, made of ours; the inverse of `moves_from_diffusers`."""
    moves = {}
    for pair in pairs:
        for our_name, their_name in _last_names(pair.ours):
            key = f"{pair.ours}.{our_name}"
            if key not in shapes:
                continue
            shape = shapes[key]
            if ".mid.attn_1." in pair.ours and len(shape) == 4:
                shape = shape[:2]
            if len(pair.theirs) == 1:
                moves[f"{pair.theirs[0]}.{their_name}"] = Move((Piece(key),), shape, pair.swap_halves)
                continue
            # q, k and v are as high as the model is wide; what is left is the MLP's.
            width = shapes[f"{pair.ours}.weight"][1]
            heights = [width] * 3 + [shape[0] - 3 * width] * (len(pair.theirs) - 3)
            start = 0
            for layer, height in zip(pair.theirs, heights, strict=True):
                piece = Piece(key, start, start + height)
                moves[f"{layer}.{their_name}"] = Move((piece,), (height, *shape[1:]))
                start += height
    return moves


def transformer_pairs_of(keys: Iterable[str]) -> list[Pair]:
    """Pairs for as many blocks as the keys (ours or diffusers') speak of."""
    keys = list(keys)
    double = _numbers(keys, r"(?:double_blocks|transformer_blocks)\.(\d{1,4})\.")
    single = _numbers(keys, r"(?:single_blocks|single_transformer_blocks)\.(\d{1,4})\.")
    return list(transformer_pairs(len(double), len(single)))


def autoencoder_pairs_of(keys: Iterable[str]) -> list[Pair]:
    keys = list(keys)
    levels = _numbers(keys, r"encoder\.(?:down|down_blocks)\.(\d{1,4})\.")
    blocks = _numbers(keys, r"encoder\.(?:down\.0\.block|down_blocks\.0\.resnets)\.(\d{1,4})\.")
    return list(autoencoder_pairs(len(levels), len(blocks)))


T5_GGUF_LAYERS = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}


def t5_name_from_gguf(key: str) -> str | None:
    """The transformers name of a llama.cpp T5 key; None if there is none."""
    if key == "token_embd.weight":
        return "shared.weight"
    if key == "enc.output_norm.weight":
        return "encoder.final_layer_norm.weight"
    match = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", key)
    if match is None or match.group(2) not in T5_GGUF_LAYERS:
        return None
    return f"encoder.block.{match.group(1)}.{T5_GGUF_LAYERS[match.group(2)]}.weight"


def t5_name_to_gguf(key: str) -> str | None:
    """The inverse of `t5_name_from_gguf`."""
    if key == "shared.weight":
        return "token_embd.weight"
    if key == "encoder.final_layer_norm.weight":
        return "enc.output_norm.weight"
    match = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", key)
    names = {theirs: ours for ours, theirs in T5_GGUF_LAYERS.items()}
    if match is None or match.group(2) not in names:
        return None
    return f"enc.blk.{match.group(1)}.{names[match.group(2)]}.weight"
