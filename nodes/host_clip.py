"""The core's text encoders and tokenizers as a ComfyUI CLIP.

Token lists are keyed `l` and `t5xxl` and modules named `clip_l.transformer` and `t5xxl.transformer`, as in
the host's own FLUX text encoders, so its prompt nodes, text encoder LoRAs and hooks take this CLIP for one of
theirs. Weights stay in the dtype of their file and compute in float32, as the host does it.

Source: Comfy-Org/ComfyUI comfy/text_encoders/flux.py, comfy/sd1_clip.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import torch
from torch import Tensor, nn

from ..kontext_core.conditioning import long_for_clip
from ..kontext_core.models.clip import ClipTextEncoder
from ..kontext_core.models.t5 import T5Encoder
from ..kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer
from . import host_layers

logger = logging.getLogger("kontext")

Pairs = list[list[tuple[int, float]]]


class HostTokenizer:
    """Prompt -> {"l": [[(id, weight), …]], "t5xxl": [[…]]}, each one list long.

    Where the host starts another chunk, text over a model's limit is cut here, and what was cut is logged.
    `(text:1.2)` weights count as they do in the host, unless `disable_weights` is asked for.
    """

    def __init__(self, clip: ClipTokenizer, t5: T5Tokenizer, name: str):
        self.clip, self.t5, self.name = clip, t5, name

    def tokenize_with_weights(
        self,
        text: str,
        return_word_ids: bool = False,
        tokenizer_options: Mapping = {},
        disable_weights: bool = False,
        **_: object,
    ) -> dict[str, list]:
        segments = [(text, 1.0)]
        if not disable_weights:
            escaped = comfy.sd1_clip.escape_important(text)
            weighted = comfy.sd1_clip.token_weights(escaped, 1.0)
            segments = [(comfy.sd1_clip.unescape_important(part), weight) for part, weight in weighted]
        plain = "".join(part for part, _ in segments)
        warnings = self.warnings(plain)
        for warning in warnings:
            logger.warning(warning)
        if not warnings and self.clip.encode([plain]).cut[0]:
            logger.info(long_for_clip(self.clip.max_length))
        padded = tokenizer_options.get("t5xxl_min_length") or self.t5.max_length
        return {
            "l": [_pairs(self.clip, segments, self.clip.max_length, return_word_ids)],
            "t5xxl": [_pairs(self.t5, segments, padded, return_word_ids)],
        }

    def warnings(self, text: str) -> list[str]:
        """What of a prompt the T5 encoder will not see: the end of a long one, words it does not know."""
        tokens = self.t5.encode([text])
        found = []
        if tokens.cut[0]:
            found.append(
                f"the prompt is over the {self.t5.max_length} tokens that {self.name} reads; "
                f"cut off and not read: “{tokens.cut[0]}”"
            )
        if tokens.unknown[0]:
            found.append(f"{self.name} does not know: {', '.join(tokens.unknown[0])}")
        return found

    def untokenize(self, pairs: list[tuple]) -> list[tuple]:
        return [(pair, self.clip.tokenizer.id_to_token(pair[0])) for pair in pairs]

    def state_dict(self) -> dict:
        return {}


def _pairs(
    tokenizer: ClipTokenizer | T5Tokenizer, segments: list, padded: int, word_ids: bool
) -> list[tuple]:
    """(id, weight) or (id, weight, word) of a prompt's segments, cut at the model's limit and padded.

    `padded` is the length that is filled up; more text than that stays, up to the model's own limit.
    """
    start, limit = list(tokenizer.prefix), max(tokenizer.max_length, padded)
    kept = [(token, 1.0, 0) for token in start]
    for number, (text, weight) in enumerate(segments, start=1):
        ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        kept += [(token, weight, number) for token in ids]
    kept = [*kept[: limit - 1], (tokenizer.eos_id, 1.0, 0)]
    kept += [(tokenizer.pad_id, 1.0, 0)] * (padded - len(kept))
    return kept if word_ids else [pair[:2] for pair in kept]


class Part(nn.Module):
    """One text encoder where the host looks for it: under `.transformer`."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer


