"""The student's times and their stages, the re-noising, and the hinge losses."""

from __future__ import annotations

import pytest
import torch

from kontext_core.distill.config import (
    STUDENT_TIMES,
    DistillConfig,
    TimeStage,
    renoise_times,
    student_times,
)
from kontext_core.distill.losses import discriminator_hinge, generator_hinge
from kontext_core.schedules import few_steps


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_student_learns_exactly_the_times_that_few_steps_visit():
    visited = {float(t) for number in (1, 2, 4) for t in few_steps(number)[:-1]}
    assert visited == set(STUDENT_TIMES)


def test_probabilities_change_with_the_share_of_the_training():
    config = DistillConfig()
    assert config.probabilities(0, 100) == (0, 0, 0.5, 0.5)
    assert config.probabilities(9, 100) == (0, 0, 0.5, 0.5)
    assert config.probabilities(10, 100) == (0.7, 0.1, 0.1, 0.1)
    assert config.probabilities(99, 100) == (0.7, 0.1, 0.1, 0.1)


def test_times_are_drawn_with_the_stage_s_probabilities():
    t = student_times(4000, (0.7, 0.1, 0.1, 0.1), generator())
    shares = [float((t == value).float().mean()) for value in STUDENT_TIMES]
    assert shares == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.025)  # three standard deviations of 4000 draws
    assert set(student_times(400, (0, 0, 0.5, 0.5), generator()).tolist()) == {0.5, 0.25}


def test_renoising_is_logit_normal():
    logits = torch.logit(renoise_times(4000, 1.0, 1.0, generator()).double())
    assert float(logits.mean()) == pytest.approx(1, abs=0.05)
    assert float(logits.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((TimeStage(start=0.5, probabilities=(1, 0, 0, 0)),), "the first starts at 0"),
        ((TimeStage(start=0, probabilities=(0.5, 0.6, 0, 0)),), "add up to 1"),
        ((), "the first starts at 0"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(stages=stages)


@pytest.mark.parametrize("wrong", [{"damping": -0.1}, {"damping": float("nan")}, {"head_start": -1}])
def test_a_damping_or_a_head_start_below_zero_is_refused(wrong):
    with pytest.raises(ValueError, match="must be 0 or more"):
        DistillConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"renoise_mean": float("nan")}, {"renoise_std": -1.0}])
def test_a_noise_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match="renoise_mean is"):
        DistillConfig(**wrong)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="use 'ladd' or 'regression'"):
        DistillConfig(objective="gan")


def test_the_discriminator_goes_down_by_scoring_real_high_and_fake_low():
    high, low = [torch.full((2, 4), 3.0)], [torch.full((2, 4), -3.0)]
    assert discriminator_hinge(high, low) == 0
    assert discriminator_hinge(low, high) == 8
    assert discriminator_hinge([torch.zeros(2, 4)], [torch.zeros(2, 4)]) == 2  # undecided


def test_the_student_goes_down_by_scoring_high_and_never_saturates():
    scores = torch.tensor([[5.0, -5.0]], requires_grad=True)
    generator_hinge([scores]).backward()
    assert (scores.grad < 0).all()


def test_heads_count_alike_whatever_their_size():
    small, large = torch.full((1, 1), -1.0), torch.full((8, 64), 1.0)
    assert generator_hinge([small, large]) == 0
