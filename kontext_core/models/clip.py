"""The CLIP text encoder (CLIP-L's shape by default), with the published parameter names.

Notable:
- Causal attention, learned positions, pre-norm blocks, quick GELU: x * sigmoid(1.702 x).
- The pooled output is the last hidden state at the first end-of-text token, after the final layer norm. FLUX
  uses it without the text projection, so there is none here.
- Everything runs in one dtype, the weights' unless another is asked for; torch's LayerNorm and attention
  accumulate half precision in float32.

Source: arXiv 2103.00020; huggingface/transformers `models/clip/modeling_clip.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

IGNORABLE_KEYS = ("text_projection.weight", "logit_scale", "text_model.embeddings.position_ids")
"""Keys that published files may carry and that FLUX has no use for."""

IGNORABLE_PREFIXES = ("vision_model.", "visual_projection.")
"""Keys of a whole CLIP file that are not the text encoder's."""

HEAD_DIM = 64
"""Head size of every published CLIP text encoder; shapes alone do not tell it."""


@dataclass(frozen=True, kw_only=True)
class ClipParams:
    """Sizes of a CLIP text encoder; the defaults are CLIP-L's (123,060,480 parameters)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_length: int = 77
    eos_token_id: int = 49407
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"ClipParams.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"ClipParams.hidden_size is {self.hidden_size}; it must be a multiple of num_heads "
                f"({self.num_heads})."
            )
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(
                f"ClipParams.eos_token_id is {self.eos_token_id}; it must be in 0..{self.vocab_size - 1}."
            )


def params_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], *, num_heads: int | None = None, eos_token_id: int | None = None
) -> ClipParams:
    """Read a CLIP text encoder's sizes off its tensors' shapes.

    Args:
        shapes: key -> shape.
        num_heads: from the config; without it heads are 64 wide, as in every published CLIP.
        eos_token_id: the end-of-text token; without it the last id of the vocabulary. (Old configs say 2,
            which is wrong for them as well.)

    Raises:
        ValueError: a key that the sizes are read from is missing, or the head count cannot be known.
    """
    names = {
        "tokens": "text_model.embeddings.token_embedding.weight",
        "positions": "text_model.embeddings.position_embedding.weight",
        "fc1": "text_model.encoder.layers.0.mlp.fc1.weight",
    }
    missing = [key for key in names.values() if key not in shapes]
    if missing:
        raise ValueError(
            f"not a CLIP text encoder: {', '.join(missing)} is missing among {len(shapes)} keys."
        )
    vocab_size, hidden_size = shapes[names["tokens"]]
    if num_heads is None and hidden_size % HEAD_DIM:
        raise ValueError(
            f"the CLIP text encoder is {hidden_size} wide, which is no multiple of {HEAD_DIM}: give "
            "num_heads (config.json's num_attention_heads)."
        )
    layers = [
        int(m.group(1)) for m in (re.match(r"text_model\.encoder\.layers\.(\d+)\.", k) for k in shapes) if m
    ]
    return ClipParams(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=shapes[names["fc1"]][0],
        num_layers=max(layers) + 1,
        num_heads=hidden_size // HEAD_DIM if num_heads is None else num_heads,
        max_length=shapes[names["positions"]][0],
        eos_token_id=vocab_size - 1 if eos_token_id is None else eos_token_id,
    )


class Embeddings(nn.Module):
    """Token plus position."""

    def __init__(self, params: ClipParams, operations: ModuleType | Any, kwargs: dict) -> None:
        super().__init__()
        self.token_embedding = operations.Embedding(params.vocab_size, params.hidden_size, **kwargs)
        self.position_embedding = operations.Embedding(params.max_length, params.hidden_size, **kwargs)

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids).to(dtype) + self.position_embedding(position).to(dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, params: ClipParams, operations: ModuleType | Any, kwargs: dict) -> None:
        super().__init__()
        self.num_heads = params.num_heads
        self.q_proj = operations.Linear(params.hidden_size, params.hidden_size, **kwargs)
        self.k_proj = operations.Linear(params.hidden_size, params.hidden_size, **kwargs)
        self.v_proj = operations.Linear(params.hidden_size, params.hidden_size, **kwargs)
        self.out_proj = operations.Linear(params.hidden_size, params.hidden_size, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(layer(x), "b l (heads d) -> b heads l d", heads=self.num_heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(x, "b heads l d -> b l (heads d)"))


class FeedForward(nn.Module):
    """fc2(quick_gelu(fc1 x))."""

    def __init__(self, params: ClipParams, operations: ModuleType | Any, kwargs: dict) -> None:
        super().__init__()
        self.fc1 = operations.Linear(params.hidden_size, params.intermediate_size, **kwargs)
        self.fc2 = operations.Linear(params.intermediate_size, params.hidden_size, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, params: ClipParams, operations: ModuleType | Any, kwargs: dict) -> None:
        super().__init__()
        self.layer_norm1 = operations.LayerNorm(params.hidden_size, eps=params.eps, **kwargs)
        self.self_attn = Attention(params, operations, kwargs)
        self.layer_norm2 = operations.LayerNorm(params.hidden_size, eps=params.eps, **kwargs)
        self.mlp = FeedForward(params, operations, kwargs)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, under the checkpoint's name."""

    def __init__(self, params: ClipParams, operations: ModuleType | Any, kwargs: dict) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(params, operations, kwargs) for _ in range(params.num_layers)])


