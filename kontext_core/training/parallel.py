"""Several processes that train one model: FSDP2 over torchrun, and what the rest of training needs to know of it.

Parameters are sharded over all processes (`fully_shard`): float32 shards, gathered block by block in the compute
dtype, gradients reduced in float32. Every process draws the whole micro-batch's noise and takes its own rows, so the
losses are those of a single process, up to the order of sums. A module that is not sharded is held whole by every
process, and its gradients are averaged: small models on the cores of one machine. Source: arXiv 2304.11277;
pytorch/torchtitan.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process's rank among `size`."""

    rank: int = 0
    size: int = 1

    def mean(self, value: float) -> float:
        """The mean of every process's value."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self._device())
        torch.distributed.all_reduce(total)
        return float(total) / self.size

    def any(self, value: bool) -> bool:
        """Whether it is true for any process."""
        return self.mean(float(value)) > 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()

    def _device(self) -> torch.device:
        nccl = torch.distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


ALONE = World()


def start() -> World:
    """Join the processes that torchrun started; alone without it. NCCL on CUDA, gloo elsewhere."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl")
    else:
        torch.distributed.init_process_group("gloo")
    return World(rank=torch.distributed.get_rank(), size=size)


def stop(world: World) -> None:
    """Leave the group."""
    if world.size > 1:
        torch.distributed.destroy_process_group()


def shard(module: nn.Module, world: World, dtype: torch.dtype = torch.bfloat16) -> None:
    """Shard a `KontextModule` over all processes, a unit a block; does nothing for one process.

    Modulation layers are units of their own: they run for all blocks at once, before any block does.

    Args:
        dtype: what weights are gathered in; gradients are reduced in float32.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": init_device_mesh(kind, (world.size,)), "mp_policy": policy}
    transformer = module.transformer
    for block in transformer.double_blocks:
        for part in (block.img_mod.lin, block.txt_mod.lin, block):
            fully_shard(part, **options)
    for block in transformer.single_blocks:
        for part in (block.modulation.lin, block):
            fully_shard(part, **options)
    fully_shard(transformer, **options)
    for encoder in (module.t5, module.clip):
        if encoder is not None and any(p.requires_grad for p in encoder.parameters()):
            fully_shard(encoder, **options)


def average_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Replace the gradients of parameters that every process holds whole by their mean over the processes.

    Sharded parameters are left alone: FSDP2 has reduced theirs. Every process must have gradients for the same ones.
    """
    if world.size == 1:
        return
    whole = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "full_tensor")]
    if not whole:
        return
    joined = torch.cat([gradient.flatten() for gradient in whole])
    torch.distributed.all_reduce(joined)
    joined /= world.size
    for gradient, mean in zip(whole, joined.split([gradient.numel() for gradient in whole]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor, whole on every process; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a whole value on the device of `tensor`, sharded as it is; scalars are never sharded."""
    mesh = getattr(tensor, "device_mesh", None)
    if value.ndim == 0:
        return value.clone()
    if mesh is None:
        return value.to(tensor.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), mesh, tensor.placements)
