"""Sampling grids against the reference's formula and diffusers' scheduler, and the times that training draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kontext_core import schedules


def reference_grid(num_steps: int, num_tokens: int) -> list[float]:
    """black-forest-labs/flux sampling.py get_schedule, in double precision: the line through the two mu, then
    e^mu / (e^mu + (1/t − 1)), whose limit at t = 0 is 0."""
    mu = 0.5 + (num_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    times = [1 - i / num_steps for i in range(num_steps)]
    return [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in times] + [0.0]


@pytest.mark.parametrize(("num_tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825)])
def test_mu_is_linear_in_the_tokens(num_tokens, mu):
    assert schedules.resolution_mu(num_tokens) == pytest.approx(mu, abs=1e-12)


@pytest.mark.parametrize("mu", [0.5, 1.15, -0.7, 3.0])
def test_unshift_undoes_shift_and_the_ends_stay(mu):
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    shifted = schedules.shift_time(t, mu)
    assert torch.allclose(schedules.unshift_time(shifted, mu), t, atol=1e-12)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted.diff() > 0).all()


@pytest.mark.parametrize("num_steps", [1, 4, 28])
@pytest.mark.parametrize("num_tokens", [64, 256, 4096])
def test_the_grid_is_the_references(num_steps, num_tokens):
    grid = schedules.timesteps(num_steps, num_tokens)
    # one rounding to float32
    assert grid.dtype == torch.float32
    assert grid.tolist() == pytest.approx(reference_grid(num_steps, num_tokens), abs=1e-7)


@pytest.mark.parametrize("num_tokens", [64, 1024, 4096])
def test_the_grid_is_that_of_diffusers(num_tokens):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = np.linspace(1.0, 1 / 28, 28)
    scheduler.set_timesteps(sigmas=sigmas, mu=schedules.resolution_mu(num_tokens))
    # diffusers shifts in float32: a few roundings of 6e-8
    assert torch.allclose(schedules.timesteps(28, num_tokens), scheduler.sigmas, atol=5e-7)


def test_unshifted_and_constant_shift():
    assert torch.equal(schedules.timesteps(4, 999, "none"), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    constant = schedules.timesteps(4, 999, schedules.HOST_SHIFT)
    assert torch.equal(constant, schedules.timesteps(4, 4096))  # the resolution shift is 1.15 at 4096 tokens
    assert torch.equal(constant, schedules.timesteps(4, 64, 1.15))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_few_steps_are_equal_and_unshifted(num_steps):
    assert schedules.few_steps(num_steps).tolist() == [1 - i / num_steps for i in range(num_steps + 1)]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="num_steps is 0"):
        schedules.timesteps(0, 64)
    with pytest.raises(ValueError, match="shift is 'cosine'"):
        schedules.timesteps(4, 64, "cosine")
    with pytest.raises(ValueError, match="shift is nan"):
        schedules.timesteps(4, 64, math.nan)
    with pytest.raises(ValueError, match="1, 2 or 4 steps, not 3"):
        schedules.few_steps(3)
    with pytest.raises(ValueError, match=r"strength is 1\.5"):
        schedules.strength_timesteps(schedules.few_steps(4), 1.5)


def test_strength_keeps_the_last_steps():
    grid = schedules.few_steps(4)
    assert torch.equal(schedules.strength_timesteps(grid, 0.5), grid[2:])
    assert torch.equal(schedules.strength_timesteps(grid, 1), grid)
    assert torch.equal(schedules.strength_timesteps(grid, 0.01), grid[3:])


def test_training_times_are_logit_normal_moved_by_the_shift():
    def draw(**options):
        return schedules.training_times(20_000, 1024, torch.Generator().manual_seed(0), **options)

    plain = draw(mean=0.5, std=0.8, shift="none")
    logits = torch.logit(plain.double())
    # 20,000 draws: the mean is known to 0.8/141 = 0.006, the deviation to 0.004; 5 of each are allowed
    assert logits.mean().item() == pytest.approx(0.5, abs=0.03)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)
    # in logits the shift is an addition of mu
    moved = torch.logit(draw(mean=0.5, std=0.8).double())
    assert torch.allclose(moved - logits, torch.tensor(schedules.resolution_mu(1024)).double(), atol=1e-3)
    assert torch.equal(draw(shift="none"), draw(shift="none"))