class HostTextEncoders(nn.Module):
    """T5 and CLIP with the host's layers, and the methods that `comfy.sd.CLIP` calls.

    On a CPU the host loads the model before it hands over any weights, so the weights are in from the start:
    the tensors of the given encoders, not copies.
    """

    def __init__(self, t5: T5Encoder, clip: ClipTextEncoder, t5_tokenizer: T5Tokenizer):
        super().__init__()
        self.end, self.pad = t5_tokenizer.eos_id, t5_tokenizer.pad_id
        self.t5xxl = Part(_in_host_layers(T5Encoder, t5))
        self.clip_l = Part(_in_host_layers(ClipTextEncoder, clip))
        self.dtypes = {_plain_dtype(part.transformer) for part in (self.t5xxl, self.clip_l)}
        self.execution_device: torch.device | None = None

    def set_clip_options(self, options: dict) -> None:
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        self.execution_device = None

    def load_sd(self, sd: dict) -> tuple[list, list]:
        """Nothing is loaded later: the weights came with the constructor."""
        return [], list(sd)

    def _ids(self, pairs: Pairs, weight: Tensor) -> Tensor:
        device = self.execution_device or weight.device
        return torch.tensor([[int(pair[0]) for pair in row] for row in pairs], device=device)

    def encode_token_weights(self, pairs: dict[str, Pairs]) -> tuple[Tensor, Tensor]:
        """T5's (1, L, d) and CLIP's pooled (1, d), float32 on the host's device for intermediate results."""
        t5, clip = self.t5xxl.transformer, self.clip_l.transformer
        rows = pairs["t5xxl"]
        weights = torch.tensor([[float(pair[1]) for pair in row] for row in rows])
        if (weights == 1).all():
            txt = t5(self._ids(rows, t5.shared.weight), dtype=torch.float32)
        else:
            # A weight moves a token's vector away from (or towards) what it is in an empty prompt.
            empty = [[(self.end, 1.0)] + [(self.pad, 1.0)] * (len(rows[0]) - 1)]
            both = t5(self._ids([*rows, *empty], t5.shared.weight), dtype=torch.float32)
            txt, empty = both[:-1], both[-1:]
            txt = empty + (txt - empty) * weights[..., None].to(txt)
        embedding = clip.text_model.embeddings.token_embedding
        _, pooled = clip(self._ids(pairs["l"][:1], embedding.weight), dtype=torch.float32)
        device = comfy.model_management.intermediate_device()
        return torch.cat(list(txt), dim=0)[None].to(device), pooled.to(device)


def check_tokenizer(tokenizer: HostTokenizer, t5: T5Encoder, clip: ClipTextEncoder) -> None:
    """A tokenizer of another model would read past the end of an embedding table.

    Raises:
        ValueError: it has more tokens than the encoder.
    """
    pairs = ((tokenizer.t5, t5.params, "T5"), (tokenizer.clip, clip.params, "CLIP"))
    for own, params, name in pairs:
        if own.vocab_size > params.vocab_size:
            raise ValueError(
                f"the {name} tokenizer has {own.vocab_size} tokens and the encoder {params.vocab_size}: they belong "
                "to different models; put the encoder's own tokenizer folder beside it"
            )


def make_clip(t5: T5Encoder, clip: ClipTextEncoder, tokenizer: HostTokenizer) -> comfy.sd.CLIP:
    """A CLIP of the host around our encoders and tokenizers."""

    class Target:
        params: dict = {}

        @staticmethod
        def clip(dtype, device, model_options):
            """Called by the host to build the model; dtype and place follow the files and its patcher."""
            return HostTextEncoders(t5, clip, tokenizer.t5)

        @staticmethod
        def tokenizer(embedding_directory=None, tokenizer_data=None):
            return tokenizer

    parameters = sum(parameter.numel() for part in (t5, clip) for parameter in part.parameters())
    # The weights are in main memory, wherever the host would have built the model.
    offload = comfy.model_management.text_encoder_offload_device()
    result = comfy.sd.CLIP(Target, parameters=parameters, model_options={"initial_device": offload})
    host_layers.watch(result.patcher)
    return result


def _plain_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the weights that are not packed."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() > 1)


def _in_host_layers(kind: type[nn.Module], core: nn.Module) -> nn.Module:
    """A core module rebuilt from the host's layers over the same tensors; packed ones stay packed."""
    module = kind(core.params, operations=comfy.ops.manual_cast, dtype=_plain_dtype(core), device="meta")
    return host_layers.move_weights(core, module)
