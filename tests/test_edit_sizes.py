"""edit_image at every preferred size of FLUX.1 Kontext, at full resolution, with networks as small as they get."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kontext_core import geometry
from kontext_core.edit import edit_image
from kontext_core.models.autoencoder import Autoencoder, AutoencoderParams
from kontext_core.models.clip import ClipParams, ClipTextEncoder
from kontext_core.models.t5 import T5Encoder, T5Params
from kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.presets import KONTEXT_DEV, infer_preset
from kontext_core.weights.load import KontextModel
from kontext_core.weights.locate import BUNDLED


@pytest.fixture(scope="module")
def model() -> KontextModel:
    """Published picture sizes, one block of each kind, eight channels."""
    assets = BUNDLED["kontext-tiny"]
    t5_tokenizer = T5Tokenizer.from_path(assets / "tokenizer_2", max_length=8)
    clip_tokenizer = ClipTokenizer.from_path(assets / "tokenizer")
    params = {
        "transformer": TransformerParams(
            vec_in_dim=8, context_in_dim=8, hidden_size=8, num_heads=1, depth=1, depth_single_blocks=1,
            axes_dim=(4, 2, 2),
        ),
        "autoencoder": AutoencoderParams(ch=4, ch_mult=(1, 1, 1, 2), num_res_blocks=1),
        "t5": T5Params(vocab_size=t5_tokenizer.vocab_size, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1),
        "clip": ClipParams(
            vocab_size=clip_tokenizer.vocab_size, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
            eos_token_id=clip_tokenizer.eos_id,
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    kinds = {"transformer": Flux, "autoencoder": Autoencoder, "t5": T5Encoder, "clip": ClipTextEncoder}
    parts = {name: kinds[name](value).eval() for name, value in params.items()}
    preset = replace(infer_preset("smallest", **params, text_length=8), max_area=KONTEXT_DEV.max_area)
    tokenizers = {"t5_tokenizer": t5_tokenizer, "clip_tokenizer": clip_tokenizer}
    return KontextModel(**parts, **tokenizers, preset=preset, name="smallest")


@pytest.mark.parametrize("size", geometry.PREFERRED_SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_picture_of_every_preferred_size_is_edited_as_it_is(model, size):
    width, height = size
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = edit_image(model, picture, "make it red", num_steps=1)
    assert result.geometry.size == size and result.images.shape == picture.shape
    assert result.latent.shape == (1, 16, height // 8, width // 8)
    assert torch.isfinite(result.images).all() and result.images.std() > 0


def test_the_preferred_sizes_are_the_published_seventeen():
    landscape = {
        (1568, 672),
        (1504, 688),
        (1456, 720),
        (1392, 752),
        (1328, 800),
        (1248, 832),
        (1184, 880),
        (1104, 944),
    }
    both = landscape | {(height, width) for width, height in landscape} | {(1024, 1024)}
    assert set(geometry.PREFERRED_SIZES) == both and len(geometry.PREFERRED_SIZES) == 17
