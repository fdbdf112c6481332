"""Teacher and student as functions of a batch: what both are conditioned on, and one call for either."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import latents
from ..models.transformer import BlockHooks, Flux
from ..training import mixed
from ..training.flow import KontextModule, softmax_attention


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a batch is conditioned on: words, pooled words, context tokens and position ids, guidance."""

    txt: Tensor
    vec: Tensor
    context: Tensor | None
    ids: Tensor
    num_target: int
    rows: int
    columns: int
    guidance: Tensor


@torch.no_grad()
def encode_conditions(
    module: KontextModule, batch: dict[str, Tensor], *, guidance: float, dtype: torch.dtype
) -> Conditions:
    """A shard's rows (see `training.data`) -> conditions in `dtype`, on the transformer's device.

    Words that the shard has as token ids are read by the teacher's own text encoders.

    Raises:
        ValueError: token ids, and no text encoders to read them.
    """
    device = next(module.transformer.parameters()).device
    size, _, height, width = batch["target"].shape
    ids, context = latents.position_ids(height, width), None
    if "context" in batch:
        ids = torch.cat((ids, latents.position_ids(*batch["context"].shape[-2:], index=1)))
        context = latents.pack(batch["context"].float()).to(device, dtype)
    if "txt" in batch:
        txt, vec = batch["txt"], batch["vec"]
    elif module.t5 is None or module.clip is None:
        raise ValueError(
            "the shards hold token ids and the teacher has no text encoders: encode the words first"
        )
    else:
        txt = module.t5(batch["t5"].to(device).long(), dtype=dtype)
        _, vec = module.clip(batch["clip"].to(device).long(), dtype=dtype)
    return Conditions(
        txt=txt.to(device, dtype),
        vec=vec.to(device, dtype),
        context=context,
        ids=ids.to(device),
        num_target=height * width // latents.PATCH**2,
        rows=height // latents.PATCH,
        columns=width // latents.PATCH,
        guidance=torch.full((size,), float(guidance), device=device),
    )


def velocity(
    transformer: Flux, x_t: Tensor, t: Tensor, given: Conditions, hooks: BlockHooks | None = None
) -> Tensor:
    """The velocity (B, N, 64) float32 at tokens x_t (B, N, 64) float32 and t (B,); computed in `given`'s dtype."""
    tokens = x_t.to(given.txt.dtype)
    if given.context is not None:
        tokens = torch.cat((tokens, given.context), dim=1)
    return transformer(
        tokens,
        given.ids,
        given.txt,
        latents.text_ids(given.txt.shape[1]).to(given.txt.device),
        t,
        given.vec,
        given.guidance,
        num_target=given.num_target,
        attend=softmax_attention,
        hooks=hooks,
    ).float()


def freeze(module: KontextModule, dtype: torch.dtype) -> KontextModule:
    """The teacher: in `dtype`, without gradients, a copy unless it is all that already; packed weights stay so."""
    # its affine is applied in float32, whatever it is given
    norms = [layer for layer in module.modules() if isinstance(layer, mixed.LayerNorm)]
    kept = {id(parameter) for layer in norms for parameter in layer.parameters()}

    def other(parameter: Tensor) -> bool:
        plain = parameter.is_floating_point() and parameter.itemsize > 1 and id(parameter) not in kept
        return parameter.requires_grad or (plain and parameter.dtype != dtype)

    if any(other(parameter) for parameter in module.parameters()):
        module = copy.deepcopy(module).to(dtype)
        for layer in module.modules():
            if isinstance(layer, mixed.LayerNorm):
                layer.float()
    return module.requires_grad_(False).eval()
