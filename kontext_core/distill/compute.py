"""What a distillation step computes, counted, so that LADD and its control can be given the same.

Counted are the floating-point operations of all products (linear layers, convolutions, attention), forward and back,
as PyTorch dispatches them: text encoders, student, teacher, heads and damping. Elementwise work is not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..training.data import LatentDataset
from ..training.flow import KontextModule
from .config import DistillConfig
from .ladd import Distillation
from .student import make_student


def step_flops(
    teacher: KontextModule,
    data: LatentDataset,
    config: DistillConfig,
    *,
    batch: int = 4,
    lora_rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Floating-point operations a sample in one step with `config`; call it before blocks are compiled."""
    student = make_student(teacher.transformer, lora_rank=lora_rank)
    task = Distillation(teacher, student, data, config, dtype=dtype)
    rows = data.batch(0, 0, batch)
    with FlopCounterMode(display=False) as counter:
        losses = task.losses(rows, torch.Generator().manual_seed(0), step=0, steps=1)
        (losses.student if losses.heads is None else losses.student + losses.heads).backward()
    return counter.get_total_flops() / batch


def regression_steps(
    steps: int,
    teacher: KontextModule,
    data: LatentDataset,
    config: DistillConfig,
    *,
    lora_rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, float]:
    """How many steps of plain regression compute what `steps` LADD steps do, and how many one LADD step is worth."""
    control = replace(config, objective="regression")
    ladd, regression = (
        step_flops(teacher, data, plan, lora_rank=lora_rank, dtype=dtype) for plan in (config, control)
    )
    ratio = ladd / regression
    return max(1, round(steps * ratio)), ratio
