"""torch.compile of a MODEL's repeated blocks while it samples, ours or native; nothing of it stays on the model.

Clones share their network, so blocks are compiled for the length of a sampling and are eager again after it.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.patcher_extension

from ..kontext_core.models.regional import CompileClock, CompiledBlocks, compiler_problem
from . import host_graph

logger = logging.getLogger("kontext")

KEY = "kontext compile"


def compiled(model: Any, report: host_graph.Report | None = None) -> Any:
    """A clone of MODEL whose blocks run compiled; where no compiler works a plain one, and the node says so."""
    model = model.clone()
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    model.remove_wrappers_with_key(kind, KEY)
    problem = compiler_problem(model.load_device.type)
    if problem is not None:
        line = f"not compiled: no working compiler for {model.load_device.type} ({problem})"
        logger.warning(line)
        if report is not None:
            report.say(KEY, [line])
        return model
    model.add_wrapper_with_key(kind, KEY, _Compiled(model.model.diffusion_model, report).outer)
    return model


def is_compiled(model: Any) -> bool:
    """Whether the blocks of MODEL are compiled in a sampling."""
    return bool(model.get_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY))


class _Compiled:
    """The compiled blocks of one network, for one sampling after the other."""

    def __init__(self, network: Any, report: host_graph.Report | None) -> None:
        self.blocks, self.report = CompiledBlocks(network), report
        self.clock = CompileClock()

    def outer(self, executor, *args, **kwargs):
        """Around a whole sampling."""
        with self.blocks, self.clock:
            result = executor(*args, **kwargs)
        line = (
            f"compiled {self.clock.graphs} graphs in {self.clock.seconds:.0f} s"
            if self.clock.graphs
            else "nothing had to be compiled again"
        )
        logger.info(line)
        if self.report is not None:
            self.report.say(KEY, [line])
        return result
