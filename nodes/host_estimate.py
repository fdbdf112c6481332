"""What a sampling will take, from the MODEL and the CONDITIONING themselves: tokens, memory, time.

Memory is the host's own estimate, by which it decides what to offload. Time is the arithmetic of the transformer
divided by what the device does in a matrix product of that width, measured on the spot: a lower bound that leaves out
text encoders, autoencoder and the streaming of weights that do not fit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ..kontext_core import latents

PROBE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Tokens by part, bytes and seconds of one sampling."""

    target: int
    references: tuple[int, ...]
    text: int
    batch: int
    steps: int
    weights: int
    activations: int
    total: int
    device: str
    seconds_per_step: float

    @property
    def tokens(self) -> int:
        return self.target + sum(self.references) + self.text

    def report(self) -> str:
        """Three lines: tokens, memory, time."""
        parts = "".join(f" + {count} reference" for count in self.references)
        needed, gib = self.weights + self.activations, 1 << 30
        place = (
            "fits" if needed <= self.total else "does not fit, so weights will be streamed, which is slower"
        )
        batch = f", {self.batch} pictures" if self.batch > 1 else ""
        return (
            f"{self.tokens} tokens: {self.target} target{parts} + {self.text} text{batch}\n"
            f"{needed / gib:.2f} GiB: {self.weights / gib:.2f} weights + {self.activations / gib:.2f} working memory; "
            f"{self.device} has {self.total / gib:.1f} GiB: {place}\n"
            f"at least {self.seconds_per_step * self.steps:.1f} s for {self.steps} steps "
            f"({self.seconds_per_step:.2f} s a step), by the arithmetic this device does now"
        )


def estimate(model: Any, conditioning: list, latent: torch.Tensor, steps: int) -> Estimate:
    """Of sampling a latent (B, 16, h, w).

    Raises:
        ValueError: the MODEL is not FLUX.
    """
    network = model.model.diffusion_model
    if not hasattr(network, "double_blocks") or not hasattr(network, "single_blocks"):
        raise ValueError(f"this MODEL is {type(network).__name__}; an estimate is made of FLUX models only")
    context, values = conditioning[0]
    references = values.get("reference_latents") or []
    found = model.model.extra_conds_shapes(reference_latents=references) if references else {}
    shapes = {name: [shape] for name, shape in found.items()}
    management = comfy.model_management
    batch = len(latent)
    tokens = [_tokens(latent), *(_tokens(reference) for reference in references)]
    return Estimate(
        target=tokens[0],
        references=tuple(tokens[1:]),
        text=context.shape[1],
        batch=batch,
        steps=steps,
        weights=int(model.model_size()),
        activations=int(model.model.memory_required([batch, *latent.shape[1:]], cond_shapes=shapes)),
        total=int(management.get_total_memory(model.load_device)),
        device=str(model.load_device),
        seconds_per_step=batch * _operations(network, sum(tokens), context.shape[1]) / _speed_of(model),
    )


def _tokens(latent: torch.Tensor) -> int:
    rows, columns = (-(-n // latents.PATCH) for n in latent.shape[-2:])
    return rows * columns


def _numel(module: torch.nn.Module, skip: tuple[str, ...] = ("mod", "modulation")) -> int:
    """Weights of a block's products by token; modulation is one product a step."""
    return sum(
        layer.in_features * layer.out_features
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and not any(part in name for part in skip)
    )


def _operations(network: Any, num_image: int, num_text: int) -> float:
    """Multiplications and additions of one picture's step: two a weight and token, four a pair of tokens and width."""
    total, width = num_image + num_text, network.hidden_size
    double = sum(_numel(block) for block in network.double_blocks)
    single = sum(_numel(block) for block in network.single_blocks)
    pairs = 4 * total**2 * width * (len(network.double_blocks) + len(network.single_blocks))
    return double * total + 2 * single * total + pairs


def _speed_of(model: Any) -> float:
    """Operations a second of a product of the model's width in the dtype that it computes in."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = torch.bfloat16
    return speed(model.model.diffusion_model.hidden_size, dtype, model.load_device)


def speed(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a matrix product of this width, measured now."""
    a = torch.zeros(512, width, dtype=dtype, device=device)
    b = torch.zeros(width, 4 * width, dtype=dtype, device=device)
    (a @ b)[0, 0].item()  # the first product sets libraries up
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < PROBE_SECONDS:
        (a @ b)[0, 0].item()
        count += 1
    return 2 * 512 * width * 4 * width * count / elapsed
