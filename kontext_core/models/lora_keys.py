"""Which weight of ours a LoRA tensor's name means, in every naming scheme that FLUX LoRAs come in.

A name is prefix + layer + role, as in `lora_unet_` + `double_blocks_0_img_attn_qkv` + `.lora_down.weight`.
Dots and underscores are made the same, block numbers are cut out, and the layer is looked up in one table for
each part; so a scheme is no more than its prefixes. Where a scheme keeps q, k and v apart, the layer is some
rows of ours.

Source: huggingface/diffusers `loaders/lora_conversion_utils.py`; Comfy-Org/ComfyUI `comfy/lora.py`,
`comfy/lora_convert.py`; kohya-ss/sd-scripts `networks/lora_flux.py`; KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["transformer", "t5", "clip"]
Rows = Literal["all", "q", "k", "v", "qkv", "mlp"]

PART_NAMES: dict[str, str] = {
    "transformer": "the FLUX transformer",
    "t5": "the T5 text encoder",
    "clip": "the CLIP text encoder",
}

_ROLES = {
    "down": (
        ".lora_down.weight",
        ".lora_A.weight",
        ".lora_A.default.weight",
        ".lora_A",
        ".lora.down.weight",
        ".lora_linear_layer.down.weight",
    ),
    "up": (
        ".lora_up.weight",
        ".lora_B.weight",
        ".lora_B.default.weight",
        ".lora_B",
        ".lora.up.weight",
        ".lora_linear_layer.up.weight",
    ),
    "alpha": (".alpha",),
    "dora": (
        ".dora_scale",
        ".lora_magnitude_vector",
        ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector.default.weight",
    ),
    "up_bias": (".lora_B.bias", ".lora_B.default.bias", ".lora_up.bias"),
    "diff": (".diff", ".w_norm"),
    "diff_b": (".diff_b", ".b_norm"),
    "set": (".set_weight",),
    **{name: (f".{name}",) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{
        name: (f".{name}",)
        for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    },
}
_ROLE_OF = {suffix: role for role, suffixes in _ROLES.items() for suffix in suffixes}
# Longest first: ".lora_A.weight" before a name that merely ends the same way.
_SUFFIXES = sorted(_ROLE_OF, key=len, reverse=True)

UNSUPPORTED = {
    ".lora_mid.weight": "a convolution's middle weight; FLUX has no convolutions in its transformer",
    ".hada_t1": "a Tucker factor for convolutions",
    ".hada_t2": "a Tucker factor for convolutions",
    ".lokr_t2": "a Tucker factor for convolutions",
    ".oft_blocks": "the OFT algorithm, which is not supported",
    ".oft_R.weight": "the OFT algorithm, which is not supported",
    ".a1.weight": "the GLoRA algorithm, which is not supported",
    ".a2.weight": "the GLoRA algorithm, which is not supported",
    ".b1.weight": "the GLoRA algorithm, which is not supported",
    ".b2.weight": "the GLoRA algorithm, which is not supported",
    ".on_input": "the (IA)^3 algorithm, which is not supported",
    ".reshape_weight": "a wider input layer, which Kontext does not have",
}

# XLabs names the adapter of each attention processor instead of the layer that it changes.
_XLABS = re.compile(
    r"(?P<layer>.*blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?)\.(?P<role>down|up)\.weight$"
)


@dataclass(frozen=True)
class Target:
    """A layer of ours: `rows` of `module`'s weight; `swap_halves` if the scheme has its two halves
    swapped."""

    part: Part
    module: str
    rows: Rows = "all"
    swap_halves: bool = False

    @property
    def parameter(self) -> str:
        """The weight's own name: the QK norms call theirs `scale`."""
        return "scale" if self.part == "transformer" and self.module.endswith("_norm") else "weight"

    def row_range(self, out: int, hidden: int | None) -> tuple[int, int] | None:
        """First row and number of rows in our fused layer, for a change of `out` rows.

        Args:
            out: rows of the change.
            hidden: the transformer's width, which is the layer's input size.
        """
        if self.rows == "all":
            return None
        if self.rows == "mlp":
            if hidden is None:
                raise ValueError(f"{self.module}: the rows after q, k and v begin at 3 x the unknown width.")
            return 3 * hidden, out
        return {"qkv": 0, "q": 0, "k": 1, "v": 2}[self.rows] * out, out


