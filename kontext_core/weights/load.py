"""Files and folders to models: strict, through the meta device, straight from the memory map.

A model is built on the meta device, where it takes no memory, its keys and shapes are compared with the file's,
and then each parameter is replaced by a view of the file's bytes. Nothing is copied unless another dtype or
device is asked for, or a file keeps apart what our layers have in one piece (diffusers' q, k and v). Packed
weights (float8, GGUF) stay packed; see `packed`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..devices import fast_dtype
from ..models.autoencoder import Autoencoder
from ..models.clip import ClipTextEncoder
from ..models.t5 import T5Encoder
from ..models.tokenizers import ClipTokenizer, T5Tokenizer
from ..models.transformer import Flux
from ..presets import ModelPreset, infer_preset
from . import locate, offload
from .files import WeightFile, open_weights
from .formats import AUTOENCODER, CLIP, T5, TRANSFORMER
from .packed import FLOAT8, Packed, PackedOperations, PlainOperations
from .parts import Part, check_keys, open_part

logger = logging.getLogger("kontext")

FEW_STEP = "few_step"  # the distilled transformer's name among a model's files and plans

BUILDERS = {TRANSFORMER: Flux, AUTOENCODER: Autoencoder, T5: T5Encoder, CLIP: ClipTextEncoder}

PACKED_DTYPE = torch.bfloat16  # what packed files are computed in unless another dtype is asked for

PLAIN_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Weights checked one by one for NaN; of larger tensors a few rows are.
WHOLE_CHECK = 2**20

Source = str | os.PathLike | WeightFile


@dataclass(kw_only=True)
class KontextModel:
    """All parts of a model, ready for `edit_image`.

    Attributes:
        few_step: the distilled transformer that belongs to the model, if it has one.
        device: where it computes; weights that are brought there only for use lie elsewhere.
        budget: bytes that a transformer's weights may take there; None for what is free.
        files: part -> the open file its weights are views of.
        plans: part -> how its weights are spread, of transformers that do not simply lie on the device.
    """

    transformer: Flux
    autoencoder: Autoencoder
    t5: T5Encoder
    clip: ClipTextEncoder
    t5_tokenizer: T5Tokenizer
    clip_tokenizer: ClipTokenizer
    preset: ModelPreset
    name: str
    few_step: Flux | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budget: int | None = None
    files: dict[str, WeightFile] = field(default_factory=dict)
    plans: dict[str, offload.Plan] = field(default_factory=dict)

    @property
    def autoencoder_budget(self) -> int | None:
        """Bytes of working memory for pictures on their way in and out: a quarter of the budget."""
        return None if self.budget is None else self.budget // 4

    def release(self, *parts: str) -> None:
        """Gives memory that holds these parts' weights back to the system, which reads them again when used.

        Nothing happens to weights that were copied to a device or another dtype.
        """
        for part in parts:
            file = self.files.get(part)
            if file is not None:
                for key in file.tensors:
                    file.release(key)


def load_transformer(path: Source, *, dtype=None, device=None) -> Flux:
    """The flow transformer in a file or folder of any format.

    Args:
        path: safetensors or GGUF file, index, folder, or an open file.
        dtype: what plain weights are cast to and packed ones are computed in; by default what is stored, and
            bfloat16 for packed files.
        device: where the weights go; by default they stay in the memory map.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    return build(open_part(path, TRANSFORMER), dtype=dtype, device=device)


def load_autoencoder(path: Source, *, dtype=None, device=None) -> Autoencoder:
    """The autoencoder in a file or folder; scale and shift come from a config.json beside it, if there is one."""
    part = open_part(path, AUTOENCODER)
    config = locate.read_config(part.file.path)
    scaling = {"scale_factor": config.get("scaling_factor"), "shift_factor": config.get("shift_factor")}
    given = {name: float(value) for name, value in scaling.items() if isinstance(value, (int, float))}
    part.params = replace(part.params, **given)
    return build(part, dtype=dtype, device=device)


def load_t5(path: Source, *, dtype=None, device=None) -> T5Encoder:
    """The T5 encoder in a file or folder; arguments as for `load_transformer`."""
    return build(open_part(path, T5), dtype=dtype, device=device)


