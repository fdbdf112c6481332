"""Every key and shape at the published sizes, on the meta device, against libraries that were not written here.

diffusers and transformers build FLUX.1 Kontext [dev]'s networks from the sizes of its published config files; the
converters' tables take the names and shapes one way and back again.
"""

from __future__ import annotations

import pytest
import torch

from kontext_core.models.autoencoder import Autoencoder
from kontext_core.models.clip import ClipTextEncoder
from kontext_core.models.t5 import T5Encoder
from kontext_core.models.transformer import Flux
from kontext_core.presets import KONTEXT_DEV
from kontext_core.weights import keys

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install diffusers")
transformers = pytest.importorskip(
    "transformers", reason="parity needs transformers: pip install transformers"
)

# As published: transformer/config.json, vae/config.json, text_encoder_2/config.json, text_encoder/config.json.
TRANSFORMER = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
T5 = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77,
}  # fmt: skip


def shapes_of(make) -> dict[str, tuple[int, ...]]:
    """Parameters of a network that is built on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in make().named_parameters()}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs_of", "published"),
    [
        (
            lambda: Flux(KONTEXT_DEV.transformer),
            lambda: diffusers.FluxTransformer2DModel(**TRANSFORMER),
            keys.transformer_pairs_of,
            11_901_408_320,
        ),
        (
            lambda: Autoencoder(KONTEXT_DEV.autoencoder),
            lambda: diffusers.AutoencoderKL(**VAE),
            keys.autoencoder_pairs_of,
            34_274_208 + 49_545_475,
        ),
    ],
    ids=["transformer", "autoencoder"],
)
def test_diffusers_keys_and_shapes_are_ours_under_the_converters_names(ours, theirs, pairs_of, published):
    ours, theirs = shapes_of(ours), shapes_of(theirs)
    assert count(ours) == count(theirs) == published
    there = keys.moves_to_diffusers(ours, pairs_of(ours))
    assert {name: move.shape for name, move in there.items()} == theirs
    back = keys.moves_from_diffusers(theirs, pairs_of(theirs))
    assert {name: move.shape for name, move in back.items()} == ours
    # every row of ours is in one of theirs, and once
    used: dict[str, list[tuple[int, int]]] = {}
    for move in there.values():
        (piece,) = move.pieces
        stop = ours[piece.key][0] if piece.stop is None else piece.stop
        used.setdefault(piece.key, []).append((piece.start, stop))
    for key, rows in used.items():
        edges = [edge for start_stop in sorted(rows) for edge in start_stop]
        assert (
            edges == [0, *(edge for edge in edges[1:-1]), ours[key][0]] and edges[1:-1:2] == edges[2:-1:2]
        ), key


def test_the_t5_encoders_keys_and_shapes_are_transformers():
    ours = shapes_of(lambda: T5Encoder(KONTEXT_DEV.t5))
    theirs = shapes_of(lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)))
    assert ours == theirs and count(ours) == 4_762_310_656


def test_the_clip_text_encoders_keys_and_shapes_are_transformers():
    ours = shapes_of(lambda: ClipTextEncoder(KONTEXT_DEV.clip))
    theirs = shapes_of(lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)))
    # newer versions of transformers leave out the prefix that the published file has
    theirs = {f"text_model.{key.removeprefix('text_model.')}": shape for key, shape in theirs.items()}
    assert ours == theirs and count(ours) == 123_060_480
