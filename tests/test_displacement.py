"""What the parts of a picture say of a shift: a known one is found where they are softened, tinted and bent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kontext_core.displacement import common_displacement
from kontext_core.geometry import resample_axis
from kontext_core.registration import blur, match
from kontext_core.tiny import world


def scene(number: int, size: tuple[int, int] = (150, 120)) -> torch.Tensor:
    """A scene of the synthetic world, much of it without an edge: (3,H,W) in [0,1]."""
    pixels = world.example("test", "local", number, size).context
    return torch.from_numpy(pixels.copy()).movedim(-1, 0).float() / 255


def field(height: int, width: int, cell: int, generator: torch.Generator) -> torch.Tensor:
    """(H,W) of random numbers that change over `cell` pixels."""
    drawn = torch.randn(1, 1, height // cell + 2, width // cell + 2, generator=generator)
    return F.interpolate(drawn, scale_factor=cell, mode="bicubic")[0, 0, :height, :width]


def worn(image: torch.Tensor, shift: float, seed: int) -> torch.Tensor:
    """Moved to the right by `shift`, then softened and tinted here and there, as an autoencoder does, and noisy."""
    generator = torch.Generator().manual_seed(seed)
    height, width = image.shape[1:]
    out = resample_axis(image, -1, width, start=-shift, step=1.0)
    share = (field(height, width, 24, generator).clamp(-1, 1) + 1) / 2
    out = blur(out[None], 0.7)[0] * (1 - share) + blur(out[None], 2.0)[0] * share
    out = out + torch.stack([field(height, width, 16, generator) for _ in range(3)]) * 3 / 255
    return (out + torch.randn(out.shape, generator=generator) / 255).clamp(0, 1)


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.3])
def test_a_known_shift_is_found_in_pictures_that_came_back_softer_and_tinted(shift):
    for number in range(4):
        found = match(scene(number), worn(scene(number), shift, number))
        assert found.reliable and found.shift == pytest.approx((shift, 0), abs=0.05)
        assert max(found.error) < 0.05


def test_what_is_added_to_a_shift_is_added_to_what_is_found():
    """Whatever the softening itself does to the measure, it does not change what a movement does to it."""
    for number in range(7, 12):
        after = worn(scene(number), 0.0, number)
        moved = resample_axis(after, -1, after.shape[-1], start=-0.2, step=1.0)
        one, two = (match(scene(number), picture).shift[0] for picture in (after, moved))
        assert two - one == pytest.approx(0.2, abs=0.01)


def test_along_its_edges_a_picture_tells_nothing_and_the_error_says_so():
    drawn = torch.rand(3, 90, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 120)
    stripes = blur(drawn[None].contiguous(), 1.5)[0]
    moved = resample_axis(stripes, -2, 90, start=-0.2, step=1.0)
    noisy = moved + 2 / 255 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(1))
    for after in (moved, noisy):
        found = match(stripes, after)
        assert found.shift == pytest.approx((0.0, 0.2), abs=0.01)
        assert found.error[0] == float("inf") and found.error[1] < 0.01
        assert "(nothing tells, +0.20) px" in found.report()


def test_blocks_that_were_edited_do_not_count():
    before = scene(2)
    after = resample_axis(before, -1, before.shape[-1], start=-0.15, step=1.0)
    after[:, 40:90, 60:130] = scene(9, (70, 50))
    found = common_displacement(blur(before[None], 1.0)[0], blur(after[None], 1.0)[0], torch.ones(120, 150))
    assert found.displacement.tolist() == pytest.approx([0.15, 0.0], abs=0.02)


def test_a_flat_picture_and_one_of_no_weight_say_that_they_know_nothing():
    flat = torch.full((3, 40, 40), 0.5)
    for weight in (torch.ones(40, 40), torch.zeros(40, 40)):
        found = common_displacement(flat, flat + 0.01, weight)
        assert found.displacement.abs().max() < 1e-6 and found.error.min() > 1