def load_clip(path: Source, *, dtype=None, device=None, eos_token_id: int | None = None) -> ClipTextEncoder:
    """The CLIP text encoder in a file or folder; its head count comes from a config.json beside it, or is 64 wide.

    Args:
        eos_token_id: the tokenizer's end-of-text id; by default the vocabulary's last.
    """
    part = open_part(path, CLIP)
    heads = locate.read_config(part.file.path).get("num_attention_heads")
    if isinstance(heads, int) and heads > 0 and part.params.hidden_size % heads == 0:
        part.params = replace(part.params, num_heads=heads)
    if eos_token_id is not None:
        part.params = replace(part.params, eos_token_id=eos_token_id)
    return build(part, dtype=dtype, device=device)


def build(part: Part, *, dtype: torch.dtype | None = None, device=None, operations: Any = None) -> nn.Module:
    """Our module over a part's weights.

    Args:
        operations: layers to build with; by default torch's own for small plain files and `PackedOperations` for
            packed and large ones, whose weights stay as they are stored and are cast or moved on use.
    """
    packed = {key for key in part.shapes if part.is_packed(key)}
    large = part.nbytes >= offload.SMALL
    if operations is None:
        operations = PackedOperations if packed or large else PlainOperations
    try:
        module = BUILDERS[part.found.part](part.params, operations=operations, device="meta")
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{part.name}: its sizes make no model: {error}") from error
    check_keys(part, {key: tuple(value.shape) for key, value in module.named_parameters()})
    compute = dtype or (PACKED_DTYPE if packed else _stored_dtype(part))
    for key in part.shapes:
        assign(module, part, key, compute, device)
    return module.eval()


def assign(module: nn.Module, part: Part, key: str, dtype: torch.dtype, device) -> None:
    """Puts one tensor of the file into the module, as it is stored where the layer can take it so."""
    owner, _, name = key.rpartition(".")
    layer = module.get_submodule(owner)
    weight = part.weight(key)
    _check_finite(part, key, weight)
    if name == "weight" and isinstance(layer, Packed):
        layer.assign(weight.data.to(device), weight.kind, weight.scale)
    else:
        layer.register_parameter(name, nn.Parameter(weight.values(dtype).to(device), requires_grad=False))
    kept = layer.get_parameter(name)
    if len(part.moves[key].pieces) == 1 and kept.data_ptr() != weight.data.data_ptr():
        part.file.release(part.moves[key].pieces[0].key)


def _stored_dtype(part: Part) -> torch.dtype:
    """The dtype most of the weights have: a file may keep norms in another."""
    counts: Counter[str] = Counter()
    for key in part.shapes:
        counts[part.dtype_name(key)] += torch.Size(part.shapes[key]).numel()
    common = counts.most_common(1)[0][0]
    if common not in PLAIN_DTYPES:
        raise ValueError(f"{part.name}: its weights are {common}; floating-point weights are needed.")
    return PLAIN_DTYPES[common]


