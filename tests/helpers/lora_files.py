"""LoRA files of every format in the making, each with the weights that it should lead to.

The networks are of the published depth and very narrow. Weights stand under ComfyUI's keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import small_lora
import torch

from kontext_core.models.clip import ClipParams
from kontext_core.models.lora_apply import HOST_PREFIXES
from kontext_core.models.t5 import T5Params

# XLabs files are recognised by the published block counts; the width is free.
HIDDEN, DEPTH, DEPTH_SINGLE = small_lora.HIDDEN, 19, 38
PARAMS = replace(small_lora.PARAMS, depth=DEPTH, depth_single_blocks=DEPTH_SINGLE)
T5 = T5Params(vocab_size=10, d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=3)
CLIP = ClipParams(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    max_length=7,
    eos_token_id=9,
)
STRENGTH = 0.7

# Layers of ours, and (diffusers' name, ours, first row) where diffusers has another name for them.
OURS = [
    "double_blocks.0.img_mod.lin",
    "double_blocks.0.txt_attn.qkv",
    "double_blocks.0.txt_mlp.2",
    "double_blocks.18.img_attn.qkv",
    "double_blocks.18.img_attn.proj",
    "double_blocks.18.img_mlp.0",
    "single_blocks.0.linear1",
    "single_blocks.37.linear2",
    "single_blocks.37.modulation.lin",
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "vector_in.out_layer",
    "guidance_in.in_layer",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
]
THEIRS = [
    ("transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv", 0),
    ("transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv", HIDDEN),
    ("transformer_blocks.0.attn.to_v", "double_blocks.0.img_attn.qkv", 2 * HIDDEN),
    ("transformer_blocks.18.attn.add_q_proj", "double_blocks.18.txt_attn.qkv", 0),
    ("transformer_blocks.18.attn.add_v_proj", "double_blocks.18.txt_attn.qkv", 2 * HIDDEN),
    ("transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj", None),
    ("transformer_blocks.0.attn.to_add_out", "double_blocks.0.txt_attn.proj", None),
    ("transformer_blocks.0.ff.net.0.proj", "double_blocks.0.img_mlp.0", None),
    ("transformer_blocks.0.ff.net.2", "double_blocks.0.img_mlp.2", None),
    ("transformer_blocks.0.ff_context.net.0.proj", "double_blocks.0.txt_mlp.0", None),
    ("transformer_blocks.3.norm1.linear", "double_blocks.3.img_mod.lin", None),
    ("transformer_blocks.3.norm1_context.linear", "double_blocks.3.txt_mod.lin", None),
    ("single_transformer_blocks.37.attn.to_q", "single_blocks.37.linear1", 0),
    ("single_transformer_blocks.37.attn.to_k", "single_blocks.37.linear1", HIDDEN),
    ("single_transformer_blocks.37.attn.to_v", "single_blocks.37.linear1", 2 * HIDDEN),
    ("single_transformer_blocks.37.proj_mlp", "single_blocks.37.linear1", 3 * HIDDEN),
    ("single_transformer_blocks.37.proj_out", "single_blocks.37.linear2", None),
    ("single_transformer_blocks.2.norm.linear", "single_blocks.2.modulation.lin", None),
    ("x_embedder", "img_in", None),
    ("context_embedder", "txt_in", None),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer", None),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer", None),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer", None),
    ("proj_out", "final_layer.linear", None),
]
TEXT = {
    "clip": ("text_model.encoder.layers.1.mlp.fc1", "text_model.encoder.layers.0.self_attn.q_proj"),
    "t5": ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo"),
}


class File:
    """A LoRA file in the making, and beside it the weights that it should lead to."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state
        self.expected = dict(state)
        self.tensors: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, str] = {}
        self.generator = torch.Generator().manual_seed(7)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def weight(self, key: str, start: int | None, rows: int | None) -> torch.Tensor:
        """The weight, or its rows, that a layer changes."""
        weight = self.state[key]
        return weight if start is None else weight[start : start + rows]

    def expect(self, key: str, start: int | None, change: torch.Tensor) -> None:
        self.expected[key] = self.expected[key].clone()
        rows = self.expected[key] if start is None else self.expected[key][start : start + len(change)]
        rows += STRENGTH * change

    def size(self, key: str, theirs: str, start: int | None) -> tuple[int, int]:
        """(rows, columns) of the change: q, k and v are square, proj_mlp is the rest of linear1."""
        out, columns = self.state[key].shape
        if start is None:
            return out, columns
        return (out - 3 * HIDDEN if theirs.endswith("proj_mlp") else HIDDEN), columns

    def lora(
        self,
        name: str,
        key: str,
        start: int | None = None,
        *,
        style: str = "kohya",
        alpha: float | None = 2.0,
    ):
        """One LoRA of rank 3 under `name`."""
        out, columns = self.size(key, name, start)
        down, up = self.rand(3, columns), self.rand(out, 3)
        ends = {"kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B"), "xlabs": ("down", "up")}[
            style
        ]
        self.tensors[f"{name}.{ends[0]}.weight"] = down
        self.tensors[f"{name}.{ends[1]}.weight"] = up
        if alpha is not None:
            self.tensors[f"{name}.alpha"] = torch.tensor(alpha)
        change = up @ down * (1.0 if alpha is None else alpha / 3)
        self.expect(key, start, change)
        return change


