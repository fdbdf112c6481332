"""A model larger than its memory: modulation off the device, blocks streamed, pages given back.

Three measures, none of which changes a result:

- **Modulation stays in the memory map.** Its layers are 27 % of the transformer and see no image token. Their
  tables are computed for the whole schedule before sampling (`Flux.modulation_tables`): one layer at a time is
  unpacked on the device, used for every step, and forgotten. So are the small embedders before them.
- **Blocks stream.** Those that do not fit the budget are brought while the one before computes, and dropped
  after use: to a device by copies on a stream of their own, on the CPU by asking the system to read the file
  ahead, and giving the pages back.
- **Pages go back.** On the CPU the weights of the text encoders and of modulation are the file's own pages.
  After use they are given back: they count no longer as the process's memory, and are read again if needed.

Giving pages back forgets what was written to them: this is for weights nobody trains in place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.t5 import T5Encoder
from ..models.transformer import Flux
from .mapped import MappedFile

logger = logging.getLogger("kontext")

# Weight files smaller than this are left in memory: giving back and reading again costs more than it saves.
SMALL = 2**30

# Left free on a device when a budget is found and not given: activations of a 1024×1024 edit in bfloat16.
ACTIVATIONS = 3 * 2**30


@dataclass(frozen=True)
class Plan:
    """How a transformer's weights are spread.

    Attributes:
        resident: bytes that stay: everything but modulation and streamed blocks.
        modulation: bytes of the layers that are used up before sampling: modulation and its embedders.
        streamed: numbers of the blocks (double-stream ones first) that are brought for each use.
        buffers: bytes of the two largest streamed blocks, of which one computes while the other arrives.
    """

    resident: int
    modulation: int
    streamed: tuple[int, ...]
    buffers: int

    @property
    def peak(self) -> int:
        """Bytes of weights that are in memory at most while sampling, without the tables."""
        return self.resident + self.buffers


def modulation_layers(transformer: Flux) -> list[nn.Module]:
    """The layers that see only t, guidance and pooled text."""
    layers = [
        layer for block in transformer.double_blocks for layer in (block.img_mod.lin, block.txt_mod.lin)
    ]
    layers += [block.modulation.lin for block in transformer.single_blocks]
    return [*layers, transformer.final_layer.adaLN_modulation[1]]


def layers_ahead(transformer: Flux) -> list[nn.Module]:
    """All layers that are used up before sampling: modulation, and the embedders of t, guidance and pooled text."""
    names = ("time_in", "vector_in", "guidance_in")
    embedders = [getattr(transformer, name) for name in names if hasattr(transformer, name)]
    return [
        *(layer for part in embedders for layer in (part.in_layer, part.out_layer)),
        *modulation_layers(transformer),
    ]


def is_ahead(key: str) -> bool:
    """Whether a parameter's key is one of those layers'."""
    marks = ("_mod.lin.", ".modulation.lin.", ".adaLN_modulation.1.")
    return key.startswith(("time_in.", "vector_in.", "guidance_in.")) or any(
        mark in f".{key}" for mark in marks
    )


def blocks_of(transformer: Flux) -> list[nn.Module]:
    return [*transformer.double_blocks, *transformer.single_blocks]


def tensors_of(module: nn.Module, *, ahead: bool = False) -> list[tuple[nn.Module, str, Tensor]]:
    """(layer, name, tensor) of a module's weights, without those that are used up before sampling unless asked for.

    Only a whole transformer has embedders to leave out: their keys begin where the transformer's do.
    """
    found = []
    for prefix, layer in module.named_modules():
        for kind in (layer._parameters, layer._buffers):
            for name, tensor in kind.items():
                if tensor is not None and (ahead or not is_ahead(f"{prefix}.{name}")):
                    found.append((layer, name, tensor))
    return found


def _nbytes(tensors: Iterable[tuple[nn.Module, str, Tensor]]) -> int:
    return sum(tensor.nbytes for _, _, tensor in tensors)


def make_plan(transformer: Flux, budget: int | None) -> Plan:
    """Which blocks stream so that the weights in memory stay within `budget` bytes; none without a budget.

    Streamed blocks are spread evenly over the others, which hide their transfer.

    Raises:
        ValueError: the budget is less than what the rest and two blocks take.
    """
    modulation = sum(_nbytes(tensors_of(layer, ahead=True)) for layer in layers_ahead(transformer))
    sizes = [_nbytes(tensors_of(block)) for block in blocks_of(transformer)]
    everything = _nbytes(tensors_of(transformer))
    if budget is None or everything <= budget:
        return Plan(everything, modulation, (), 0)
    rest = everything - sum(sizes)
    for count in range(1, len(sizes) + 1):
        streamed = sorted({int((i + 0.5) * len(sizes) / count) for i in range(count)})
        buffers = sum(sorted((sizes[i] for i in streamed), reverse=True)[:2])
        resident = everything - sum(sizes[i] for i in streamed)
        if resident + buffers <= budget:
            return Plan(resident, modulation, tuple(streamed), buffers)
    least = rest + sum(sorted(sizes, reverse=True)[:2])
    raise ValueError(
        f"a budget of {budget:,} bytes is too small for this transformer: {least:,} is the least, for what is not "
        "in blocks and two blocks at a time."
    )


def find_budget(device: torch.device) -> int | None:
    """Bytes that weights may take on a device: what is free, less room for activations. None on the CPU.

    On the CPU the system takes back the pages of weights by itself when memory is short.
    """
    if device.type == "cuda":
        return max(torch.cuda.mem_get_info(device)[0] - ACTIVATIONS, 0)
    return None


class PageRanges:
    """Where some tensors lie in memory maps, as few ranges as possible."""

    def __init__(self, tensors: Iterable[Tensor], files: Iterable[MappedFile]):
        files = list(files)
        self.ranges: list[tuple[MappedFile, int, int]] = []
        for file in files:
            places = sorted(place for tensor in tensors if (place := file.find(tensor)) is not None)
            merged: list[list[int]] = []
            for start, stop in places:
                # Alignment leaves a few bytes between neighbours.
                if merged and start - merged[-1][1] <= 4096:
                    merged[-1][1] = max(stop, merged[-1][1])
                else:
                    merged.append([start, stop])
            self.ranges += [(file, start, stop - start) for start, stop in merged]

    def release(self) -> None:
        for file, start, count in self.ranges:
            file.release(start, count)

    def read_ahead(self) -> None:
        for file, start, count in self.ranges:
            file.read_ahead(start, count)


def release_after_use(module: nn.Module, files: Iterable[MappedFile]) -> None:
    """Gives a module's pages back to the system after each of its forward passes."""
    ranges = PageRanges([tensor for _, _, tensor in tensors_of(module, ahead=True)], files)
    if ranges.ranges:
        module.register_forward_hook(lambda *_: ranges.release())