def _transformer_table() -> dict[str, Target]:
    """Canonical layer name (underscores, `#` for block numbers) -> target, in all schemes at once."""
    double, single = "double_blocks.#.", "single_blocks.#."
    table: dict[str, Target] = {}

    def add(name: str, module: str, rows: Rows = "all", swap_halves: bool = False) -> None:
        table[name.replace(".", "_")] = Target("transformer", module, rows, swap_halves)

    embedders = {
        "time_in": "timestep_embedder",
        "vector_in": "text_embedder",
        "guidance_in": "guidance_embedder",
    }
    for ours, theirs in embedders.items():
        for index, layer in enumerate(("in_layer", "out_layer"), start=1):
            add(f"{ours}.{layer}", f"{ours}.{layer}")
            add(f"time_text_embed.{theirs}.linear_{index}", f"{ours}.{layer}")
    for ours, theirs in {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
    }.items():
        add(ours, ours)
        add(theirs, ours)
    add("final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1")
    add("norm_out.linear", "final_layer.adaLN_modulation.1", swap_halves=True)

    block = "transformer_blocks.#."
    for stream, number in (("img", "1"), ("txt", "2")):
        layers = (
            "attn.qkv",
            "attn.proj",
            "mod.lin",
            "mlp.0",
            "mlp.2",
            "attn.norm.query_norm",
            "attn.norm.key_norm",
        )
        for layer in layers:
            add(f"{double}{stream}_{layer}", f"{double}{stream}_{layer}")
        add(f"{double}processor.qkv_lora{number}", f"{double}{stream}_attn.qkv")
        add(f"{double}processor.proj_lora{number}", f"{double}{stream}_attn.proj")
        context, added = ("", "") if stream == "img" else ("_context", "added_")
        add(f"{block}norm1{context}.linear", f"{double}{stream}_mod.lin")
        add(f"{block}ff{context}.net.0.proj", f"{double}{stream}_mlp.0")
        add(f"{block}ff{context}.net.2", f"{double}{stream}_mlp.2")
        add(f"{block}attn.norm_{added}q", f"{double}{stream}_attn.norm.query_norm")
        add(f"{block}attn.norm_{added}k", f"{double}{stream}_attn.norm.key_norm")
    for rows in ("q", "k", "v"):
        add(f"{block}attn.to_{rows}", f"{double}img_attn.qkv", rows)
        add(f"{block}attn.add_{rows}_proj", f"{double}txt_attn.qkv", rows)
    add(f"{block}attn.to_out.0", f"{double}img_attn.proj")
    add(f"{block}attn.to_out", f"{double}img_attn.proj")
    add(f"{block}attn.to_add_out", f"{double}txt_attn.proj")

    block = "single_transformer_blocks.#."
    for layer in ("linear1", "linear2", "modulation.lin", "norm.query_norm", "norm.key_norm"):
        add(f"{single}{layer}", f"{single}{layer}")
    add(f"{single}linear1_qkv", f"{single}linear1", "qkv")
    add(f"{single}processor.qkv_lora", f"{single}linear1", "qkv")
    add(f"{single}processor.proj_lora", f"{single}linear2")
    for rows in ("q", "k", "v"):
        add(f"{block}attn.to_{rows}", f"{single}linear1", rows)
    add(f"{block}proj_mlp", f"{single}linear1", "mlp")
    add(f"{block}proj_out", f"{single}linear2")
    add(f"{block}norm.linear", f"{single}modulation.lin")
    add(f"{block}attn.norm_q", f"{single}norm.query_norm")
    add(f"{block}attn.norm_k", f"{single}norm.key_norm")
    return table


def _clip_table() -> dict[str, Target]:
    layers = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    ]
    names = [f"encoder.layers.#.{layer}" for layer in (*layers, "layer_norm1", "layer_norm2")]
    names += ["embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"]
    targets = {name: Target("clip", f"text_model.{name}") for name in names}
    # transformers 5 dropped `text_model.` in memory, and some trainers save what is in memory.
    return {
        f"{prefix}{name}".replace(".", "_"): target
        for name, target in targets.items()
        for prefix in ("text_model.", "")
    }


