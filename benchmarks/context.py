"""What each way to skip work saves, and what it costs in edits done and kept, side by side.

Quality: kontext-tiny over the synthetic world's benchmark, the same edits and noise for every mode; the difference to
plain sampling is a paired one, with its 95 % interval. Speed: the whole edits of kontext-tiny, everything encoded anew,
and a block of the published width timed with all tokens and with those of a partial evaluation, put together by the
evaluations that the mode made.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from many import forget
from measure import alternate, describe, machine, ratios, table
from peers import HEAD, HEADS, Case

MODES = {
    "context every 4": {"every": 4},
    "context every 8": {"every": 8},
    "regions 0.3, every 4": {"every": 4, "regions": 0.3},
    "regions 0.6, every 8": {"every": 8, "regions": 0.6},
    "first block 0.05": {"first_block": 0.05},
    "first block 0.1": {"first_block": 0.1},
    "first block 0.1, context every 4": {"first_block": 0.1, "every": 4},
}


def measure(
    count: int,
    batch: int,
    tokens: int,
    text: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    modes: Sequence[str] = tuple(MODES),
) -> dict[str, Any]:
    """Rows of the modes. tokens: of the target, and as many of the context, for the block of full width.

    Raises:
        ValueError: there is no such mode.
    """
    from kontext_core.accelerate import Accelerate, Saved
    from kontext_core.weights.load import load_model

    unknown = [name for name in modes if name not in MODES]
    if unknown:
        raise ValueError(f"there is no mode {unknown[0]!r}; choose from {', '.join(map(repr, MODES))}")
    model = load_model("kontext-tiny", device=device)
    block = _block(tokens, text, rounds, device, dtype)
    plain = _edits(model, None, count, batch)
    rows = {
        "plain": {"both": _mean(plain["both"]), "done": _mean(plain["done"]), "kept": _mean(plain["kept"])}
    }
    for name in modes:
        settings = MODES[name]
        print(f"context: {name}", file=sys.stderr)
        found = _edits(model, Accelerate(**settings), count, batch)
        saved: Saved = found["saved"]
        evaluations = saved.full + saved.part
        differences = [a - b for a, b in zip(found["both"], plain["both"], strict=True)]
        spread = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        row = {
            "both": _mean(found["both"]),
            "done": _mean(found["done"]),
            "kept": _mean(found["kept"]),
            "points": 100 * _mean(differences),
            "points_95": 196 * spread,
            "psnr_to_plain": _psnr(found["pictures"], plain["pictures"]),
            "operations_saved": saved.share,
            "speedup_tiny": plain["seconds"] / found["seconds"],
            "full": saved.full,
            "part": saved.part,
            "skipped": saved.skipped,
        }
        if "regions" not in settings and "first_block" not in settings:
            relative = (saved.full + saved.part * block["part_to_full"]) / evaluations
            row["speedup_full_width"] = 1 / relative
        rows[name] = row
    return {
        "modes": rows,
        "block": block,
        "count": count * len(CATEGORIES),
        "steps": model.preset.default_steps,
        **machine(device, dtype),
    }


CATEGORIES = ("local", "global", "text", "style", "character")


def _edits(model, accelerate, count: int, batch: int) -> dict[str, Any]:
    """Scores of every edit in order, the pictures, seconds of the whole edits, and what was saved."""
    from kontext_core.accelerate import Saved
    from kontext_core.edit import edit_image
    from kontext_core.tiny.scorer import score
    from kontext_core.tiny.world import example

    out: dict[str, Any] = {
        "both": [],
        "done": [],
        "kept": [],
        "pictures": [],
        "seconds": 0.0,
        "saved": Saved(),
    }
    for category in CATEGORIES:
        for first in range(0, count, batch):
            examples = [
                example("test", category, i, (128, 128)) for i in range(first, min(first + batch, count))
            ]
            contexts = torch.stack([torch.from_numpy(item.context.copy()) for item in examples])
            pictures = contexts.permute(0, 3, 1, 2).float() / 127.5 - 1
            forget(model)  # what an earlier mode encoded would count as this one's speed
            started = time.process_time()
            result = edit_image(
                model,
                pictures,
                [item.instruction for item in examples],
                seed=[item.index for item in examples],
                accelerate=accelerate,
            )
            out["seconds"] += time.process_time() - started
            if result.saved is not None:
                out["saved"].add(result.saved)
            made = ((result.images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            out["pictures"].append(result.images)
            for item, picture in zip(examples, made.numpy(), strict=True):
                judged = score(item, picture)
                for key in ("both", "done", "kept"):
                    out[key].append(float(getattr(judged, key)))
    out["pictures"] = torch.cat(out["pictures"])
    return out


def _block(tokens: int, text: int, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A single-stream block over text, target and as much context, and the same in a partial evaluation."""
    from kontext_core.models.rope import Rope
    from kontext_core.models.tiled import Scratch

    with torch.inference_mode():
        case = Case("single", text, 2 * tokens, device, dtype)
        mod = case.block.modulation(torch.nn.functional.silu(case.vec))
        kept = torch.randn(2, 1, HEADS, tokens, HEAD, device=device).to(dtype)
        rope = Rope(*(part[:, :, : text + tokens] for part in case.rope))
        scratch, attention = Scratch(), case.attention()

        def reuse(q, k, v, mask=None):
            return attention(q, torch.cat((k, kept[0]), 2), torch.cat((v, kept[1]), 2), mask)

        times = alternate(
            {
                "full": lambda x: case.block(x, mod, case.rope, attention, scratch=scratch),
                "part": lambda x: case.block(x[:, : text + tokens], mod, rope, reuse, scratch=scratch),
            },
            rounds,
            inputs=case.inputs,
        )
    return {"target_tokens": tokens, "text_tokens": text, "part_to_full": ratios(times, "full")["part"]}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """dB between two batches of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / (a - b).square().mean().clamp_min(1e-12)))


def as_text(report: dict[str, Any]) -> str:
    block = report["block"]
    lines = [
        f"Ways to skip work: kontext-tiny, {report['steps']} steps, {report['count']} edits; {describe(report)}",
        f"a partial evaluation at full width ({block['target_tokens']} target, as many context and "
        f"{block['text_tokens']} text tokens) takes {block['part_to_full']:.2f} of a full one",
        "",
    ]
    head = [
        "",
        "edits right",
        "points lost (95 %)",
        "PSNR to plain",
        "operations saved",
        "kontext-tiny",
        "full width",
    ]
    rows = []
    for name, row in report["modes"].items():
        if "points" not in row:
            rows.append([name, f"{100 * row['both']:.1f} %", None, None, None, "1.00×", "1.00×"])
            continue
        wide = row.get("speedup_full_width")
        rows.append(
            [
                name,
                f"{100 * row['both']:.1f} %",
                f"{-row['points']:.1f} ± {row['points_95']:.1f}",
                f"{row['psnr_to_plain']:.1f} dB",
                f"{100 * row['operations_saved']:.0f} %",
                f"{row['speedup_tiny']:.2f}×",
                None if wide is None else f"{wide:.2f}×",
            ]
        )
    return "\n".join([*lines, table(head, rows)])
