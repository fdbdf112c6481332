"""A very small transformer, LoRAs for it, and whether its weights are the very same as before."""

from __future__ import annotations

import torch

from kontext_core.models.transformer import Flux, TransformerParams

HIDDEN = 32
PARAMS = TransformerParams(
    in_channels=16,
    out_channels=16,
    vec_in_dim=8,
    context_in_dim=12,
    hidden_size=HIDDEN,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
)
LAYERS = ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.0", "single_blocks.0.linear2", "img_in"]


def make_model(dtype: torch.dtype = torch.float32, operations=torch.nn) -> Flux:
    model = Flux(PARAMS, operations=operations, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def make_tensors(seed: int = 1, prefix: str = "diffusion_model.", layers=LAYERS) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2, alpha 4, on some layers, with up and down in the layer's sizes."""
    shapes = {name: tuple(value.shape) for name, value in Flux(PARAMS, device="meta").state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        out, columns = shapes[f"{layer}.weight"]
        tensors[f"{prefix}{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator) * 0.1
        tensors[f"{prefix}{layer}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.1
        tensors[f"{prefix}{layer}.alpha"] = torch.tensor(4.0)
    return tensors


def snapshot(model: torch.nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (value.data_ptr(), value.clone()) for name, value in model.named_parameters()}


def same(model: torch.nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> bool:
    """Whether every weight is the very same memory with the very same bits."""
    return all(
        value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
        for name, value in model.named_parameters()
    )
