"""torch.compile for the transformer's repeated blocks: two compilations serve all 57 of them.

The blocks are compiled in place (`nn.Module.compile`), so keys, LoRAs and offloading stay as they are. Token counts
are symbolic from the first call on: another picture size, prompt or set of weights compiles nothing anew.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import nn

from .transformer import Flux

logger = logging.getLogger("kontext")


@lru_cache(maxsize=4)
def compiler_problem(device_type: str) -> str | None:
    """Why nothing can be compiled for this kind of device, or None: one small function is compiled to find out."""
    try:
        probe = torch.compile(lambda x: x.sin() + 1, dynamic=True)
        probe(torch.zeros(8, device=device_type))
    except Exception as error:  # whatever a missing compiler raises: the edit must go on without it
        return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return None


def compile_blocks(transformer: Flux) -> bool:
    """Compile every block in place, at its first call. Without a compiler a warning says so and nothing changes.

    Returns:
        Whether the blocks are compiled.
    """
    device = transformer.final_layer.linear.weight.device
    problem = compiler_problem(device.type)
    if problem is not None:
        logger.warning(
            "not compiled, since this machine has no working compiler for %s: %s", device.type, problem
        )
        return False
    for block in _blocks(transformer):
        if block._compiled_call_impl is None:
            block.compile(dynamic=True)
    return True


class CompiledBlocks:
    """`with` it a network's blocks run compiled, and eager again after; what was compiled is kept for the next time.

    Any network with `double_blocks` and `single_blocks` will do, ours or another implementation's.
    """

    def __init__(self, network: nn.Module) -> None:
        self._blocks = _blocks(network)
        self._compiled = [torch.compile(block._call_impl, dynamic=True) for block in self._blocks]
        self._before: list = []

    def __enter__(self) -> CompiledBlocks:
        self._before = [block._compiled_call_impl for block in self._blocks]
        for block, compiled in zip(self._blocks, self._compiled, strict=True):
            block._compiled_call_impl = compiled
        return self

    def __exit__(self, *_: object) -> None:
        for block, before in zip(self._blocks, self._before, strict=True):
            block._compiled_call_impl = before


def is_compiled(transformer: Flux) -> bool:
    """Whether `compile_blocks` is in effect."""
    return any(block._compiled_call_impl is not None for block in _blocks(transformer))


def undo(transformer: Flux) -> None:
    """Back to eager blocks."""
    for block in _blocks(transformer):
        block._compiled_call_impl = None


def _blocks(network: nn.Module) -> tuple[nn.Module, ...]:
    return (*network.double_blocks, *network.single_blocks)


class CompileClock:
    """Seconds that torch has spent compiling and how many graphs it made, between `with` and its end."""

    def __enter__(self) -> CompileClock:
        self.graphs, self.seconds = 0, 0.0
        self._before = _counted()
        return self

    def __exit__(self, *_: object) -> None:
        graphs, seconds = _counted()
        self.graphs, self.seconds = graphs - self._before[0], seconds - self._before[1]


def _counted() -> tuple[int, float]:
    """Graphs made and seconds spent on them since torch was loaded."""
    from torch._dynamo import utils

    times = utils.calculate_time_spent()
    return utils.counters["stats"]["unique_graphs"], float(times.get("entire_frame_compile", 0.0))
