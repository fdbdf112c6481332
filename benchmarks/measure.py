"""Timing in turns on a noisy machine: every rival once a round, ratios within a round, their median."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Timed = dict[str, list[float]]
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def clock_name() -> str:
    """The processor's own time where a single thread computes: what else runs on its core is not counted."""
    return "processor" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "wall"


def alternate(
    rivals: dict[str, Callable[..., Any]],
    rounds: int,
    *,
    inputs: Callable[[], tuple] = tuple,
    warmup: int = 1,
) -> Timed:
    """Seconds of each rival in each round; the order turns from round to round, and every other one goes backwards, so
    that nobody always comes after the same one (which may have left the caches and the allocator as it likes).

    Args:
        inputs: makes fresh arguments for each call; not timed.
        warmup: calls before the first round.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    clock = CLOCKS[clock_name()]
    for function in rivals.values():
        for _ in range(warmup):
            function(*inputs())
    times: Timed = {name: [] for name in rivals}
    names = list(rivals)
    for number in range(rounds):
        turn = number % len(names)
        for name in (names[turn:] + names[:turn])[:: -1 if number % 2 else 1]:
            arguments = inputs()
            gc.collect()
            synchronize()
            started = clock()
            rivals[name](*arguments)
            synchronize()
            times[name].append(clock() - started)
    return times


def medians(times: Timed) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratios(times: Timed, base: str) -> dict[str, float]:
    """Median over the rounds of each rival's time over the base's of the same round."""
    return {
        name: statistics.median(value / one for value, one in zip(values, times[base], strict=True))
        for name, values in times.items()
    }


def largest_difference(rival: str, found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference between what a rival gives and what is expected of it.

    Raises:
        ValueError: another shape, or numbers that are not finite: what it took for that is no time to compare with.
    """
    if found.shape != expected.shape or not torch.isfinite(found).all():
        shapes = f"{tuple(found.shape)} in place of {tuple(expected.shape)}"
        raise ValueError(
            f"{rival} gives {shapes}, or numbers that are not finite: it computes something else"
        )
    return float((found.float().cpu() - expected.float().cpu()).abs().max())


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "clock": clock_name(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe(found: dict[str, Any]) -> str:
    return "{name}, {threads} thread(s), {dtype}, torch {torch}, {clock} time".format(**found)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Rows as a Markdown table; floats with four digits, None as a dash."""

    def text(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [head, ["---"] * len(head), *[[text(value) for value in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