def host_key(part: str, module: str) -> str:
    return f"{HOST_PREFIXES[part]}{module}.weight"


def flux(module: str) -> str:
    return host_key("transformer", module)


def kohya(file: File) -> None:
    for module in OURS:
        file.lora("lora_unet_" + module.replace(".", "_"), flux(module))
    for prefix, part in (("lora_te1_", "clip"), ("lora_te3_", "t5")):
        for module in TEXT[part]:
            file.lora(prefix + module.replace(".", "_"), host_key(part, module))


def diffusers(file: File) -> None:
    for theirs, ours, start in THEIRS:
        file.lora(f"transformer.{theirs}", flux(ours), start, style="peft", alpha=None)
    module = TEXT["clip"][0]
    file.lora(f"text_encoder.{module}", host_key("clip", module), style="peft", alpha=None)


def diffusers_final_norm(file: File) -> None:
    """diffusers' norm_out gives (scale, shift), our adaLN (shift, scale)."""
    key = flux("final_layer.adaLN_modulation.1")
    down, up = file.rand(3, HIDDEN), file.rand(2 * HIDDEN, 3)
    file.tensors |= {
        "transformer.norm_out.linear.lora_A.weight": down,
        "transformer.norm_out.linear.lora_B.weight": up,
    }
    scale, shift = up.chunk(2)
    file.expect(key, None, torch.cat((shift, scale)) @ down)


def ai_toolkit(file: File) -> None:
    for module in OURS:
        file.lora(f"diffusion_model.{module}", flux(module), style="peft", alpha=None)
    for part, module in (("clip", TEXT["clip"][1]), ("t5", TEXT["t5"][1])):
        file.lora(
            f"text_encoders.{HOST_PREFIXES[part]}{module}", host_key(part, module), style="peft", alpha=1.5
        )