def release_text_encoder(encoder: nn.Module, files: Iterable[MappedFile]) -> None:
    """Gives a text encoder's pages back while it runs, block by block for T5."""
    files = list(files)
    if isinstance(encoder, T5Encoder):
        for part in (encoder.shared, *encoder.encoder.block):
            release_after_use(part, files)
    else:
        release_after_use(encoder, files)


class BlockStreamer:
    """Brings the planned blocks' weights before each use and drops them after it.

    Args:
        transformer: its streamed blocks' weights are in CPU memory, best in the memory map.
        device: where the blocks run. On the CPU nothing is copied: pages are read ahead and given back.
        files: the maps behind the weights.
    """

    def __init__(
        self,
        transformer: Flux,
        plan: Plan,
        device: torch.device,
        files: Iterable[MappedFile],
        *,
        copies: bool | None = None,
    ):
        self.device = device
        self.makes_copies = device.type != "cpu" if copies is None else copies
        self.order = list(plan.streamed)
        blocks = blocks_of(transformer)
        self.tensors = {index: tensors_of(blocks[index]) for index in self.order}
        files = list(files)
        self.pages = {
            index: PageRanges([tensor for _, _, tensor in tensors], files)
            for index, tensors in self.tensors.items()
        }
        self.copies: dict[int, list[Tensor]] = {}
        self.coming: dict[int, Future] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.worker = ThreadPoolExecutor(1, "kontext-weights") if self.makes_copies else None
        self.handles = []
        for index in self.order:
            block = blocks[index]
            self.handles.append(block.register_forward_pre_hook(lambda *_, index=index: self._before(index)))
            self.handles.append(
                block.register_forward_hook(lambda *_, index=index: self._after(index), always_call=True)
            )

    def close(self) -> None:
        """Takes the hooks off; the weights are where they were before."""
        for handle in self.handles:
            handle.remove()
        if self.worker is not None:
            self.worker.shutdown()
        self.coming.clear()
        self.copies.clear()

    def _bring(self, index: int) -> None:
        """Starts bringing a block; returns at once."""
        if not self.makes_copies:
            self.pages[index].read_ahead()
        elif index not in self.copies and index not in self.coming:
            self.coming[index] = self.worker.submit(self._copy, index)

    def _copy(self, index: int) -> tuple[list[Tensor], torch.cuda.Event | None]:
        """On the worker's thread: from the memory map over pinned memory to the device."""
        tensors = [tensor.detach() for _, _, tensor in self.tensors[index]]
        if self.stream is None:
            return [tensor.to(self.device, copy=True) for tensor in tensors], None
        with torch.cuda.stream(self.stream):
            copies = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
            return copies, self.stream.record_event()

    def _before(self, index: int) -> None:
        self._bring(index)
        if self.makes_copies:
            self._swap_in(index)
        following = self.order[(self.order.index(index) + 1) % len(self.order)]
        if following != index:
            self._bring(following)

    def _swap_in(self, index: int) -> None:
        if index in self.coming:
            copies, event = self.coming.pop(index).result()
            self.copies[index] = copies
            if event is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(event)
                for copy in copies:
                    copy.record_stream(current)  # its memory is not reused before this stream is done with it
        for (layer, name, _), copy in zip(self.tensors[index], self.copies[index], strict=True):
            _put(layer, name, copy)

    def _after(self, index: int) -> None:
        if self.makes_copies:
            for layer, name, tensor in self.tensors[index]:
                _put(layer, name, tensor)
            self.copies.pop(index, None)
        self.pages[index].release()


