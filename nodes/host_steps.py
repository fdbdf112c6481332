"""What does not change between the steps of one sampling in the host, computed once and never stale.

The host calls a model with everything in every step. Kept here by content, between the host's "before the first step"
and its "after the last" alone: the modulation tables of all steps, the projected text, the embedded references; and
RoPE tables, which depend on positions alone. A call outside of a sampling, or in one whose weights change by hooks
between steps, keeps nothing.

Source: Comfy-Org/ComfyUI comfy/samplers.py `outer_sample`, comfy/model_patcher.py `pre_run`, comfy/hooks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kontext_core.models.rope import Rope, rope_tables
from ..kontext_core.models.transformer import Flux, ModulationTables

MAX_ENTRIES = 4  # prompts of one sampling, conditional and unconditional ones each
MAX_ROWS = 256  # of a table; a longer schedule is computed in parts


class Step(NamedTuple):
    """Modulation of one step: the vector (B, hidden) and, unless other packs may change it, every block's table."""

    vec: Tensor
    tables: ModulationTables | None


class ByContent:
    """A few values by the contents of the tensors they were made from; the oldest goes first."""

    def __init__(self) -> None:
        self.entries: list[tuple[tuple[Tensor | None, ...], Any]] = []

    def get(self, keys: tuple[Tensor | None, ...], make: Callable[[], Any]) -> Any:
        for known, value in self.entries:
            if len(known) == len(keys) and all(same_content(a, b) for a, b in zip(known, keys, strict=True)):
                return value
        value = make()
        copies = tuple(None if key is None else key.clone() for key in keys)
        self.entries = [*self.entries[-MAX_ENTRIES + 1 :], (copies, value)]
        return value


class Schedules:
    """Modulation of whole schedules, or of the part at hand, for a few conditions.

    What does not fit in is not kept at all: conditions that took turns in a full table would each have their whole
    schedule computed at every step.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[tuple[Tensor | None, ...], int, Any]] = []

    def get(self, conditions: tuple[Tensor | None, ...], part: int, make: Callable[[], Any]) -> Any | None:
        """What is kept for these contents and this part, else what `make` gives; None when there is no room."""
        for index, (known, at_hand, value) in enumerate(self.entries):
            if len(known) == len(conditions) and all(map(same_content, known, conditions)):
                if at_hand != part:
                    value = make()
                    self.entries[index] = (known, part, value)
                return value
        if len(self.entries) == MAX_ENTRIES:
            return None
        copies = tuple(None if key is None else key.clone() for key in conditions)
        self.entries.append((copies, part, make()))
        return self.entries[-1][2]


def same_content(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same in every bit, shape and dtype; None equals None."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@dataclass
class _Sampling:
    """What one sampling keeps."""

    texts: ByContent = field(default_factory=ByContent)
    references: ByContent = field(default_factory=ByContent)
    vectors: Schedules = field(default_factory=Schedules)
    times: list[float] = field(default_factory=list)


class StepCache:
    """The caches of one transformer."""

    def __init__(self) -> None:
        self.ropes = ByContent()
        self._sampling: _Sampling | None = None

    def watch(self, patcher: Any) -> None:
        """Have the host say when a sampling with this MODEL, or a clone of it, begins and ends."""
        calls = comfy.patcher_extension.CallbacksMP
        patcher.add_callback(calls.ON_PRE_RUN, _begin)
        patcher.add_callback(calls.ON_CLEANUP, _end)

    def begin(self, patcher: Any) -> None:
        self._sampling = None if patcher.hook_patches else _Sampling()

    def end(self) -> None:
        self._sampling = None

    def sampling(self, options: Mapping[str, Any]) -> _Sampling | None:
        """The caches of the sampling that this call belongs to; None if there is nothing to keep."""
        sigmas = options.get("sample_sigmas")
        if self._sampling is None or not isinstance(sigmas, Tensor) or torch.is_grad_enabled():
            return None
        times = [float(sigma) for sigma in sigmas if sigma > 0]
        if times != self._sampling.times:
            self._sampling = _Sampling(times=times)
        return self._sampling

    def rope(self, network: Flux, ids: Tensor) -> Rope:
        """RoPE tables of positions (1 or B, tokens, 3)."""
        if len(ids) > 1 and torch.equal(ids[:1].expand_as(ids), ids):
            ids = ids[:1]
        return self.ropes.get((ids,), lambda: rope_tables(ids, network.params.axes_dim, network.params.theta))


def _begin(patcher: Any) -> None:
    patcher.model.diffusion_model.steps.begin(patcher)


def _end(patcher: Any) -> None:
    patcher.model.diffusion_model.steps.end()


def planned_step(
    network: Flux,
    sampling: _Sampling | None,
    times: Tensor,
    dtype: torch.dtype,
    conditions: tuple[Tensor | None, ...],
    vector: Callable[[Tensor], Tensor],
) -> Step:
    """The modulation of times (B,), from the table of the whole schedule where they are in it.

    Args:
        conditions: what else the vector depends on; same contents, same table.
        vector: times (B,) -> the modulation vector (B, hidden).
    """
    now = float(times[0])
    if sampling is None or now not in sampling.times or not bool((times == times[0]).all()):
        return Step(vector(times), None)
    batch, start = len(times), sampling.times.index(now)
    per_part = max(MAX_ROWS // batch, 1)
    part = start // per_part
    first = part * per_part
    planned = sampling.times[first : first + per_part]

    def make() -> tuple[Tensor, ModulationTables]:
        vec = torch.cat([vector(times.new_full((batch,), t)) for t in planned])
        return vec, tables_of(network, vec)

    key = (times.new_tensor([batch]), torch.empty(0, dtype=dtype, device=times.device), *conditions)
    planned_part = sampling.vectors.get(key, part, make)
    if planned_part is None:
        return Step(vector(times), None)
    vec, tables = planned_part
    begin = (start - first) * batch
    return Step(vec[begin : begin + batch], tables.rows(begin, begin + batch))


def tables_of(network: Flux, vec: Tensor) -> ModulationTables:
    """Every block's modulation of vectors (rows, hidden), one pass over the weights for all rows."""
    silu = F.silu(vec)
    return ModulationTables(
        tuple((block.img_mod(silu), block.txt_mod(silu)) for block in network.double_blocks),
        tuple(block.modulation(silu) for block in network.single_blocks),
        network.final_layer.adaLN_modulation[1](silu),
    )
