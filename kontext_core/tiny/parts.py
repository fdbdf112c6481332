"""What kontext-tiny is made of: its sizes, its parts with fresh or with the bundled weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..devices import fast_dtype
from ..models.clip import ClipParams, ClipTextEncoder
from ..models.t5 import T5Encoder, T5Params
from ..models.tokenizers import ClipTokenizer, T5Tokenizer
from ..models.transformer import Flux, TransformerParams
from ..training import mixed
from ..training.flow import KontextModule
from ..training.supervision import TokenClassifier
from .autoencode import floats
from .labels import CLASSES

TRANSFORMER = TransformerParams(
    vec_in_dim=128,
    context_in_dim=192,
    hidden_size=256,
    num_heads=4,
    depth=2,
    depth_single_blocks=6,
    axes_dim=(8, 28, 28),
)
ASSETS = Path(__file__).parents[1] / "assets" / "kontext-tiny"
SUPERVISED = 2
"""The single-stream block whose tokens are asked what they show, see `training.supervision`."""
DTYPE = fast_dtype("cpu", torch.bfloat16)


def load_bundled(module: KontextModule) -> None:
    """Put the bundled transformer and text encoders into the module, as float32."""
    module.transformer.load_state_dict(floats(ASSETS / "flux1-kontext-tiny.safetensors"))
    module.clip.load_state_dict(floats(ASSETS / "text_encoder" / "model.safetensors"))
    module.t5.load_state_dict(floats(ASSETS / "text_encoder_2" / "model.safetensors"))


def build_module() -> tuple[KontextModule, tuple[Tensor, Tensor]]:
    """Transformer and text encoders with fresh weights, and the empty prompt's ids (T5, CLIP)."""
    t5_tokenizer = T5Tokenizer.from_path(ASSETS / "tokenizer_2")
    clip_tokenizer = ClipTokenizer.from_path(ASSETS / "tokenizer")
    t5_params = T5Params(
        vocab_size=t5_tokenizer.vocab_size, d_model=192, d_kv=48, d_ff=512, num_layers=4, num_heads=4
    )
    clip_params = ClipParams(
        vocab_size=clip_tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_layers=2,
        num_heads=2,
        eos_token_id=clip_tokenizer.vocab_size - 1,
    )
    generator = torch.Generator().manual_seed(0)
    module = KontextModule(
        Flux(TRANSFORMER, operations=mixed),
        T5Encoder(t5_params, operations=mixed),
        ClipTextEncoder(clip_params, operations=mixed),
        TokenClassifier(TRANSFORMER.hidden_size, tuple(CLASSES.values()), after=SUPERVISED),
    )
    for part in (module.transformer, module.t5, module.clip):
        part.init_weights(generator)
    return module, (t5_tokenizer.encode([""]).ids[0], clip_tokenizer.encode([""]).ids[0])
