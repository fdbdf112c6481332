"""The T5 v1.1 encoder, any size from kontext-tiny's to T5-XXL, with the published parameter names.

Notable:
- RMS norm without mean or bias; attention without the 1/sqrt(D) scale (the initialisation carries it).
- One relative position bias, a table in block 0, shared by every block.
- Gated feed-forward: gelu_tanh(wi_0 x) * (wi_1 x), then wo. No biases anywhere.
- Padding tokens are attended unless a mask is passed: FLUX was trained that way.

Numerics. The residual stream, the norms and the softmax bias table are float32; the linear layers run in the
compute dtype. T5-XXL's feed-forward leaves float16's range (transformers keeps `wo` in float32, ComfyUI
computes the whole encoder in float32). Here a float16 product is taken in float32 and divided by a power of
two per token before `wo` and multiplied back after: exact but for underflow 2^24 below the largest entry, and
no weight is copied or grows. bfloat16 has float32's range and needs none of this.

Source: arXiv 1910.10683, 2002.05202; huggingface/transformers `models/t5/modeling_t5.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

DUPLICATE_KEYS = {"encoder.embed_tokens.weight": "shared.weight"}
"""Keys that published files carry as a second copy (or, in some, the only copy) of another key."""

IGNORABLE_PREFIXES = ("decoder.", "lm_head.")
"""Keys of a full encoder-decoder file that the encoder has no use for."""


@dataclass(frozen=True, kw_only=True)
class T5Params:
    """Sizes of a T5 v1.1 encoder; the defaults are T5-XXL's (4,762,310,656 parameters)."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"T5Params.{name} is {getattr(self, name)}; it must be at least 1.")
        buckets = self.relative_attention_num_buckets
        if buckets < 4 or buckets % 2:
            raise ValueError(
                f"T5Params.relative_attention_num_buckets is {buckets}; it must be even and at least 4 "
                "(half of the buckets look left, half look right)."
            )
        if self.relative_attention_max_distance <= buckets // 4:
            raise ValueError(
                f"T5Params.relative_attention_max_distance is {self.relative_attention_max_distance}; it "
                f"must be greater than a quarter of the {buckets} buckets, which are one token wide."
            )


def params_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> T5Params:
    """Read a T5 encoder's sizes off its tensors' shapes.

    The largest bucketed distance leaves no trace in the shapes; every published T5 has 128.

    Raises:
        ValueError: a key that the sizes are read from is missing, or the file is a T5 v1.0.
    """
    if any(re.search(r"DenseReluDense\.wi\.weight$", key) for key in shapes):
        raise ValueError(
            "this is a T5 v1.0 encoder (it has DenseReluDense.wi.weight); FLUX needs a T5 v1.1 encoder with "
            "gated feed-forward layers (DenseReluDense.wi_0 and wi_1), such as google/t5-v1_1-xxl."
        )
    block = "encoder.block.0.layer."
    names = {
        "bias": f"{block}0.SelfAttention.relative_attention_bias.weight",
        "q": f"{block}0.SelfAttention.q.weight",
        "wi": f"{block}1.DenseReluDense.wi_0.weight",
    }
    table = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    missing = [key for key in (table, *names.values()) if key not in shapes]
    if missing:
        raise ValueError(f"not a T5 v1.1 encoder: {', '.join(missing)} is missing among {len(shapes)} keys.")
    num_buckets, num_heads = shapes[names["bias"]]
    layers = [int(m.group(1)) for m in (re.match(r"encoder\.block\.(\d+)\.", key) for key in shapes) if m]
    return T5Params(
        vocab_size=shapes[table][0],
        d_model=shapes[table][1],
        d_kv=shapes[names["q"]][0] // num_heads,
        d_ff=shapes[names["wi"]][0],
        num_layers=max(layers) + 1,
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
    )