class TextModel(nn.Module):
    """Embeddings, layers and final norm, under the checkpoint's names."""

    def __init__(self, params: ClipParams, operations: ModuleType | Any, kwargs: dict) -> None:
        super().__init__()
        self.embeddings = Embeddings(params, operations, kwargs)
        self.encoder = Encoder(params, operations, kwargs)
        self.final_layer_norm = operations.LayerNorm(params.hidden_size, eps=params.eps, **kwargs)

    def forward(self, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
        x = self.embeddings(input_ids, dtype)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class ClipTextEncoder(nn.Module):
    """CLIP text encoder: token ids in, hidden states and the pooled vector out.

    Args:
        params: sizes.
        operations: namespace with Linear, Embedding and LayerNorm; `torch.nn`, or a host's.
        dtype: dtype of the weights.
        device: device of the weights; "meta" allocates nothing.
    """

    def __init__(
        self,
        params: ClipParams,
        *,
        operations: ModuleType | Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.params = params
        self.text_model = TextModel(params, operations, {"dtype": dtype, "device": device})

    @property
    def compute_dtype(self) -> torch.dtype:
        """The final norm's dtype, float32 if that is an 8-bit one."""
        dtype = self.text_model.final_layer_norm.weight.dtype
        return (
            dtype if dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) else torch.float32
        )

    def forward(self, input_ids: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Encode token ids.

        Args:
            input_ids: (B, L) integers below vocab_size, L at most max_length, an end-of-text token in every
                row.
            dtype: what to compute in; one that is not the weights' needs `operations` that cast.

        Returns:
            Last hidden state (B, L, hidden_size) and pooled (B, hidden_size).

        Raises:
            ValueError: L is above max_length, or a row has no end-of-text token.
        """
        length, eos = input_ids.shape[1], self.params.eos_token_id
        if length > self.params.max_length:
            raise ValueError(
                f"{length} CLIP tokens were given; this model takes at most {self.params.max_length}: "
                "cut the prompt."
            )
        is_eos = input_ids == eos
        if not is_eos.is_meta and not bool(is_eos.any(dim=1).all()):
            raise ValueError(
                f"a row of CLIP tokens has no end-of-text token (id {eos}); the pooled output needs one."
            )
        hidden = self.text_model(input_ids, self.compute_dtype if dtype is None else dtype)
        first_eos = is_eos.int().argmax(dim=1)
        return hidden, hidden[torch.arange(len(hidden), device=hidden.device), first_eos.to(hidden.device)]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill the weights for training from nothing: normal, with CLIP's scales; biases 0, norms 1."""
        p = self.params
        inside = (2 * p.num_layers) ** -0.5
        stds = {
            "token_embedding": 0.02,
            "position_embedding": 0.02,
            "q_proj": p.hidden_size**-0.5 * inside,
            "k_proj": p.hidden_size**-0.5 * inside,
            "v_proj": p.hidden_size**-0.5 * inside,
            "out_proj": p.hidden_size**-0.5,
            "fc1": (2 * p.hidden_size) ** -0.5,
            "fc2": p.hidden_size**-0.5 * inside,
        }
        for name, parameter in self.named_parameters():
            module, kind = name.split(".")[-2:]
            if kind == "bias":
                parameter.zero_()
            elif module in stds:
                parameter.normal_(0.0, stds[module], generator=generator)
            else:
                parameter.fill_(1.0)
