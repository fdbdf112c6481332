"""What kontext-tiny is made of: its sizes, its parts with fresh or with the bundled weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..devices import fast_dtype
from ..models.clip import ClipTextEncoder
from ..models.t5 import T5Encoder
from ..models.tokenizers import ClipTokenizer, T5Tokenizer
from ..models.transformer import Flux
from ..presets import KONTEXT_TINY
from ..training import mixed
from ..training.flow import KontextModule
from ..training.supervision import TokenClassifier
from .autoencode import floats
from .labels import CLASSES

TRANSFORMER = KONTEXT_TINY.transformer
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
    generator = torch.Generator().manual_seed(0)
    module = KontextModule(
        Flux(TRANSFORMER, operations=mixed),
        T5Encoder(KONTEXT_TINY.t5, operations=mixed),
        ClipTextEncoder(KONTEXT_TINY.clip, operations=mixed),
        TokenClassifier(TRANSFORMER.hidden_size, tuple(CLASSES.values()), after=SUPERVISED),
    )
    for part in (module.transformer, module.t5, module.clip):
        part.init_weights(generator)
    return module, (t5_tokenizer.encode([""]).ids[0], clip_tokenizer.encode([""]).ids[0])