def bfl(file: File) -> None:
    for module in OURS:
        file.lora(module, flux(module), style="peft", alpha=None)
    bias, norm = file.rand(HIDDEN * 3), file.rand(HIDDEN // 2)
    file.tensors["double_blocks.0.txt_attn.qkv.lora_B.bias"] = bias
    file.expect("diffusion_model.double_blocks.0.txt_attn.qkv.bias", None, bias)
    key = "double_blocks.0.img_attn.norm.query_norm.scale"
    file.tensors[key] = norm
    file.expect(f"diffusion_model.{key}", None, norm - file.state[f"diffusion_model.{key}"])


def fal(file: File) -> None:
    for module in OURS:
        file.lora(f"base_model.model.{module}", flux(module), style="peft", alpha=None)


def xlabs(file: File) -> None:
    for block in range(DEPTH):
        ours = f"double_blocks.{block}"
        for number, stream in (("1", "img"), ("2", "txt")):
            name = f"{ours}.processor."
            file.lora(f"{name}qkv_lora{number}", flux(f"{ours}.{stream}_attn.qkv"), style="xlabs", alpha=None)
            file.lora(
                f"{name}proj_lora{number}", flux(f"{ours}.{stream}_attn.proj"), style="xlabs", alpha=None
            )
    for block in range(DEPTH_SINGLE):
        ours = f"single_blocks.{block}"
        down, up = file.rand(3, HIDDEN), file.rand(3 * HIDDEN, 3)
        file.tensors |= {
            f"{ours}.processor.qkv_lora.{end}.weight": t for end, t in (("down", down), ("up", up))
        }
        file.expect(flux(f"{ours}.linear1"), 0, up @ down)
        file.lora(f"{ours}.processor.proj_lora", flux(f"{ours}.linear2"), style="xlabs", alpha=None)


def onetrainer(file: File) -> None:
    for theirs, ours, start in THEIRS:
        file.lora("lora_transformer_" + theirs.replace(".", "_"), flux(ours), start)
    for prefix, part in (("lora_te1_", "clip"), ("lora_te2_", "t5")):
        for module in TEXT[part]:
            file.lora(prefix + module.replace(".", "_"), host_key(part, module))


def lycoris_lora(file: File) -> None:
    for theirs, ours, start in THEIRS:
        file.lora("lycoris_" + theirs.replace(".", "_"), flux(ours), start, alpha=0.5)


def loha(file: File) -> None:
    for theirs, ours, start in THEIRS[:8]:
        name = "lycoris_" + theirs.replace(".", "_")
        out, columns = file.size(flux(ours), theirs, start)
        w1_a, w1_b, w2_a, w2_b = (
            file.rand(out, 2),
            file.rand(2, columns),
            file.rand(out, 2),
            file.rand(2, columns),
        )
        pieces = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}
        file.tensors |= {f"{name}.{role}": tensor for role, tensor in pieces.items()}
        file.tensors[f"{name}.alpha"] = torch.tensor(3.0)
        file.expect(flux(ours), start, 3 / 2 * (w1_a @ w1_b) * (w2_a @ w2_b))


