"""What each side of LADD learns in a hundred steps on the toy: heads tell fakes, the student leaves the average.

The toy's pictures are ±P: from pure noise the teacher's single step gives something near their mean, 0. Measured is
how much of P is in a picture, |c| of c·P; regression, which averages, makes it less, LADD more.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from safetensors.torch import load_file

from kontext_core.distill.config import DistillConfig
from kontext_core.distill.ladd import Distillation
from kontext_core.distill.loop import distill
from kontext_core.distill.network import encode_conditions
from kontext_core.distill.student import make_student
from kontext_core.distill.synthesize import sample_student
from kontext_core.models.transformer import Flux
from kontext_core.training.loop import LoopConfig

LOOP = LoopConfig(
    steps=100, batch=32, lr=2e-4, warmup=5, ema=0.9, schedule="stable", log_every=10, checkpoint_every=1000
)


def trained(toy, folder, config: DistillConfig, loop: LoopConfig = LOOP) -> Flux:
    student = make_student(toy.teacher.transformer)
    task = Distillation(toy.teacher, student, toy.data(), config, dtype=torch.float32)
    return distill(task, loop, folder).eval()


@torch.inference_mode()
def pattern(toy, student: Flux) -> float:
    """Mean |c| of 64 one-step pictures."""
    rows = {key: value[:64] for key, value in load_file(toy.held_out).items()}
    p = rows["target"][0].float()  # P or −P: the sign does not matter
    given = encode_conditions(toy.teacher, rows, guidance=2.5, dtype=torch.float32)
    made = sample_student(student, given, list(range(64)), 1, guidance=2.5)
    return float(((made * p).flatten(1).sum(1) / p.square().sum()).abs().mean())


def test_heads_learn_to_tell_the_student_s_pictures_from_real_ones(toy, tmp_path):
    config = DistillConfig(head_channels=16, head_lr=3e-3, head_start=1000)
    trained(toy, tmp_path, config, replace(LOOP, steps=60))
    losses = [json.loads(line)["head_loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # 2 is undecided, 0 is all told apart
    assert losses[0] > 1.9 and losses[-1] < 1.5


def test_the_student_leaves_the_average_and_regression_goes_to_it(toy, tmp_path):
    config = DistillConfig(head_channels=16, head_lr=3e-3, head_start=20)
    start = pattern(toy, toy.teacher.transformer)
    ladd = pattern(toy, trained(toy, tmp_path / "ladd", config))
    regression = pattern(toy, trained(toy, tmp_path / "regression", DistillConfig(objective="regression")))
    # with these seeds 0.07 before, 0.13 and 0.03 after
    assert ladd > 1.3 * start and regression < 0.75 * start
