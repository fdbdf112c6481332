"""The student: a full copy of the teacher's transformer, or a LoRA on it.

A LoRA's keys are BFL's names with `diffusion_model.` before and `lora_A`/`lora_B` after them, scale 1: what
ComfyUI, ai-toolkit and `models.lora` read.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.transformer import Flux
from ..training import mixed
from ..training.checkpoint import save_weights

LORA_PREFIX = "diffusion_model."


class LoraLinear(nn.Module):
    """A frozen layer plus B·A of float32 masters, computed in the input's dtype; B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(
            (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)
        )
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        base = F.linear(x, self.weight.to(x.dtype), bias)
        return base + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


def make_student(teacher: Flux, *, lora_rank: int = 0, seed: int = 0) -> Flux:
    """A student that starts as the teacher.

    Args:
        lora_rank: 0 for a full copy with float32 masters; else only a LoRA of this rank on every layer of the
            blocks is trained and the teacher's weights are shared.

    Raises:
        ValueError: lora_rank < 0, or a teacher of packed weights.
    """
    if lora_rank < 0:
        raise ValueError(f"lora_rank is {lora_rank}; it must be 0 (a full copy) or more")
    weights = teacher.state_dict()
    packed = [key for key, value in weights.items() if not value.is_floating_point() or value.itemsize < 2]
    if packed:
        raise ValueError(
            f"the teacher's weights are packed ({packed[0]}, …): a student needs the bfloat16 or float32 file"
        )
    if not lora_rank:
        student = Flux(teacher.params, operations=mixed, device="meta")
        student.load_state_dict({key: value.float().clone() for key, value in weights.items()}, assign=True)
        return student.requires_grad_(True).train()
    student = Flux(teacher.params, operations=mixed, device="meta")
    student.load_state_dict({key: value.detach() for key, value in weights.items()}, assign=True)
    student.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in list(student.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith(("double_blocks", "single_blocks")):
            owner, _, last = name.rpartition(".")
            setattr(student.get_submodule(owner), last, LoraLinear(layer, lora_rank, generator))
    return student.train()


def is_lora(student: Flux) -> bool:
    return any(isinstance(module, LoraLinear) for module in student.modules())


def lora_state(student: Flux) -> dict[str, Tensor]:
    """The LoRA's tensors under the keys of its file."""
    return {
        f"{LORA_PREFIX}{name}.weight": p.detach()
        for name, p in student.named_parameters()
        if ".lora_" in name
    }


@torch.no_grad()
def merged_state(student: Flux) -> dict[str, Tensor]:
    """The whole transformer under BFL's keys, a LoRA added to the weights it belongs to (in float32)."""
    state = {name: value for name, value in student.state_dict().items() if ".lora_" not in name}
    for name, layer in student.named_modules():
        if isinstance(layer, LoraLinear):
            state[f"{name}.weight"] = layer.weight.float() + layer.lora_B.float() @ layer.lora_A.float()
    return state


def save_student(student: Flux, path: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the transformer (BFL keys), or the LoRA if it is one, as safetensors."""
    tensors = lora_state(student) if is_lora(student) else merged_state(student)
    save_weights(path, {name: value.to(dtype) for name, value in tensors.items()}, {"format": "pt"})
