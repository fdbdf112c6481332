"""What is this file? Decided by the names, shapes and dtypes in it, never by its name.

`find_parts` says which parts of FLUX lie in a file and under which prefix; `refusal` says why a file that is
recognised cannot be used; `quantisation` names how its weights are packed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from .files import WeightFile
from .ggml_types import FLOATS

TRANSFORMER, AUTOENCODER, T5, CLIP = "transformer", "autoencoder", "t5", "clip"

PART_NAMES = {
    TRANSFORMER: "a FLUX transformer",
    AUTOENCODER: "a FLUX autoencoder (VAE)",
    T5: "a T5 text encoder",
    CLIP: "a CLIP text encoder",
}

LAYOUT_NAMES = {
    "bfl": "black-forest-labs names",
    "diffusers": "diffusers names",
    "transformers": "transformers names",
    "llama.cpp": "llama.cpp names",
}


@dataclass(frozen=True)
class Found:
    """A part in a file: what it is, whose names it uses, and what stands before them."""

    part: str
    layout: str
    prefix: str


# (part, layout, keys that must be there). The first key finds the prefix.
SIGNATURES = (
    (TRANSFORMER, "bfl", ("double_blocks.0.img_attn.qkv.weight", "img_in.weight")),
    (TRANSFORMER, "diffusers", ("transformer_blocks.0.attn.add_q_proj.weight", "x_embedder.weight",
                                "single_transformer_blocks.0.proj_mlp.weight")),
    (AUTOENCODER, "bfl", ("encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight")),
    (AUTOENCODER, "diffusers", ("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight")),
    (T5, "transformers", ("encoder.block.0.layer.0.SelfAttention.q.weight",)),
    (T5, "llama.cpp", ("enc.blk.0.attn_q.weight",)),
    (CLIP, "transformers", ("text_model.encoder.layers.0.self_attn.q_proj.weight",)),
)  # fmt: skip

# Other models whose files lie in the same folders: (a key's end, what it is). Only for a better message.
OTHER_MODELS = (
    ("double_stream_modulation_img.lin.weight", "FLUX.2"),
    ("distilled_guidance_layer.in_proj.weight", "Chroma"),
    ("joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
    ("input_blocks.0.0.weight", "Stable Diffusion 1, 2 or XL"),
    ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
    ("blocks.0.cross_attn.k_img.weight", "Wan"),
    ("blocks.0.self_attn.q.weight", "Wan"),
    ("controlnet_blocks.0.weight", "a ControlNet"),
    ("redux_up.weight", "FLUX Redux"),
    ("text_model.encoder.layers.31.mlp.fc1.weight", "CLIP-G (FLUX uses CLIP-L)"),
    ("vision_model.embeddings.patch_embedding.weight", "a CLIP vision model"),
    ("model.layers.0.self_attn.q_proj.weight", "a language model"),
    ("blk.0.attn_q.weight", "a language model"),
)

LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora_A", "lora_a.weight", "_lora1.", "_lora2.",
              ".hada_w1_", ".lokr_w", ".oft_", ".boft", ".glora", ".dora_scale", "lora.down.", "lora.up.",
              ".lora_linear_layer.")  # fmt: skip

# Names that scaled files add to a layer's own.
SCALE_NAMES = {
    "scale_weight": "weight",
    "weight_scale": "weight",
    "scale_input": "input",
    "input_scale": "input",
}
MARKERS = ("scaled_fp8", "comfy_quant")


def find_parts(file: WeightFile) -> list[Found]:
    """The parts of FLUX in a file; several in an all-in-one checkpoint, none in a stranger's file."""
    found: list[Found] = []
    for part, layout, (first, *others) in SIGNATURES:
        for key in file.tensors:
            if not key.endswith(first):
                continue
            prefix = key[: len(key) - len(first)]
            inside_a_name = prefix and not prefix.endswith(".")
            if not inside_a_name and all(prefix + other in file.tensors for other in others):
                found.append(Found(part, layout, prefix))
    return found


def is_lora(file: WeightFile) -> bool:
    """Whether the file holds changes to a model's weights and not weights."""
    return any(mark in key for key in file.tensors for mark in LORA_MARKS)


