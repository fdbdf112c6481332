"""Many at once: a batch of prompts over one reference, and of references over one prompt, with kontext-tiny.

Per picture beside one edit alone, everything encoded anew in each call, and what was encoded in it: each thing once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from measure import alternate, describe, machine, medians, ratios, table

STEPS = 4
SUBJECTS = ("prompts over one reference", "references over one prompt")


def measure(counts: list[int], rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """{subject: {count: row}} of each batch size; a row has seconds and ratio per picture, and what was encoded."""
    from kontext_core.weights.load import load_model

    model = load_model("kontext-tiny", device=device, dtype=dtype)
    report: dict[str, Any] = {}
    for subject in SUBJECTS:
        rivals = {str(count): partial(_edit, model, subject, count) for count in counts}
        times = alternate(rivals, rounds, inputs=partial(forget, model))
        per_picture = {name: [value / int(name) for value in values] for name, values in times.items()}
        relative = ratios(per_picture, str(counts[0]))
        report[subject] = {
            name: {"s": seconds, "ratio": relative[name], **_encoded(model, subject, int(name))}
            for name, seconds in medians(per_picture).items()
        }
    return {**report, "steps": STEPS, **machine(device, next(model.transformer.parameters()).dtype)}


def forget(model) -> tuple:
    """Empty what prompts and pictures were encoded to; no arguments for the call that follows."""
    from kontext_core import cache

    cache.clear(model.autoencoder)
    cache.clear(model.t5)
    return ()


def _edit(model, subject: str, count: int) -> None:
    from kontext_core.edit import edit_image

    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(1 if subject == SUBJECTS[0] else count, 3, 128, 128, generator=generator) * 2 - 1
    prompts = [f"make the ball number {i}" for i in range(count)] if subject == SUBJECTS[0] else "make it red"
    edit_image(model, pictures, prompts, num_steps=STEPS)


def _encoded(model, subject: str, count: int) -> dict[str, int]:
    """How many pictures and prompts one call encodes, by the caches' own count."""
    from kontext_core.cache import cache_of

    forget(model)
    caches = {
        "pictures": cache_of(model.autoencoder),
        "prompts": cache_of(model.t5, model.clip, model.t5_tokenizer, model.clip_tokenizer),
    }
    before = {name: cache.misses for name, cache in caches.items()}
    _edit(model, subject, count)
    return {f"{name}_encoded": cache.misses - before[name] for name, cache in caches.items()}


def as_text(report: dict[str, Any]) -> str:
    lines = [
        f"many at once ({describe(report)}; kontext-tiny, {report['steps']} steps, nothing encoded before)"
    ]
    head = ["batch", "s a picture", "beside one alone", "pictures encoded", "prompts encoded"]
    for subject in SUBJECTS:
        rows = [
            [name, row["s"], row["ratio"], row["pictures_encoded"], row["prompts_encoded"]]
            for name, row in report[subject].items()
        ]
        lines += ["", f"{subject}:", "", table(head, rows)]
    return "\n".join(lines)
