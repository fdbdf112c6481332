"""Optimizers: Muon for the hidden matrices, AdamW for everything else, under one interface."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .muon import Muon
from .parallel import ALONE, World, full, like

RATES = {"relative_attention_bias": 20.0, "SelfAttention.q.": 0.15}
"""Part of a name -> share of the rate. T5 divides attention by nothing: its queries are 1/sqrt(d_kv) the size of other
weights, and its position biases are logits, of which whole units make a difference. At everybody's rate queries grow
until attention is one-hot while the biases stay near nothing: a reader of bags of words (docs/log.md)."""
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
        others = [(n, p) for n, p in self.named if n not in names]
        groups = [
            *_by_rate([(n, p) for n, p in others if p.ndim > 1], lr, weight_decay),
            *_by_rate([(n, p) for n, p in others if p.ndim <= 1], lr, 0.0),
        ]
        # Muon takes matrices: filters are handed over as a flat view of the same storage
        self.flat = {n: nn.Parameter(p.detach().view(len(p), -1)) for n, p in hidden if p.ndim == 4}
        self.parts: list[torch.optim.Optimizer] = []
        if groups:
            self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-8, foreach=True))
        if hidden:
            flat = [(n, self.flat.get(n, p)) for n, p in hidden]
            self.parts.append(Muon(_by_rate(flat, muon_lr, weight_decay), lr=muon_lr, world=world))
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


def _by_rate(named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float) -> list[dict]:
    """Groups of parameters that share a rate, see RATES."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        share = next((rate for part, rate in RATES.items() if part in name), 1.0)
        groups.setdefault(share, []).append(parameter)
    return [{"params": p, "lr": share * lr, "weight_decay": weight_decay} for share, p in groups.items()]


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