def refusal(file: WeightFile) -> str | None:
    """Why a recognised file cannot be used, as a sentence; None if nothing speaks against it."""
    keys = file.tensors.keys()
    if any(key.endswith((".wscales", ".smooth_factor", ".smooth_factor_orig")) for key in keys):
        return (
            "a Nunchaku SVDQuant file: its 4-bit weights run only in the kernels of the nunchaku package, on an "
            "NVIDIA GPU. Use ComfyUI-nunchaku for it, or get this model as bf16, fp8 or GGUF."
        )
    if any("bitsandbytes__" in key for key in keys):
        return (
            "a bitsandbytes file (NF4 or FP4): it needs the bitsandbytes package and an NVIDIA GPU. "
            "Get this model as bf16, fp8 or GGUF (Q4_K_S is as small)."
        )
    for layer, quant in layer_formats(file).items():
        if quant not in ("float8_e4m3fn", "float8_e5m2"):
            return (
                f"a ComfyUI file quantised as {quant} ({layer[:60]}): only float8 layers can be read here. "
                "Get this model as bf16, fp8 or GGUF."
            )
    return None


def layer_formats(file: WeightFile) -> dict[str, str]:
    """Layer -> format, of ComfyUI's newer quantised files: from the header or from `comfy_quant` tensors.

    Raises:
        ValueError: the header's table or a tensor's text is not what ComfyUI writes.
    """
    formats: dict[str, str] = {}
    text = file.metadata.get("_quantization_metadata")
    tables: list[tuple[str, object]] = []
    try:
        if text is not None:
            layers = json.loads(text)["layers"]
            tables.extend(layers.items())
        for key, stored in file.tensors.items():
            if key.endswith(".comfy_quant"):
                if stored.nbytes > 4096:
                    raise ValueError(f"{key} has {stored.nbytes:,} bytes")
                tables.append((key.removesuffix(".comfy_quant"), json.loads(bytes(file.read(key).tolist()))))
        for layer, entry in tables:
            formats[layer] = str(entry["format"])
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file.path}: its quantisation table cannot be read ({type(error).__name__})."
        ) from error
    return formats


def is_auxiliary(key: str) -> bool:
    """Whether a key belongs to the packing and not to the model."""
    last = key.rpartition(".")[2]
    return last in SCALE_NAMES or last in MARKERS


def quantisation(file: WeightFile, found: Found) -> str:
    """How a part's weights are packed, in a few words; "none" for plain floats."""
    weights = {
        key: stored
        for key, stored in file.tensors.items()
        if key.startswith(found.prefix) and not is_auxiliary(key)
    }
    if file.container == "gguf":
        counts: Counter[str] = Counter()
        for stored in weights.values():
            if stored.dtype not in FLOATS:
                counts[stored.dtype] += stored.numel
        if not counts:
            return "none"
        return "GGUF " + " + ".join(kind for kind, _ in counts.most_common())
    has_fp8 = any(stored.dtype in ("F8_E4M3", "F8_E5M2") for stored in weights.values())
    auxiliary = {
        key[len(found.prefix) :].rpartition(".")[2] for key in file.tensors if key.startswith(found.prefix)
    }
    if "scaled_fp8" in auxiliary or "scale_weight" in auxiliary:
        return "ComfyUI fp8 scaled, old (scaled_fp8, scale_weight)"
    if "comfy_quant" in auxiliary or "_quantization_metadata" in file.metadata or "weight_scale" in auxiliary:
        return "ComfyUI fp8 scaled, new (weight_scale)"
    return "plain fp8" if has_fp8 else "none"


def stranger(file: WeightFile) -> str:
    """What a file without any part of FLUX seems to be, for an error."""
    if not file.tensors:
        return "it holds no tensors"
    for end, name in OTHER_MODELS:
        if any(key.endswith(end) for key in file.tensors):
            return f"it looks like {name}"
    first = ", ".join(key[:60] for key in list(file.tensors)[:3])
    return f"its {len(file.tensors):,} keys are those of no part of FLUX (the first are {first})"
