"""A loaded model as the benchmark's editor: pictures and instructions in, pictures out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..accelerate import Accelerate
from ..edit import edit_image
from ..latents import seed_after
from ..schedules import Shift
from .bench import Editor
from .world import Example

if TYPE_CHECKING:
    from ..weights.load import KontextModel

SAMPLER, SHIFT = "few_step", 2.5
"""How the suite samples in many steps: kontext-tiny gets most right where it looks longest at much noise and each guess
of the picture is noised afresh, which forgets its errors (docs/log.md has it beside Euler)."""


def model_editor(
    model: KontextModel,
    *,
    num_steps: int | None = None,
    few_step: int | None = None,
    guidance: float | None = None,
    sampler: str = SAMPLER,
    shift: Shift = SHIFT,
    seed: int = 0,
    accelerate: Accelerate | None = None,
) -> Editor:
    """An editor that runs `edit_image`; each example's noise comes from seed + its index.

    Args:
        num_steps, few_step, guidance, sampler, shift, accelerate: as `edit_image` takes them.
    """

    def edit(examples: list[Example]) -> list[np.ndarray]:
        height, width = examples[0].target.shape[:2]
        pictures = None
        if examples[0].context is not None:
            stacked = torch.from_numpy(np.stack([example.context for example in examples]))
            pictures = stacked.permute(0, 3, 1, 2).float() / 127.5 - 1
        result = edit_image(
            model,
            pictures,
            [example.instruction for example in examples],
            num_steps=num_steps,
            few_step=few_step,
            guidance=guidance,
            sampler=sampler,
            shift=shift,
            seed=[seed_after(seed, example.index) for example in examples],
            accelerate=accelerate,
            size=(width, height) if pictures is None else "auto",
        )
        pixels = ((result.images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).numpy())

    return edit
