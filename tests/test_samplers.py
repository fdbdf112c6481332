"""Samplers on flows whose solution is known: order of convergence, exact cases, callbacks, seeds."""

from __future__ import annotations

import math

import pytest
import torch

from kontext_core import schedules
from kontext_core.samplers import SAMPLERS, dpmpp_2m, euler, few_step, heun

MEAN, SPREAD = 0.7, 0.5


def deviation(t: float) -> float:
    return math.sqrt(((1 - t) * SPREAD) ** 2 + t**2)


def gaussian_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """The exact velocity when the data is normal with MEAN and SPREAD: x_t stays at its own quantile z, so
    x_t = (1 − t)·MEAN + deviation(t)·z and the velocity is its derivative."""
    s = deviation(t)
    z = (x - (1 - t) * MEAN) / s
    return -MEAN + (t - (1 - t) * SPREAD**2) / s * z


def error(sampler, num_steps: int, start: float, stop: float) -> float:
    z = torch.tensor([[-1.5, -0.3, 0.4, 1.2]])
    x = (1 - start) * MEAN + deviation(start) * z
    grid = torch.linspace(start, stop, num_steps + 1)
    expected = (1 - stop) * MEAN + deviation(stop) * z
    return (sampler(gaussian_velocity, x, grid) - expected).abs().max().item()


@pytest.mark.parametrize(
    ("sampler", "order", "start", "stop"),
    [(euler, 1, 1.0, 0.0), (heun, 2, 1.0, 0.0), (dpmpp_2m, 2, 0.95, 0.05)],
    ids=["euler", "heun", "dpmpp_2m"],
)
def test_halving_the_step_divides_the_error_as_the_order_says(sampler, order, start, stop):
    coarse, fine = error(sampler, 16, start, stop), error(sampler, 32, start, stop)
    assert fine > 1e-6  # well above float32's rounding, or the ratio would mean nothing
    # the observed order nears the true one from either side; a quarter is the distance at these step sizes
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_the_second_order_samplers_beat_euler_on_the_whole_way():
    plain = error(euler, 16, 1.0, 0.0)
    assert error(heun, 16, 1.0, 0.0) < plain / 5
    assert error(dpmpp_2m, 16, 1.0, 0.0) < plain / 2


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_constant_x_0_is_reached_exactly(name, num_steps):
    goal = torch.tensor([[0.3, -1.0, 2.0]])
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    result = SAMPLERS[name](lambda x, t: (x - goal) / t, x, schedules.timesteps(num_steps, 64))
    # the last step ends at t = 0, on the predicted x_0: float32 rounding only
    assert torch.allclose(result, goal, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_step_is_told_every_step(name):
    grid, seen = schedules.timesteps(5, 64), []
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    result = SAMPLERS[name](gaussian_velocity, x, grid, seen.append)
    assert [info.index for info in seen] == [0, 1, 2, 3, 4]
    assert {info.num_steps for info in seen} == {5}
    assert [info.t for info in seen] == grid[1:].tolist()
    assert torch.equal(seen[-1].x, result)
    # what a step leaves to be predicted is the data: at t = 0 it is the result itself
    assert torch.allclose(seen[-1].x_0, result, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_step_may_stop_the_sampling(name):
    calls = []

    def velocity(x, t):
        calls.append(t)
        return gaussian_velocity(x, t)

    def stop(info):
        if info.index == 1:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        SAMPLERS[name](velocity, torch.zeros(1, 3), schedules.timesteps(8, 64), stop)
    assert len(set(calls)) <= 3  # Heun looks one step ahead; nothing after that was computed


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_is_kept_and_updated_in_float32(name):
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = []

    def velocity(x, t):
        seen.append(x.dtype)
        return gaussian_velocity(x, t)

    assert SAMPLERS[name](velocity, x, schedules.timesteps(4, 64)).dtype == torch.bfloat16
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, -0.1]])
@pytest.mark.parametrize("name", SAMPLERS)
def test_times_that_do_not_fall_are_an_error(name, times):
    with pytest.raises(ValueError, match="timesteps must fall strictly"):
        SAMPLERS[name](gaussian_velocity, torch.zeros(1, 3), torch.tensor(times))


def test_few_step_noises_its_prediction_again_with_seeded_noise():
    goal = torch.full((1, 4000), 2.0)
    seen = []
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    few_step(lambda x, t: (x - goal) / t, x, schedules.few_steps(4), seen.append, seed=3)
    noises = []
    for info in seen[:-1]:
        fresh = (info.x - (1 - info.t) * goal) / info.t
        # 4,000 normal numbers: mean within 4/63, deviation within 4·0.011
        assert abs(fresh.mean().item()) < 0.064 and abs(fresh.std().item() - 1) < 0.045
        noises.append(fresh)
    # fresh at every step, and not the noise it started from
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in zip(noises, [x, *noises], strict=False))


def test_few_step_seeds_by_sample():
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    grid = schedules.few_steps(4)
    together = few_step(gaussian_velocity, x, grid, seed=5)
    assert torch.equal(together, few_step(gaussian_velocity, x, grid, seed=5))
    assert not torch.equal(together, few_step(gaussian_velocity, x, grid, seed=6))
    for i in range(3):
        assert torch.equal(together[i : i + 1], few_step(gaussian_velocity, x[i : i + 1], grid, seed=5 + i))
    assert torch.equal(together, few_step(gaussian_velocity, x, grid, seed=[5, 6, 7]))
    last = 2**64 - 1  # after it comes 0
    wrapped = few_step(gaussian_velocity, x, grid, seed=last)
    assert torch.equal(wrapped, few_step(gaussian_velocity, x, grid, seed=[last, 0, 1]))
