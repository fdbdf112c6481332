"""Files of the host's model folders, and of the bundled model, as the host's MODEL, CLIP and VAE.

With the other host*.py files of this folder this is the only place that touches `comfy` and `folder_paths`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import comfy.cli_args
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import folder_paths
import torch

from ..kontext_core import preview
from ..kontext_core.devices import fast_dtype
from ..kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer
from ..kontext_core.presets import KONTEXT_DEV, KONTEXT_TINY
from ..kontext_core.weights import load as weights
from ..kontext_core.weights import locate
from ..kontext_core.weights.formats import T5, TRANSFORMER
from ..kontext_core.weights.load import PACKED_DTYPE, build
from ..kontext_core.weights.locate import FEW_STEP_WORDS
from ..kontext_core.weights.offload import SMALL
from ..kontext_core.weights.packed import PackedOperations
from ..kontext_core.weights.parts import open_part
from . import host_clip, host_layers, host_model, host_vae

logger = logging.getLogger("kontext")

BUNDLED = "kontext-tiny (bundled)"
BUNDLED_FEW_STEP = "kontext-tiny few-step (bundled)"
BUNDLED_FOLDER = locate.BUNDLED["kontext-tiny"]
BUNDLED_LORAS = Path(__file__).resolve().parents[1] / "workflows" / "loras"  # for the bundled model
SUFFIXES = (".safetensors", ".sft")
INDEX = ".safetensors.index.json"  # of a model in shards, as diffusers' folders have it
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
DTYPES = {"default": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUPPORTED = [torch.bfloat16, torch.float16, torch.float32]
LORAS = "kontext loras"  # attachment of a MODEL or CLIP: the `LoadedLora`s that Kontext Load LoRA put on it
TURBO = re.compile(r"turbo|hyper|lightning|schnell|few.?step|(?<!\d)\d{1,2}.?steps?(?![a-z])", re.IGNORECASE)
# Where a CPU computes in float32, weights that are smaller than this then are cast once, not in every step.
CAST_BELOW = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What our nodes know of a MODEL that ours loaded; it hangs on the host's model as `kontext`.

    Attributes:
        few_step: the distilled transformer that belongs to this one.
    """

    name: str
    distilled: bool
    few_step: Path | None


@dataclass(frozen=True, kw_only=True)
class LoadedLora:
    """A LoRA that Kontext Load LoRA put on a MODEL or CLIP; `for_text` when it has layers for the text encoders."""

    path: Path
    strength: float
    for_text: bool


def list_models(kind: str) -> list[str]:
    """The bundled model first, then the host's files of a folder such as "diffusion_models"."""
    names = [BUNDLED]
    if kind == "diffusion_models" and find_few_step(BUNDLED_FOLDER) is not None:
        names.append(BUNDLED_FEW_STEP)
    files = [name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(SUFFIXES)]
    if kind not in ("diffusion_models", "text_encoders"):
        return names + files
    gguf, indices = _list_others(kind)
    # Of a model in shards its index is the one entry.
    sharded = {index.removesuffix(INDEX) for index in indices}
    whole = [name for name in files if SHARD.sub("", name) not in sharded or not SHARD.search(name)]
    return names + whole + indices + gguf


def _list_others(kind: str) -> tuple[list[str], list[str]]:
    """GGUF files, and indices of shards, of the host's folders, which it leaves out of its own lists."""
    found: set[str] = set()
    for folder in folder_paths.get_folder_paths(kind):
        if os.path.isdir(folder):
            found.update(folder_paths.recursive_search(folder, excluded_dir_names=[".git"])[0])
    return tuple(sorted(name for name in found if name.lower().endswith(end)) for end in (".gguf", INDEX))


def find_few_step(folder: Path) -> Path | None:
    """The distilled transformer of a model folder."""
    return next((file for file in sorted(folder.glob("*.safetensors")) if is_few_step(file)), None)


def is_few_step(file: Path) -> bool:
    return any(word in file.name.lower() for word in FEW_STEP_WORDS)


def find_file(kind: str, name: str) -> Path:
    """Path of what `list_models` named; for the bundled model that of its part.

    Raises:
        ValueError: it is not there any more.
    """
    if name == BUNDLED:
        parts = {
            "diffusion_models": "flux1-kontext-tiny.safetensors",
            "vae": "ae.safetensors",
            "text_encoders": "text_encoder_2",
        }
        return BUNDLED_FOLDER / parts[kind]
    if name == BUNDLED_FEW_STEP:
        return find_few_step(BUNDLED_FOLDER)
    if kind == "loras" and name.endswith(" (bundled)"):
        return BUNDLED_LORAS / f"{name.removesuffix(' (bundled)')}.safetensors"
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(kind))
        raise ValueError(f"there is no {name!r} in {folders}: put the file there, then refresh the list")
    return Path(path)


