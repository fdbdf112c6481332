"""The convention: t = 1 is noise, velocity points from data to noise, and every conversion inverts another."""

from __future__ import annotations

import pytest
import torch

from kontext_core import flow


@pytest.fixture
def line():
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(3, 5, 8, generator=generator) for _ in range(2))
    return x_0, eps, torch.tensor([0.2, 0.5, 0.9])


def test_the_ends_are_data_and_noise(line):
    x_0, eps, _ = line
    assert torch.equal(flow.interpolate(x_0, eps, 0.0), x_0)
    assert torch.equal(flow.interpolate(x_0, eps, 1.0), eps)


def test_velocity_is_the_derivative_of_the_line(line):
    x_0, eps, _ = (part.double() for part in line)
    step = (flow.interpolate(x_0, eps, 0.7) - flow.interpolate(x_0, eps, 0.3)) / 0.4
    # a straight line: the difference quotient is the derivative, to rounding
    assert torch.allclose(step, flow.velocity_target(x_0, eps), atol=1e-12)
    assert torch.equal(flow.velocity_target(x_0, eps), eps - x_0)


def test_both_ends_and_the_velocity_are_found_again(line):
    x_0, eps, t = line
    x_t = flow.interpolate(x_0, eps, t)
    velocity = flow.velocity_target(x_0, eps)
    # each conversion is one multiplication and one addition in float32
    assert torch.allclose(flow.x_0_from_velocity(x_t, velocity, t), x_0, atol=1e-6)
    assert torch.allclose(flow.eps_from_velocity(x_t, velocity, t), eps, atol=1e-6)
    assert torch.allclose(flow.velocity_from_x_0(x_t, x_0, t), velocity, atol=1e-5)


def test_each_sample_has_its_own_time(line):
    x_0, eps, t = line
    together = flow.interpolate(x_0, eps, t)
    for i in range(3):
        assert torch.equal(together[i], flow.interpolate(x_0[i], eps[i], float(t[i])))


def test_half_precision_is_rounded_once(line):
    x_0, eps, t = (part.bfloat16() for part in line)
    exact = flow.interpolate(x_0.float(), eps.float(), t.float())
    mixed = flow.interpolate(x_0, eps, t.float())
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, exact.bfloat16())