def _t5_table() -> dict[str, Target]:
    attention = [f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o", "relative_attention_bias")]
    feed_forward = [f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
    inside = [*attention, *feed_forward, "layer.0.layer_norm", "layer.1.layer_norm"]
    names = [*(f"encoder.block.#.{name}" for name in inside), "encoder.final_layer_norm", "shared"]
    return {name.replace(".", "_"): Target("t5", name) for name in names}


_TABLES: dict[str, dict[str, Target]] = {
    "transformer": _transformer_table(),
    "clip": _clip_table(),
    "t5": _t5_table(),
}

# Prefixes, dots as underscores, and the part they speak of. `te2` is CLIP-G in SDXL files and T5 in FLUX
# ones: the layer's name tells which, and CLIP-G's must not land in CLIP-L.
_PREFIXES: dict[str, Part] = {
    "lora_unet_": "transformer",
    "lora_transformer_": "transformer",
    "lycoris_": "transformer",
    "model_diffusion_model_": "transformer",
    "diffusion_model_": "transformer",
    "base_model_model_": "transformer",
    "transformer_": "transformer",
    "unet_": "transformer",
    "lora_te1_": "clip",
    "lora_te_": "clip",
    "text_encoder_": "clip",
    "text_encoders_clip_l_transformer_": "clip",
    "clip_l_transformer_": "clip",
    "lora_te2_": "t5",
    "lora_te3_": "t5",
    "text_encoder_2_": "t5",
    "text_encoders_t5xxl_transformer_": "t5",
    "t5xxl_transformer_": "t5",
}
_LONGEST_FIRST = sorted(_PREFIXES, key=len, reverse=True)

_NUMBER = re.compile(r"(blocks?|layers)_(\d+)_")


def split_key(key: str) -> tuple[str, str] | None:
    """A tensor's name as (layer, role); None if it has the end of no LoRA tensor."""
    xlabs = _XLABS.match(key)
    if xlabs:
        return xlabs["layer"], xlabs["role"]
    for suffix in _SUFFIXES:
        if key.endswith(suffix):
            return key[: -len(suffix)], _ROLE_OF[suffix]
    if key.endswith(("query_norm.scale", "key_norm.scale")):
        return key.removesuffix(".scale"), "set"
    return None


def unsupported_reason(key: str) -> str | None:
    """Why a tensor of a known but unsupported kind is left out."""
    return next((reason for suffix, reason in UNSUPPORTED.items() if key.endswith(suffix)), None)


def find_target(layer: str) -> Target | None:
    """The layer of ours that a LoRA's layer name means; None if there is none."""
    name = layer.replace(".", "_")
    parts: tuple[str, ...] = ("transformer", "clip", "t5")
    while True:
        match = _NUMBER.search(name)
        plain = _NUMBER.sub(r"\1_#_", name, count=1) if match else name
        for part in parts:
            target = _TABLES[part].get(plain)
            if target is not None:
                module = target.module.replace("#", match[2]) if match else target.module
                return Target(target.part, module, target.rows, target.swap_halves)
        prefix = next((prefix for prefix in _LONGEST_FIRST if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name, parts = name[len(prefix) :], (_PREFIXES[prefix],)


def scheme(key: str) -> str:
    """The naming scheme of a tensor or layer that `find_target` knows."""
    if ".processor." in key and "_lora" in key:
        return "XLabs"
    if key.startswith("lora_transformer_"):
        return "OneTrainer"
    if key.startswith(("lora_unet_", "lora_te")):
        return "kohya"
    if key.startswith("lycoris_"):
        return "LyCORIS"
    if key.startswith("base_model.model."):
        return "fal Kontext"
    if key.startswith(("diffusion_model.", "text_encoders.")):
        return "ai-toolkit / ComfyUI"
    if key.startswith(("transformer.", "text_encoder.", "text_encoder_2.")):
        return "diffusers"
    if key.startswith(("transformer_blocks.", "single_transformer_blocks.", "time_text_embed.", "norm_out.")):
        return "diffusers"
    if key.startswith(
        ("x_embedder", "context_embedder", "proj_out", "text_model.", "encoder.", "embeddings.")
    ):
        return "diffusers"
    return "BFL"