def relative_position_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket numbers of signed distances (key - query, in tokens), any shape, int64.

    Half of the buckets are for keys to the right. In each half, the first half is one token wide each and the
    rest grow logarithmically up to `max_distance`; everything farther shares the last bucket.
    """
    per_side = num_buckets // 2
    exact = per_side // 2
    right = (distance > 0).long() * per_side
    distance = distance.abs()
    growth = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (per_side - exact)).long()).clamp(max=per_side - 1)
    return right + torch.where(distance < exact, distance, far)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype | None, device: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        # Hosts that load a model in part can leave a bare parameter on the other device.
        weight = self.weight.to(device=x.device, dtype=torch.float32)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight


class Attention(nn.Module):
    """Multi-head self-attention, unscaled; the additive bias comes from outside."""

    def __init__(
        self, params: T5Params, has_bias_table: bool, operations: ModuleType | Any, kwargs: dict
    ) -> None:
        super().__init__()
        inner = params.num_heads * params.d_kv
        self.params = params
        self.q = operations.Linear(params.d_model, inner, bias=False, **kwargs)
        self.k = operations.Linear(params.d_model, inner, bias=False, **kwargs)
        self.v = operations.Linear(params.d_model, inner, bias=False, **kwargs)
        self.o = operations.Linear(inner, params.d_model, bias=False, **kwargs)
        if has_bias_table:
            self.relative_attention_bias = operations.Embedding(
                params.relative_attention_num_buckets, params.num_heads, **kwargs
            )

    def position_bias(self, length: int, device: torch.device) -> Tensor:
        """The shared bias (1, heads, L, L), float32: a lookup per distance, spread over the pairs."""
        position = torch.arange(length, device=device)
        distance = torch.arange(1 - length, length, device=device)
        buckets = relative_position_buckets(
            distance, self.params.relative_attention_num_buckets, self.params.relative_attention_max_distance
        )
        per_distance = self.relative_attention_bias(buckets).float()
        pairs = position[None, :] - position[:, None] + (length - 1)
        return rearrange(per_distance[pairs], "query key heads -> 1 heads query key")

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            rearrange(layer(x), "b l (heads d) -> b heads l d", heads=self.params.num_heads)
            for layer in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(rearrange(x, "b heads l d -> b l (heads d)"))


class AttentionLayer(nn.Module):
    """Pre-norm residual around the attention."""

    def __init__(
        self, params: T5Params, has_bias_table: bool, operations: ModuleType | Any, kwargs: dict
    ) -> None:
        super().__init__()
        self.SelfAttention = Attention(params, has_bias_table, operations, kwargs)
        self.layer_norm = RMSNorm(params.d_model, params.eps, **kwargs)

    def forward(self, x: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x).to(dtype), bias).float()


class GatedFeedForward(nn.Module):
    """wo(gelu_tanh(wi_0 x) * wi_1 x)."""

    def __init__(self, params: T5Params, operations: ModuleType | Any, kwargs: dict) -> None:
        super().__init__()
        self.wi_0 = operations.Linear(params.d_model, params.d_ff, bias=False, **kwargs)
        self.wi_1 = operations.Linear(params.d_model, params.d_ff, bias=False, **kwargs)
        self.wo = operations.Linear(params.d_ff, params.d_model, bias=False, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Takes the compute dtype, returns float32."""
        gate = F.gelu(self.wi_0(x), approximate="tanh")
        if x.dtype != torch.float16:
            return self.wo(gate * self.wi_1(x)).float()
        hidden = gate.float() * self.wi_1(x).float()
        _, exponent = torch.frexp(hidden.detach().abs().amax(-1, keepdim=True))
        scale = torch.exp2(exponent.float())
        return self.wo((hidden / scale).to(x.dtype)).float() * scale


class FeedForwardLayer(nn.Module):
    """Pre-norm residual around the feed-forward."""

    def __init__(self, params: T5Params, operations: ModuleType | Any, kwargs: dict) -> None:
        super().__init__()
        self.DenseReluDense = GatedFeedForward(params, operations, kwargs)
        self.layer_norm = RMSNorm(params.d_model, params.eps, **kwargs)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x).to(dtype))


class Block(nn.Module):
    """Attention, then feed-forward."""

    def __init__(
        self, params: T5Params, has_bias_table: bool, operations: ModuleType | Any, kwargs: dict
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [
                AttentionLayer(params, has_bias_table, operations, kwargs),
                FeedForwardLayer(params, operations, kwargs),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        return self.layer[1](self.layer[0](x, bias, dtype), dtype)


class Stack(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, params: T5Params, operations: ModuleType | Any, kwargs: dict) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [Block(params, index == 0, operations, kwargs) for index in range(params.num_layers)]
        )
        self.final_layer_norm = RMSNorm(params.d_model, params.eps, **kwargs)


class T5Encoder(nn.Module):
    """T5 v1.1 encoder: token ids in, one vector of size d_model a token out.

    Args:
        params: sizes.
        operations: namespace with Linear and Embedding; `torch.nn`, or a host's with the same signatures.
        dtype: dtype of the weights.
        device: device of the weights; "meta" allocates nothing.
    """

    def __init__(
        self,
        params: T5Params,
        *,
        operations: ModuleType | Any = nn,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.params = params
        self.shared = operations.Embedding(params.vocab_size, params.d_model, **kwargs)
        self.encoder = Stack(params, operations, kwargs)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the linear layers run in by default: the norms' dtype, float32 if that is an 8-bit one."""
        dtype = self.encoder.final_layer_norm.weight.dtype
        return (
            dtype if dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) else torch.float32
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Encode token ids.

        Args:
            input_ids: (B, L) integers below vocab_size.
            attention_mask: (B, L), non-zero where a token may be attended to; None attends to all, pads as
                well.
            dtype: what the linear layers run in, and the result's dtype. A dtype that is not the weights'
                needs `operations` that cast.

        Returns:
            (B, L, d_model).
        """
        dtype = self.compute_dtype if dtype is None else dtype
        x = self.shared(input_ids).float()
        first = self.encoder.block[0].layer[0].SelfAttention
        bias = first.position_bias(input_ids.shape[1], x.device)
        if attention_mask is not None:
            hidden = rearrange(attention_mask.to(x.device) == 0, "b key -> b 1 1 key")
            # A large finite number, not -inf: a row of pads only would be NaN.
            bias = bias.masked_fill(hidden, torch.finfo(dtype).min)
        for block in self.encoder.block:
            x = block(x, bias, dtype)
        return self.encoder.final_layer_norm(x).to(dtype)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill the weights for training from nothing: normal, with T5's own scales.

        Unit-variance embeddings; each matrix keeps unit variance, and `q` carries the missing 1/sqrt(D).
        """
        p = self.params
        stds = {
            "shared": 1.0,
            "q": (p.d_model * p.d_kv) ** -0.5,
            "k": p.d_model**-0.5,
            "v": p.d_model**-0.5,
            "o": (p.num_heads * p.d_kv) ** -0.5,
            "relative_attention_bias": p.d_model**-0.5,
            "wi_0": p.d_model**-0.5,
            "wi_1": p.d_model**-0.5,
            "wo": p.d_ff**-0.5,
        }
        for name, parameter in self.named_parameters():
            module = name.split(".")[-2]
            if module in stds:
                parameter.normal_(0.0, stds[module], generator=generator)
            else:
                parameter.fill_(1.0)
