"""Time and memory against pixels, references, steps and batch, beside the count of operations, and a plot.

kontext-tiny's own sizes with random weights: what grows is the same, and a point takes a fraction of a second.
Memory is the most that tensors made while sampling took together, as PyTorch's own allocation records say.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from measure import alternate, describe, machine, medians, table
from torch.profiler import ProfilerActivity, profile

AXES = {
    "pixels": [64, 128, 192, 256, 384],  # sides
    "references": [0, 1, 2, 4],
    "steps": [1, 2, 4, 8],
    "batch": [1, 2, 4, 8],
}


def measure(
    rounds: int, quick: bool, plot: Path | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Points of every axis; `exponent` is the slope of log time over log operations, 1 for time like operations."""
    from kontext_core.models.transformer import Flux
    from kontext_core.presets import KONTEXT_TINY

    torch.manual_seed(0)
    network = Flux(KONTEXT_TINY.transformer, dtype=dtype, device=device).eval().requires_grad_(False)
    report: dict[str, Any] = {"axes": {}}
    for axis, values in AXES.items():
        print(f"growth: {axis}", file=sys.stderr)
        points = [_point(network, axis, value, rounds, device) for value in (values[:2] if quick else values)]
        report["axes"][axis] = {"points": points, "exponent": _slope(points)}
    report |= machine(device, dtype)
    if plot is not None:
        report["plot"] = _draw(report, plot)
    return report


def _point(network, axis: str, value: int, rounds: int, device: torch.device) -> dict[str, Any]:
    from kontext_core import latents
    from kontext_core.conditioning import PromptConditioning, make_references
    from kontext_core.denoise import Denoiser
    from kontext_core.models.operations import block_operations
    from kontext_core.samplers import euler

    side, references, steps, batch = 128, 1, 2, 1
    if axis == "pixels":
        side = value
    elif axis == "references":
        references = value
    elif axis == "steps":
        steps = value
    else:
        batch = value
    cells, params = side // 8, network.params
    prompt = PromptConditioning(
        txt=torch.randn(batch, 48, params.context_in_dim), vec=torch.randn(batch, params.vec_in_dim)
    )
    given = make_references([torch.randn(1, 16, cells, cells) for _ in range(references)], (cells, cells))
    grid = torch.linspace(1, 0, steps + 1)
    denoiser = Denoiser(network, prompt, given, cells, cells, guidance=2.5, planned=grid[:-1].tolist())
    x = latents.pack(torch.randn(batch, 16, cells, cells)).to(device)
    seconds = medians(alternate({"run": lambda: euler(denoiser, x, grid)}, rounds))["run"]
    tokens = 48 + (1 + references) * (cells // 2) ** 2
    return {
        "value": value,
        "seconds": seconds,
        "bytes": _peak(lambda: euler(denoiser, x, grid), device),
        "tokens": tokens,
        "operations": batch * steps * block_operations(params, tokens, tokens),
    }


def _peak(run, device: torch.device) -> int:
    """The most bytes of tensors alive at once that `run` makes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _slope(points: list[dict[str, Any]]) -> float:
    """Least-squares slope of log seconds over log operations."""
    x = torch.tensor([float(point["operations"]) for point in points]).log()
    y = torch.tensor([float(point["seconds"]) for point in points]).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def _draw(report: dict[str, Any], path: Path) -> str | None:
    try:
        import matplotlib
    except ImportError:
        print("growth: no plot without matplotlib", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, len(report["axes"]), figsize=(13, 3.2), layout="constrained")
    for panel, (axis, found) in zip(panels, report["axes"].items(), strict=True):
        values = [point["value"] for point in found["points"]]
        for key, text in (("seconds", "time"), ("bytes", "memory"), ("operations", "operations")):
            first = found["points"][0][key]
            panel.plot(values, [point[key] / first for point in found["points"]], "o-", label=text)
        panel.set(xlabel="side, pixels" if axis == "pixels" else axis, yscale="log")
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}×")
        panel.yaxis.set_minor_locator(ticker.NullLocator())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("times the first point")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return str(path)


def as_text(report: dict[str, Any]) -> str:
    lines = [f"Growth, kontext-tiny's sizes; {describe(report)}", ""]
    rows = []
    for axis, found in report["axes"].items():
        for point in found["points"]:
            rows.append(
                [
                    axis,
                    point["value"],
                    point["tokens"],
                    f"{point['seconds']:.3f} s",
                    f"{point['bytes'] / 2**20:.1f} MiB",
                    f"{point['operations'] / 1e9:.1f}",
                    f"{point['operations'] / point['seconds'] / 1e9:.0f}",
                ]
            )
    lines.append(table(["axis", "value", "tokens", "time", "memory", "10⁹ operations", "10⁹ a second"], rows))
    slopes = ", ".join(f"{axis} {found['exponent']:.2f}" for axis, found in report["axes"].items())
    lines.append(f"\ntime grows as operations to the power of: {slopes}")
    if report.get("plot"):
        lines.append(f"plot: {report['plot']}")
    return "\n".join(lines)
