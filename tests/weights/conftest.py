"""Small models of the published architecture with random weights, and files of them in every format."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from kontext_core.models.autoencoder import Autoencoder, AutoencoderParams
from kontext_core.models.clip import ClipParams, ClipTextEncoder
from kontext_core.models.t5 import T5Encoder, T5Params
from kontext_core.models.transformer import Flux, TransformerParams

TRANSFORMER = TransformerParams(
    vec_in_dim=64,
    context_in_dim=256,
    hidden_size=256,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(8, 28, 28),
)
AUTOENCODER = AutoencoderParams(ch=8, ch_mult=(1, 2, 4, 4))
T5 = T5Params(vocab_size=512, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4)
CLIP = ClipParams(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=1, eos_token_id=299
)


def randomised(module: torch.nn.Module, seed: int, dtype: torch.dtype) -> torch.nn.Module:
    """Every parameter random, norms and biases included, so that no swapped pair goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return module.to(dtype).eval().requires_grad_(False)


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.fixture(scope="session")
def transformer() -> Flux:
    return randomised(Flux(TRANSFORMER), 0, torch.bfloat16)


@pytest.fixture(scope="session")
def autoencoder() -> Autoencoder:
    return randomised(Autoencoder(AUTOENCODER), 1, torch.float32)


@pytest.fixture(scope="session")
def t5() -> T5Encoder:
    return randomised(T5Encoder(T5), 2, torch.bfloat16)


@pytest.fixture(scope="session")
def clip() -> ClipTextEncoder:
    return randomised(ClipTextEncoder(CLIP), 3, torch.bfloat16)


@pytest.fixture(scope="session")
def fp8_state(transformer):
    """The transformer as ComfyUI's older scaled files have it, made by hand: (state, values it stands for)."""
    state, values = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}, {}
    for key, value in state_of(transformer).items():
        if value.ndim != 2:
            state[key], values[key] = value, value.float()
            continue
        scale = value.float().abs().amax() / 448
        state[key] = (value.float() / scale).to(torch.float8_e4m3fn)
        state[key.removesuffix("weight") + "scale_weight"] = scale
        values[key] = state[key].float() * scale
    return state, values


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, transformer, autoencoder, t5, clip):
    """A folder in the layout of the FLUX.1-Kontext-dev repository."""
    folder = tmp_path_factory.mktemp("small-kontext")
    save_file(state_of(transformer), folder / "flux1-small.safetensors")
    save_file(state_of(autoencoder), folder / "ae.safetensors")
    for name, module in (("text_encoder", clip), ("text_encoder_2", t5)):
        (folder / name).mkdir()
        save_file(state_of(module), folder / name / "model.safetensors", metadata={"format": "pt"})
    write_tokenizers(folder)
    return folder


def write_tokenizers(folder) -> None:
    """Word-level stand-ins of the right kinds: a unigram T5 and a byte-level CLIP with their special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁make", -1.0), ("▁it", -1.0), ("▁red", -1.0)]
    (folder / "tokenizer_2").mkdir()
    Tokenizer(Unigram(words, unk_id=2)).save(str(folder / "tokenizer_2" / "tokenizer.json"))
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 16}))
    (folder / "tokenizer").mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
