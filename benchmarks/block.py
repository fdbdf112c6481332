"""One block at full width: ours, compiled or not, the peers, and the limit of its own products and attention.

The limit and the peers attend by PyTorch; ours takes what an edit would take here (`models.backends`), and PyTorch's
once more in the row `kontext_core_torch_attention`: that one is beside the peers at the same attention.
"""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import torch
from measure import alternate, describe, largest_difference, machine, medians, ratios, table
from peers import Case

OURS = ("kontext_core", "kontext_core_torch_attention", "kontext_core_compiled")
RIVALS = ("limit", *OURS, "diffusers", "comfyui", "reference")


def measure(
    tokens: list[int], text: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Seconds and ratios of a block of each kind; `single` and `double` are those of the first length."""
    lengths = {}
    with torch.inference_mode():
        for image in tokens:
            lengths[str(image)] = {
                kind: _one(kind, text, image, rounds, device, dtype) for kind in ("single", "double")
            }
    return {
        **lengths[str(tokens[0])],
        "lengths": lengths,
        "text_tokens": text,
        "rounds": rounds,
        **machine(device, dtype),
    }


def _one(
    kind: str, text: int, image: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    case = Case(kind, text, image, device, dtype)
    ours = case.ours()
    rivals = {
        "limit": case.limit(),
        "kontext_core": ours,
        "kontext_core_torch_attention": case.ours("torch"),
        "kontext_core_compiled": _compiled(case),
        "diffusers": case.diffusers(),
        "comfyui": case.comfyui(),
        "reference": case.reference(),
    }
    present = {name: run for name, run in rivals.items() if run is not None}
    expected, differences = _tensors(ours(*case.inputs())), {}
    scale = max(float(part.abs().max()) for part in expected)
    compile_s = None
    for name, run in present.items():
        if name == "kontext_core":
            continue
        if name == "limit":  # nothing to compare, but it is no colder than its rivals in the first round
            run(*case.inputs())
            continue
        print(f"{kind}, {image} tokens: {name}", file=sys.stderr)
        started = time.perf_counter()
        found = _tensors(run(*case.inputs()))
        if name == "kontext_core_compiled":
            compile_s = time.perf_counter() - started
        differences[name] = max(largest_difference(name, a, b) for a, b in zip(found, expected, strict=True))
    del expected, found
    gc.collect()
    times = alternate(present, rounds, inputs=case.inputs, warmup=0)
    seconds, relative = medians(times), ratios(times, "limit")
    report: dict[str, Any] = {f"{name}_s": seconds.get(name) for name in RIVALS}
    report["ratios_to_limit"] = {name: relative.get(name) for name in RIVALS}
    report["max_abs_difference"] = max(differences.values(), default=None)
    report["abs_differences"] = {name: differences.get(name) for name in RIVALS[2:]}
    report["largest_value"] = scale
    report["first_compiled_call_s"] = compile_s
    return report


def _compiled(case: Case):
    """The same block compiled as `kontext_core.models.regional` does it; None without a compiler."""
    from kontext_core.models.regional import compiler_problem

    problem = compiler_problem(case.device.type)
    if problem is not None:
        print(f"not compiled: {problem}", file=sys.stderr)
        return None
    eager, block = case.ours(), case.block
    block.compile(dynamic=True)
    implementation, block._compiled_call_impl = block._compiled_call_impl, None

    def run(*tokens):
        block._compiled_call_impl = implementation
        try:
            return eager(*tokens)
        finally:
            block._compiled_call_impl = None

    return run


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(part.clone().float() for part in (value if isinstance(value, tuple) else (value,)))


def as_text(report: dict[str, Any]) -> str:
    lines = [
        f"One block at full width, {report['text_tokens']} text tokens; {describe(report)}; limit = 1.00",
        "",
    ]
    heads, rows = [""], {name: [name] for name in RIVALS}
    for image, kinds in report["lengths"].items():
        for kind, row in kinds.items():
            heads.append(f"{kind}, {image} picture tokens")
            for name in RIVALS:
                ratio = row["ratios_to_limit"][name]
                seconds = row[f"{name}_s"]
                rows[name].append(None if ratio is None else f"{ratio:.3f} ({seconds:.2f} s)")
    lines.append(table(heads, list(rows.values())))
    measured = [row for kinds in report["lengths"].values() for row in kinds.values()]
    largest = max(row["largest_value"] for row in measured)
    differences = []
    for name in RIVALS[2:]:
        found = [row["abs_differences"][name] for row in measured]
        if None not in found:
            differences.append(f"{name} {max(found):.2g}")
    names = ", ".join(differences) or "no rival is here"
    lines.append(f"\nlargest difference to kontext_core, of values up to {largest:.2g}: {names}")
    return "\n".join(lines)
