"""Optimizers: Muon for the hidden matrices, AdamW for everything else, under one interface."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .muon import Muon
from .parallel import ALONE, World, full, like

_NOT_HIDDEN = ("_in.", "mod", "final_layer", "shared", "embedding", "relative_attention")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """A weight matrix, or a convolution's filters as one, between hidden activations: what Muon is meant for (not
    embeddings, inputs, outputs or modulation)."""
    return parameter.ndim == 4 or (parameter.ndim == 2 and not any(word in name for word in _NOT_HIDDEN))


class Optimizers:
    """Muon and AdamW as one: `step`, `zero_grad`, `state_tensors`, with one learning-rate factor for both.

    Args:
        named: trainable parameters by name.
        lr: AdamW's peak rate; muon_lr: Muon's (scaled to match AdamW's update size), 0 for AdamW alone.
        weight_decay: decoupled, on matrices only.
        world: the processes that take the same steps; Muon's work is shared among them.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        muon_lr: float,
        weight_decay: float = 0.0,
        world: World = ALONE,
    ) -> None:
        self.named = [(name, p) for name, p in named if p.requires_grad]
        hidden = [(n, p) for n, p in self.named if muon_lr and is_hidden_matrix(n, p)]
        names = {n for n, _ in hidden}
        matrices = [p for n, p in self.named if n not in names and p.ndim > 1]
        vectors = [p for n, p in self.named if n not in names and p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # Muon takes matrices: filters are handed over as a flat view of the same storage
        self.flat = {n: nn.Parameter(p.detach().view(len(p), -1)) for n, p in hidden if p.ndim == 4}
        self.parts: list[torch.optim.Optimizer] = []
        if groups:
            self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8, foreach=True))
        if hidden:
            flat = [self.flat.get(n, p) for n, p in hidden]
            self.parts.append(Muon(flat, lr=muon_lr, weight_decay=weight_decay, world=world))
        for part in self.parts:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]

    def set_factor(self, factor: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        by_name = dict(self.named)
        for name, view in self.flat.items():
            view.grad = by_name[name].grad.reshape(len(view), -1).contiguous()
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        for _, parameter in self.named:
            parameter.grad = None  # filters too: Muon knows only their flat views

    def clip(self, max_norm: float) -> float:
        """Clip the gradient's global norm; returns it before clipping. Raises when it is not finite."""
        norm = float(full(nn.utils.clip_grad_norm_([p for _, p in self.named], max_norm)))
        if not math.isfinite(norm):
            raise FloatingPointError(
                "the gradient is not finite: lower the learning rate or look at the data"
            )
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor under "<parameter>/<state>", whole, for a safetensors file."""
        tensors: dict[str, Tensor] = {}
        for part in self.parts:
            for name, parameter in self.named:
                for key, value in part.state.get(self.flat.get(name, parameter), {}).items():
                    tensors[f"{name}/{key}"] = full(torch.as_tensor(value))
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` gave.

        Raises:
            ValueError: the tensors are of other parameters, or of another optimizer.
        """
        by_name = dict(self.named)
        for path, value in tensors.items():
            name, key = path.rsplit("/", 1)
            if name not in by_name:
                raise ValueError(f"the optimizer's state is of another model: it has {name}")
            parameter = self.flat.get(name, by_name[name])
            owner = next(
                part
                for part in self.parts
                for group in part.param_groups
                if any(p is parameter for p in group["params"])
            )
            if (key == "momentum_buffer") != isinstance(owner, Muon):
                raise ValueError(
                    f"the checkpoint's {name} was trained by {'Muon' if key == 'momentum_buffer' else 'AdamW'}: "
                    "go on with the same muon_lr (0 is none), or begin in a new folder"
                )
            owner.state[parameter][key] = like(value, parameter)


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.05) -> float:
    """Learning-rate factor: linear rise over `warmup` steps, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, total: int, warmup: int, decay: float = 0.25, floor: float = 0.02
) -> float:
    """Learning-rate factor: linear rise, flat, then a linear fall over the last `decay` share of the steps."""
    if step < warmup:
        return (step + 1) / warmup
    start = total * (1 - decay)
    if step < start:
        return 1.0
    return max(floor, 1 - (step - start) / max(1.0, total - start))
