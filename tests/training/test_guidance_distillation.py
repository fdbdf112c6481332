"""Guidance distillation: the target is the teacher's two passes, and the student comes nearer to it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from kontext_core.models.transformer import Flux
from kontext_core.training import mixed
from kontext_core.training.flow import FlowConfig, KontextModule
from kontext_core.training.guidance import GuidanceTask, student_of
from kontext_core.training.loop import LoopConfig, step_generator, train


def make(task_of, guidance=(1.0, 4.0)) -> GuidanceTask:
    plain = task_of()
    source = plain.module.transformer
    params = replace(source.params, guidance_embed=False)
    teacher_flow = Flux(params, operations=mixed)
    teacher_flow.load_state_dict(
        {k: v for k, v in source.state_dict().items() if not k.startswith("guidance_in")}
    )
    # words must matter, or there is nothing to guide
    with torch.no_grad():
        teacher_flow.txt_in.weight.mul_(3)
        teacher_flow.vector_in.in_layer.weight.mul_(3)
    encoders = plain.module.t5.requires_grad_(False), plain.module.clip.requires_grad_(False)
    teacher = KontextModule(teacher_flow, *encoders)
    student = KontextModule(student_of(copy.deepcopy(teacher_flow)).requires_grad_(True), *encoders)
    config = FlowConfig(guidance=guidance, caption_dropout=1.0)
    return GuidanceTask(student, plain.data, config, empty=plain.empty, dtype=torch.float32, teacher=teacher)


def test_a_new_student_is_its_teacher_so_scale_one_costs_nothing(task_of):
    task = make(task_of, guidance=(1.0, 1.0))
    loss, _ = task.loss(task.batch(0, 0, 2), step_generator(0, 0, 0))
    # the guidance embedding is new and adds zeros: the same sums twice
    assert loss < 1e-10


def test_the_target_is_both_passes_combined(task_of):
    task = make(task_of, guidance=(3.0, 3.0))
    batch = task.batch(0, 0, 2)
    loss, _ = task.loss(batch, step_generator(0, 0, 0))
    sample = replace(task.noised(batch, step_generator(0, 0, 0)), guidance=torch.ones(2))
    with torch.no_grad():
        words = task.teaching.velocity(replace(sample, dropped=torch.zeros(2, dtype=torch.bool)))
        empty = task.teaching.velocity(replace(sample, dropped=torch.ones(2, dtype=torch.bool)))
    # the student still gives `words`; it should give empty + 3·(words − empty): off by 2·(words − empty)
    assert loss.item() == pytest.approx((2 * (words - empty)).square().mean().item(), rel=1e-4)
    assert loss > 1e-6


@pytest.mark.parametrize(("above", "gain", "beyond"), [(0.0, 0.5, 1.0), (1.1, 1.0, 0.0)])
def test_guidance_may_be_weaker_and_of_high_times_alone(task_of, above, gain, beyond):
    task = make(task_of, guidance=(3.0, 3.0))
    full, _ = task.loss(task.batch(0, 0, 2), step_generator(0, 0, 0))
    task.above, task.gain = above, gain
    loss, _ = task.loss(task.batch(0, 0, 2), step_generator(0, 0, 0))
    # scale 3 is off by 2·(words − empty); half the gain by as much once; below `above` by nothing
    assert loss.item() == pytest.approx(full.item() * (beyond / 2) ** 2, rel=1e-4, abs=1e-10)


def test_the_student_learns_and_the_teacher_stays(task_of, tmp_path):
    task = make(task_of, guidance=(2.0, 5.0))
    before = copy.deepcopy(task.teacher.state_dict())
    losses = []
    config = LoopConfig(steps=60, batch=4, lr=3e-3, warmup=5, ema=0, checkpoint_every=1000)
    train(task, config, tmp_path, on_step=lambda step, steps, loss: losses.append(loss))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert all(torch.equal(before[name], value) for name, value in task.teacher.state_dict().items())


def test_a_student_without_guidance_embedding_is_refused(task_of):
    task = make(task_of)
    with pytest.raises(ValueError, match="no guidance embedding"):
        GuidanceTask(task.teacher, task.data, task.config, empty=task.empty, teacher=task.teacher)