def _put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Another tensor under a parameter's or buffer's name."""
    if name in layer._parameters:
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        layer._parameters[name] = parameter
    else:
        layer._buffers[name] = tensor


def attach(
    transformer: Flux, files: Iterable[MappedFile], *, device: torch.device, budget: int | None
) -> Plan:
    """Puts a loaded transformer's weights where the budget wants them.

    The transformer comes with all weights in CPU memory; modulation and streamed blocks stay there, everything
    else goes to the device. Without a budget one is found; on the CPU none is, and nothing streams.

    Raises:
        ValueError: the budget is too small.
    """
    files = list(files)
    plan = make_plan(transformer, find_budget(device) if budget is None else budget)
    for layer in layers_ahead(transformer):
        release_after_use(layer, files)
    if device.type != "cpu":
        streamed = {
            id(tensor) for i in plan.streamed for _, _, tensor in tensors_of(blocks_of(transformer)[i])
        }
        for layer, name, tensor in tensors_of(transformer):
            if id(tensor) not in streamed:
                _put(layer, name, tensor.to(device))
                PageRanges([tensor], files).release()
    if plan.streamed:
        BlockStreamer(transformer, plan, device, files)  # lives in the blocks' hooks
    logger.info(
        "transformer: %s MB resident, %s MB of modulation in the memory map, %d of %d blocks streamed",
        f"{plan.resident / 1e6:,.0f}",
        f"{plan.modulation / 1e6:,.0f}",
        len(plan.streamed),
        len(blocks_of(transformer)),
    )
    return plan