def _check_finite(part: Part, key: str, weight) -> None:
    """NaN or infinite numbers: everything in small tensors, the first, middle and last rows of large ones."""
    data = weight.data
    if data.numel() > WHOLE_CHECK and data.ndim > 1:
        rows = [0, len(data) // 2, len(data) - 1]
        if data.dtype in FLOAT8:
            data = torch.stack([data[row].view(torch.uint8) for row in rows]).view(data.dtype)
        else:
            data = torch.stack([data[row] for row in rows])
    scale = weight.scale if weight.scale is not None and weight.scale.numel() == 1 else None
    values = replace(weight, data=data, scale=scale).values(torch.float32)
    if not torch.isfinite(values).all() or (
        weight.scale is not None and not torch.isfinite(weight.scale).all()
    ):
        raise ValueError(
            f"{part.name}: {key} holds NaN or infinite numbers: the file is damaged, or was saved from a training "
            "that failed. Get it again."
        )


def load_model(
    name_or_folder: str | os.PathLike,
    *,
    t5: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    t5_tokenizer: str | os.PathLike | None = None,
    clip_tokenizer: str | os.PathLike | None = None,
    text_length: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    budget: int | None = None,
) -> KontextModel:
    """A whole model by the name of a bundled one, from a folder, or from a transformer file.

    Args:
        name_or_folder: "kontext-tiny"; a folder in the layout of the FLUX.1-Kontext-dev repository, of diffusers,
            or with ComfyUI's file names; or a transformer file with the other parts given or beside it.
        t5, clip, vae: files or folders that take the place of what would be found.
        t5_tokenizer, clip_tokenizer: likewise; by default beside the encoders, or in the ComfyUI that COMFYUI_PATH
            names.
        text_length: T5 tokens that prompts are padded to; by default the preset's (512 for FLUX.1 Kontext).
        dtype: as for `load_transformer`, for all parts; by default what the device is fast at, float32 on a CPU
            without bfloat16 in hardware; see `devices`.
        device: where to compute; the CPU by default. Of large models only what the budget holds lies there, the
            rest is brought when used; see `offload`.
        budget: bytes that the transformer's weights may take on the device; by default what is free.

    Raises:
        ValueError: a part is missing (the message lists what was looked for), damaged, or fits no other, or the
            budget is too small.
    """
    places = locate.find_model(name_or_folder, t5=t5, clip=clip, vae=vae)
    t5_words = locate.find_tokenizer(T5, places, t5_tokenizer)
    clip_words = ClipTokenizer.from_path(locate.find_tokenizer(CLIP, places, clip_tokenizer))
    files = {part: open_weights(path) for part, path in places.parts.items()}
    device = torch.device("cpu" if device is None else device)
    placing = _Placing(dtype=dtype, device=device, budget=budget)
    transformer = placing.transformer(TRANSFORMER, files[TRANSFORMER])
    few_step = None
    if places.few_step is not None:
        files[FEW_STEP] = open_weights(places.few_step)
        few_step = placing.transformer(FEW_STEP, files[FEW_STEP])
    if few_step is not None and few_step.params != transformer.params:
        raise ValueError(
            f"{places.few_step}: the distilled transformer has other sizes than {files[TRANSFORMER].path}."
        )
    autoencoder = load_autoencoder(
        files[AUTOENCODER], dtype=placing.compute(files[AUTOENCODER]), device=device
    )
    t5_encoder = placing.text_encoder(files[T5], load_t5)
    clip_encoder = placing.text_encoder(files[CLIP], partial(load_clip, eos_token_id=clip_words.eos_id))
    preset = infer_preset(
        places.name,
        transformer=transformer.params,
        autoencoder=autoencoder.params,
        t5=t5_encoder.params,
        clip=clip_encoder.params,
        text_length=text_length,
    )
    t5_words = T5Tokenizer.from_path(t5_words, max_length=preset.text_length)
    for words, encoder, part in ((t5_words, t5_encoder, T5), (clip_words, clip_encoder, CLIP)):
        if words.vocab_size > encoder.params.vocab_size:
            raise ValueError(
                f"{files[part].path}: the encoder knows {encoder.params.vocab_size:,} tokens and its tokenizer has "
                f"{words.vocab_size:,}: they do not belong together."
            )
    logger.info(
        "loaded %s: %s", places.name, ", ".join(f"{part} {file.path}" for part, file in files.items())
    )
    return KontextModel(
        transformer=transformer,
        autoencoder=autoencoder,
        t5=t5_encoder,
        clip=clip_encoder,
        t5_tokenizer=t5_words,
        clip_tokenizer=clip_words,
        preset=preset,
        name=places.name,
        few_step=few_step,
        device=device,
        budget=budget,
        files=files,
        plans=placing.plans,
    )


@dataclass
class _Placing:
    """Loads parts to where they belong: small ones onto the device, of large ones what the budget holds."""

    dtype: torch.dtype | None
    device: torch.device
    budget: int | None
    plans: dict[str, offload.Plan] = field(default_factory=dict)

    def transformer(self, name: str, file: WeightFile) -> Flux:
        if self.budget is None and _nbytes(file) < offload.SMALL:
            return load_transformer(file, dtype=self.compute(file), device=self.device)
        part = open_part(file, TRANSFORMER)
        module = build(part, dtype=self.compute(file), operations=PackedOperations)
        self.plans[name] = offload.attach(module, file.maps, device=self.device, budget=self.budget)
        return module

    def text_encoder(self, file: WeightFile, load: Callable[..., nn.Module]) -> nn.Module:
        if _nbytes(file) < offload.SMALL:
            return load(file, dtype=self.compute(file), device=self.device)
        module = load(file, dtype=self.compute(file))
        offload.release_text_encoder(module, file.maps)
        return module

    def compute(self, file: WeightFile) -> torch.dtype | None:
        """The dtype asked for; else what the device is fast at where that is not what most of the file has."""
        if self.dtype is not None:
            return self.dtype
        counts: Counter[str] = Counter()
        for stored in file.tensors.values():
            counts[stored.dtype] += stored.numel
        usual = PLAIN_DTYPES.get(counts.most_common(1)[0][0], PACKED_DTYPE)
        fast = fast_dtype(self.device, usual)
        return None if fast == usual else fast


def _nbytes(file: WeightFile) -> int:
    return sum(stored.nbytes for stored in file.tensors.values())