def lokr(file: File) -> None:
    """All of LoKr's forms: factors whole or decomposed; alpha counts only in the latter."""
    for index, (theirs, ours, start) in enumerate(THEIRS[:12]):
        name = "lycoris_" + theirs.replace(".", "_")
        out, columns = file.size(flux(ours), theirs, start)
        w1, w2 = file.rand(4, 2), file.rand(out // 4, columns // 2)
        scale = 1.0
        if index % 3:
            a, b = file.rand(out // 4, 2), file.rand(2, columns // 2)
            w2, scale = a @ b, 5 / 2
            file.tensors |= {f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
        else:
            file.tensors[f"{name}.lokr_w2"] = w2
        if index % 3 == 2:
            a, b = file.rand(4, 2), file.rand(2, 2)
            w1 = a @ b
            file.tensors |= {f"{name}.lokr_w1_a": a, f"{name}.lokr_w1_b": b}
        else:
            file.tensors[f"{name}.lokr_w1"] = w1
        file.tensors[f"{name}.alpha"] = torch.tensor(5.0)
        blocks = [torch.cat([w1[i, j] * w2 for j in range(2)], dim=1) for i in range(4)]
        file.expect(flux(ours), start, scale * torch.cat(blocks))


def dora(file: File, *, axis: int = 0) -> None:
    """LyCORIS's DoRA over columns (axis 0); m * (W + D) / |W + D| takes W's place."""
    for module in OURS[:5]:
        name = "lora_unet_" + module.replace(".", "_")
        weight = file.state[flux(module)]
        before = file.expected[flux(module)]
        change = file.lora(name, flux(module))
        moved = weight + change
        magnitude = file.rand(*moved.norm(dim=axis, keepdim=True).shape).abs()
        file.tensors[f"{name}.dora_scale"] = magnitude
        file.expected[flux(module)] = before
        file.expect(flux(module), None, magnitude * moved / moved.norm(dim=axis, keepdim=True) - weight)


def dora_rows(file: File) -> None:
    dora(file, axis=1)


def dora_peft(file: File) -> None:
    """PEFT's magnitude is a vector over the rows, here of rows of a fused weight."""
    for theirs, ours, start in (THEIRS[1], THEIRS[15]):
        key, name = flux(ours), f"transformer.{theirs}"
        change = file.lora(name, key, start, style="peft", alpha=None)
        file.expected[key] = file.state[key]
        weight = file.weight(key, start, len(change))
        moved = weight + change
        magnitude = file.rand(len(change)).abs()
        file.tensors[f"{name}.lora_magnitude_vector"] = magnitude
        file.expect(key, start, magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight)


def differences(file: File) -> None:
    """Full differences and biases, as LyCORIS's "full" algorithm and extracted LoRAs have them."""
    for module in OURS[:4]:
        name, key = "lora_unet_" + module.replace(".", "_"), flux(module)
        weight, bias = file.rand(*file.state[key].shape), file.rand(file.state[key].shape[0])
        file.tensors |= {f"{name}.diff": weight, f"{name}.diff_b": bias}
        file.expect(key, None, weight)
        file.expect(key.removesuffix("weight") + "bias", None, bias)


def peft_alpha(file: File) -> None:
    """lora_alpha and its exceptions from the header that diffusers writes."""
    config = {"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"attn.to_k": 12}, "transformer.r": 3}
    file.metadata = {"lora_adapter_metadata": json.dumps(config)}
    for theirs, ours, start in THEIRS[:3]:
        change = file.lora(f"transformer.{theirs}", flux(ours), start, style="peft", alpha=None)
        extra = 12 / 3 if theirs.endswith("to_k") else 6 / 3
        file.expect(flux(ours), start, (extra - 1) * change)


# name -> (how the file is made, what the format is called, whether ComfyUI gives the same)
FORMATS: dict[str, tuple[Callable[[File], None], str, bool]] = {
    "kohya": (kohya, "kohya LoRA", True),
    "diffusers": (diffusers, "diffusers LoRA", True),
    "diffusers_final_norm": (diffusers_final_norm, "diffusers LoRA", True),
    "ai_toolkit": (ai_toolkit, "ai-toolkit / ComfyUI LoRA", True),
    "bfl": (bfl, "BFL LoRA + replacements", False),
    "fal": (fal, "fal Kontext LoRA", False),
    "xlabs": (xlabs, "XLabs LoRA", True),
    "onetrainer": (onetrainer, "OneTrainer + kohya LoRA", True),
    "lycoris_lora": (lycoris_lora, "LyCORIS LoRA", True),
    "loha": (loha, "LyCORIS LoHa", True),
    "lokr": (lokr, "LyCORIS LoKr", True),
    "dora": (dora, "kohya LoRA with DoRA", True),
    "dora_rows": (
        dora_rows,
        "kohya LoRA with DoRA",
        False,
    ),  # ComfyUI divides by |W| (Comfy-Org/ComfyUI#15458)
    "dora_peft": (dora_peft, "diffusers LoRA with DoRA", False),  # ComfyUI does not read the magnitude
    "differences": (differences, "kohya differences", True),
    "peft_alpha": (peft_alpha, "diffusers LoRA", False),  # ComfyUI does not read the header
}