def fingerprint(kind: str, name: str) -> str:
    """Changes when the file behind a name does, or one of its shards, so that the host loads it again.

    A digest, because the host writes it into the metadata of saved pictures, where a path is nobody's business.
    """
    path = find_file(kind, name)
    files = [path]
    if path.is_dir() or path.name.endswith(INDEX):
        files += sorted((path if path.is_dir() else path.parent).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        status = os.stat(file)
        digest.update(f"{file}\n{status.st_mtime_ns}\n{status.st_size}\n".encode())
    return digest.hexdigest()[:16]


def load_model(name: str, weight_dtype: str = "default"):
    """MODEL of a name that `list_models("diffusion_models")` gives."""
    path = find_file("diffusion_models", name)
    return load_model_file(path, DTYPES[weight_dtype], name)


def load_model_file(path: Path, dtype: torch.dtype | None, name: str):
    """A ModelPatcher over the host's own FLUX model class with our transformer inside."""
    management = comfy.model_management
    part = open_part(path, TRANSFORMER)
    # Packed weights (fp8 with scales, GGUF) stay so unless a dtype is asked for.
    packed = dtype is None and any(part.is_packed(key) for key in part.shapes)
    core = build(part, dtype=dtype, operations=PackedOperations if packed else torch.nn)
    stored = core.compute_dtype
    count = sum(math.prod(shape) for shape in part.shapes.values())
    device = management.get_torch_device()
    if management.is_device_cpu(device) and not _dtype_is_asked_for():
        computed = fast_dtype(device, PACKED_DTYPE if packed else stored)
    elif dtype is not None:
        computed = management.unet_manual_cast(stored, device, SUPPORTED) or stored
    else:
        computed = management.unet_dtype(model_params=count, supported_dtypes=SUPPORTED, weight_dtype=stored)
    narrower = computed.itemsize < stored.itemsize
    small = management.is_device_cpu(device) and count * computed.itemsize < CAST_BELOW
    if packed:  # what is not packed is little
        core, stored = build(part, dtype=computed, operations=PackedOperations), computed
    elif computed != stored and (narrower or small):
        core, stored = core.to(computed), computed

    config = comfy.supported_models.Flux(host_model.unet_config(core.params))
    config.set_inference_dtype(stored, None if computed == stored else computed)
    config.latent_format = latent_format(path.parent)
    config.memory_usage_factor *= core.params.hidden_size / 3072  # the host's number is the published width's
    meta = torch.device("meta")
    model = host_layers.SavableFlux(config, device=meta, unet_model=host_model.HostTransformer)
    host_layers.move_weights(core, model.diffusion_model, part.file.maps if part.nbytes >= SMALL else ())
    offload = management.unet_offload_device()
    if not management.is_device_cpu(offload):
        model.to(offload)
    model.device = offload
    model.kontext = ModelInfo(
        name=name,
        distilled=is_few_step(path),
        few_step=find_few_step(path.parent) if path.parent == BUNDLED_FOLDER else None,
    )
    patcher = comfy.model_patcher.ModelPatcher
    if not packed:  # a newer host's own way of loading knows its own kinds of packed weights only
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", patcher)
    size = host_layers.loaded_bytes(model)
    result = patcher(model, load_device=device, offload_device=offload, size=size)
    host_layers.watch(result)
    model.diffusion_model.steps.watch(result)
    return result


def _dtype_is_asked_for() -> bool:
    """Whether the host was started with a dtype for diffusion models; else it takes float32 on every CPU."""
    asked = ("force_fp32", "force_fp16", "fp32_unet", "fp64_unet", "bf16_unet", "fp16_unet")
    return any(getattr(comfy.cli_args.args, name, False) for name in asked)


def latent_format(folder: Path) -> comfy.latent_formats.Flux:
    """FLUX's latents; those of the bundled model previewed in the colours of its own autoencoder."""
    result = comfy.latent_formats.Flux()
    file = folder / preview.FILE
    if folder == BUNDLED_FOLDER and file.is_file():
        factors = json.loads(file.read_text(encoding="utf-8"))
        result.latent_rgb_factors = factors["latent_rgb_factors"]
        result.latent_rgb_factors_bias = factors["latent_rgb_factors_bias"]
        result.taesd_decoder_name = None  # a preview decoder for the published autoencoder cannot read these
    return result


def few_step_model(model):
    """The distilled model that belongs to a MODEL, or the MODEL itself if it can be taken for distilled.

    A LoRA makes a model distilled when its file's name says so, as turbo LoRAs' do. On a model that brings a
    distilled one any other LoRA goes onto that; on a model without one every LoRA is taken for a turbo LoRA, since
    ComfyUI's own loader leaves no name.

    Raises:
        ValueError: the model is not distilled, has no LoRA that might make it so, and brings no distilled one.
    """
    info = getattr(model.model, "kontext", None)
    turbo = any(TURBO.search(lora.path.name) for lora in model.get_attachment(LORAS) or ())
    if info is None or info.distilled or turbo:
        return model
    if info.few_step is not None:
        return _like(model, load_model_file(info.few_step, None, info.name))
    if model.patches:
        return model
    raise ValueError(
        f"few_step needs a distilled model, and {info.name} is not one: switch few_step off, load a distilled "
        "model, or add a turbo LoRA"
    )


def _like(model, other):
    """`other`, a MODEL of the same layers, with the LoRAs, wrappers and options that are on `model`."""
    clone = model.clone()
    other.patches, other.patches_uuid = clone.patches, clone.patches_uuid
    other.model_options, other.object_patches = clone.model_options, clone.object_patches
    other.wrappers, other.attachments = clone.wrappers, clone.attachments
    return other


def load_clip(t5_name: str, clip_name: str):
    """CLIP of two names that `list_models("text_encoders")` gives.

    Raises:
        ValueError: one of the bundled and one of the host's, or a file that is no such text encoder.
    """
    if (t5_name == BUNDLED) != (clip_name == BUNDLED):
        raise ValueError(f"t5 is {t5_name!r} and clip {clip_name!r}: take both bundled, or both from files")
    if t5_name == BUNDLED:
        t5_path, clip_path = BUNDLED_FOLDER / "text_encoder_2", BUNDLED_FOLDER / "text_encoder"
        tokenizers = BUNDLED_FOLDER / "tokenizer_2", BUNDLED_FOLDER / "tokenizer"
    else:
        t5_path, clip_path = find_file("text_encoders", t5_name), find_file("text_encoders", clip_name)
        tokenizers = tokenizer_folders(t5_path, clip_path)
    words = ClipTokenizer.from_path(tokenizers[1])
    t5 = build(open_part(t5_path, T5))
    clip = weights.load_clip(clip_path, eos_token_id=words.eos_id)
    tokenizer = host_clip.HostTokenizer(words, T5Tokenizer.from_path(tokenizers[0]), t5_name)
    host_clip.check_tokenizer(tokenizer, t5, clip)
    return host_clip.make_clip(t5, clip, tokenizer)


def tokenizer_folders(t5_path: Path, clip_path: Path) -> tuple[Path, Path]:
    """(T5's, CLIP's) tokenizer folders: beside the weights in a model folder, else the host's own."""
    import comfy.sd1_clip
    import comfy.text_encoders.flux

    t5 = Path(comfy.text_encoders.flux.__file__).parent / "t5_tokenizer"
    clip = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
    beside = [folder / "tokenizer_2" for folder in (t5_path.parent, t5_path.parent.parent)]
    t5 = next((folder for folder in beside if (folder / "tokenizer.json").is_file()), t5)
    beside = [folder / "tokenizer" for folder in (clip_path.parent, clip_path.parent.parent)]
    kinds = (("vocab.json", "merges.txt"), ("tokenizer.json",))
    found = (f for f in beside if any(all((f / name).is_file() for name in kind) for kind in kinds))
    return t5, next(found, clip)


def load_vae(name: str) -> host_vae.HostVAE:
    """VAE of a name that `list_models("vae")` gives."""
    core = weights.load_autoencoder(find_file("vae", name))
    small = 2 * core.params.ch < KONTEXT_DEV.autoencoder.ch
    return host_vae.HostVAE(core, (KONTEXT_TINY if small else KONTEXT_DEV).max_area)


def preferred_area(vae) -> int:
    """Pixels that the model behind a VAE prefers; FLUX.1 Kontext's for a VAE that is not ours."""
    return getattr(vae, "kontext_area", KONTEXT_DEV.max_area)
