"""Fit policies and their inverses: sizes, exactness, reports and what is refused."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from kontext_core import geometry
from kontext_core.geometry import POLICIES, PREFERRED_SIZES, Geometry


def picture(width: int, height: int, seed: int, wavelength: float = 12.0) -> torch.Tensor:
    """A random picture (1,3,H,W) in [-1,1]: waves in every direction, none shorter than `wavelength`."""
    rng = random.Random(seed)
    x = torch.arange(width, dtype=torch.float64)[None, None, :]
    y = torch.arange(height, dtype=torch.float64)[None, :, None]
    out = torch.zeros(3, height, width, dtype=torch.float64)
    for _ in range(16):
        angle, k = rng.uniform(0, math.tau), math.tau / (wavelength * rng.uniform(1, 3))
        phase = torch.tensor([rng.uniform(0, math.tau) for _ in range(3)])[:, None, None]
        out += torch.cos(k * (math.cos(angle) * x + math.sin(angle) * y) + phase)
    return (out / out.abs().max()).float()[None]


def displacement(before: torch.Tensor, after: torch.Tensor) -> float:
    """Pixels by which `after` has moved at most: least squares for an affine motion on the gradients.

    It knows nothing of windows or scales, and sees a zoom as well as a shift. A Hann window takes the
    outermost pixels out, where a resampling has only half of its neighbours.
    """
    a, b = (t[0].double().numpy() for t in (before, after))
    gy, gx = np.gradient((a + b) / 2, axis=(1, 2))
    h, w = a.shape[1:]
    hann = np.sqrt(np.hanning(h + 2)[1:-1, None] * np.hanning(w + 2)[None, 1:-1])
    v, u = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    columns = [(g * m * hann).ravel() for g in (gx, gy) for m in (np.ones_like(u), u, v)]
    design = np.stack(columns, 1)
    motion = np.linalg.solve(design.T @ design, -design.T @ ((b - a) * hann).ravel())
    return float(max(np.abs(motion[:3]).sum(), np.abs(motion[3:]).sum()))


def random_sizes(count: int, seed: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    sizes = []
    while len(sizes) < count:
        aspect = math.exp(rng.uniform(-math.log(20), math.log(20)))
        side = rng.uniform(40, 500)
        width, height = round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
        if min(width, height) >= 12:
            sizes.append((width, height))
    return sizes


@pytest.mark.parametrize("policy", POLICIES)
def test_a_hundred_random_sizes_come_back_at_their_size_without_shift_or_zoom(policy):
    worst = 0.0
    for number, (width, height) in enumerate(random_sizes(100, seed=7)):
        plan = geometry.fit((width, height), policy, max_area=256 * 256)
        # Six canvas pixels a wave at least: what the canvas cannot hold cannot be registered either.
        before = picture(width, height, number, 6 * max(1.0, *(1 / n for n in plan.scale)))
        there = geometry.apply(plan, before)
        assert there.shape[2:] == (plan.size[1], plan.size[0])
        assert plan.size[0] % 16 == plan.size[1] % 16 == 0
        # For a crop only what went through the model is measured: the borders are the original itself.
        back = geometry.invert(plan, there, original=before)
        assert back.shape == before.shape
        x, y, w, h = plan.window
        worst = max(worst, displacement(*(t[:, :, y : y + h, x : x + w] for t in (before, back))))
    # The issue asks for 0.1 pixel; a correct resampling of a band-limited picture stays far below.
    assert worst < 0.1


@pytest.mark.parametrize("policy", POLICIES)
def test_at_the_real_area_large_and_odd_sizes_do_not_shift(policy):
    for number, size in enumerate([(1499, 977), (641, 1377)]):
        plan = geometry.fit(size, policy)
        before = picture(*size, number, 6 * max(1.0, *(1 / n for n in plan.scale)))
        back = geometry.invert(plan, geometry.apply(plan, before), original=before)
        x, y, w, h = plan.window
        assert displacement(*(t[:, :, y : y + h, x : x + w] for t in (before, back))) < 0.1


def test_the_measure_itself_sees_a_tenth_of_a_pixel():
    before = picture(200, 120, 3)
    shifted = geometry.resample_axis(before, -1, 200, start=0.1, step=1.0)
    assert displacement(before, shifted) == pytest.approx(0.1, abs=0.01)
    zoomed = geometry.resample_axis(before, -1, 200, start=0.2, step=199.6 / 200)
    assert displacement(before, zoomed) == pytest.approx(0.2, abs=0.02)


def test_nothing_returns_the_input_itself():
    before = picture(301, 203, 1)
    for policy in POLICIES:
        plan = geometry.fit((301, 203), policy, max_area=128 * 128)
        changed = -geometry.apply(plan, before)
        back = geometry.invert(plan, changed, original=before)
        x, y, w, h = plan.window
        inside = (back + before)[:, :, y : y + h, x : x + w]
        assert inside.abs().mean() < 0.02, policy


@pytest.mark.parametrize("shape", [(97, 61), (80, 320), (333, 47)])
@pytest.mark.parametrize("size", [(48, 80), (128, 128), (512, 32)])
def test_inside_the_picture_resampling_is_that_of_pillow(shape, size):
    image = torch.rand(shape[1], shape[0], generator=torch.Generator().manual_seed(0))
    ours = geometry.resample(image[None, None], size)[0, 0].numpy()
    pillow = np.asarray(Image.fromarray(image.numpy()).resize(size, Image.Resampling.LANCZOS))
    # Three pixels of the coarser side: from there on Pillow cuts its kernel off at the edge.
    x, y = (math.ceil(3 * max(1.0, n / m)) for n, m in zip(size, shape, strict=True))
    # Both have weights in float64; the order of rounding differs.
    np.testing.assert_allclose(ours[y:-y, x:-x], pillow[y:-y, x:-x], atol=2e-5)


def test_a_ramp_stays_the_same_ramp_up_to_the_edges():
    ramp = torch.linspace(-1, 1, 61)[None, None, None].expand(1, 1, 9, 61)
    for width in (16, 40, 97, 400):
        out = geometry.resample(ramp, (width, 9))[0, 0, 0]
        step = 61 / width
        expected = -1 + 2 * ((torch.arange(width) + 0.5) * step - 0.5) / 60
        # Inside, Lanczos itself ripples by up to 0.02 pixel; the edges must do no worse.
        assert (out - expected).abs().max() < 0.02 * 2 / 60 * max(step, 1)


def test_stretch_is_what_bfl_does_to_the_eight_bit_picture():
    pixels = ((picture(160, 90, 0)[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    plan = geometry.fit((160, 90), "stretch", max_area=128 * 128)
    ours = ((geometry.apply(plan, source)[0].permute(1, 2, 0) + 1) * 127.5).round().int().numpy()
    pillow = np.asarray(Image.fromarray(pixels).resize(plan.size, Image.Resampling.LANCZOS)).astype(int)
    # Pillow rounds to 8 bits between its two passes, with weights in fixed point: one level each.
    assert np.abs(ours - pillow)[4:-4, 4:-4].max() <= 2


def test_crop_takes_the_window_that_comfyui_takes():
    # common_upscale cuts round((1080 - 1920 / (1392 / 752)) / 2) = 21 rows off both ends.
    plan = geometry.fit((1920, 1080), "crop")
    assert plan.size == (1392, 752)
    assert plan.window == (0, 21, 1920, 1038)
    assert plan.cropped == (0, 21, 0, 21)
    assert plan.cropped_percent == pytest.approx(100 * 42 / 1080)


def test_crop_keeps_the_borders_of_the_original_bit_for_bit():
    before = picture(300, 100, 2)
    plan = geometry.fit((300, 100), "crop", (128, 128))
    after = geometry.invert(plan, torch.zeros(2, 3, 128, 128), original=before)
    x, _, w, _ = plan.window
    assert plan.cropped == (100, 0, 100, 0)
    assert torch.equal(after[:, :, :, :x], before[:, :, :, :x].expand(2, -1, -1, -1))
    assert torch.equal(after[:, :, :, x + w :], before[:, :, :, x + w :].expand(2, -1, -1, -1))
    assert (after[:, :, :, x : x + w] == 0).all()


def test_pad_mirrors_the_picture_as_often_as_the_canvas_needs():
    before = picture(16, 160, 4)
    plan = geometry.fit((16, 160), "pad", (160, 160))
    there = geometry.apply(plan, before)
    assert plan.content == (72, 0, 16, 160)
    assert plan.padded == (72, 0, 72, 0) and plan.padded_percent == pytest.approx(90)
    # Reflection about the first column: one pixel left of it stands the second column, and so on, period 30.
    assert torch.equal(there[:, :, :, 71], before[:, :, :, 1])
    assert torch.equal(there[:, :, :, 72 - 30], before[:, :, :, 0])
    assert torch.equal(there[:, :, :, 88], before[:, :, :, 14])


def test_pad_with_a_colour_fills_the_rest_with_it():
    plan = geometry.fit((64, 32), "pad", (64, 64), pad_color=(255, 0, 51))
    there = geometry.apply(plan, torch.zeros(1, 3, 32, 64))
    assert there[0, :, 0, 0].tolist() == pytest.approx([1, -1, 51 / 127.5 - 1])
    assert (there[:, :, 16:48] == 0).all()
    mask = geometry.apply(plan, torch.ones(1, 1, 32, 64), bounds=(0, 1))
    assert mask[0, 0, 0, 0] == 0 and mask[0, 0, 20, 5] == 1


def test_keep_passes_a_multiple_of_sixteen_through_bit_for_bit():
    before = picture(208, 144, 5)
    plan = geometry.fit((208, 144), "keep")
    assert torch.equal(geometry.apply(plan, before), before)
    assert torch.equal(geometry.invert(plan, before), before)
    assert geometry.fit((1000, 703), "keep").size == (1008, 704)
    assert geometry.fit((3, 500), "keep").size == (16, 496)


def test_auto_chooses_the_nearest_aspect_ratio_for_every_preferred_size():
    assert len(PREFERRED_SIZES) == 17
    for size in PREFERRED_SIZES:
        assert geometry.nearest_size(size) == size
        assert geometry.nearest_size((size[0] * 3, size[1] * 3)) == size
    assert geometry.fit((5000, 10)).size == (1568, 672)


@pytest.mark.parametrize("side", [64, 128, 256, 512, 1024])
def test_buckets_scale_with_the_area_the_model_prefers(side):
    sizes = geometry.preferred_sizes(side * side)
    assert (side, side) in sizes
    assert all(w % 16 == h % 16 == 0 for w, h in sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    # A side is off by half a multiple at most, so a small canvas strays further from the area asked for.
    assert all(abs(w * h / side**2 - 1) < 0.05 + 16 / side for w, h in sizes)


def test_one_pixel_pictures_and_extreme_ratios_go_through():
    for size in [(1, 1), (2, 1), (4000, 3), (1, 900)]:
        for policy in POLICIES:
            before = picture(*size, 6)
            plan = geometry.fit(size, policy, max_area=128 * 128)
            there = geometry.apply(plan, before)
            assert torch.isfinite(there).all()
            assert geometry.invert(plan, there, original=before).shape == before.shape


def test_half_precision_stays_half_precision_and_in_range():
    image = (torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(0)) > 0.5).bfloat16() * 2 - 1
    there = geometry.apply(geometry.fit((70, 50), max_area=128 * 128), image)
    assert there.dtype == torch.bfloat16 and there.min() >= -1 and there.max() <= 1


def test_a_geometry_survives_json():
    for plan in (
        geometry.fit((301, 203), "crop"),
        geometry.fit((301, 203), "pad", pad_color=(1, 2, 3)),
        geometry.fit((301, 203), "keep"),
    ):
        assert Geometry.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_report_says_what_was_lost_in_pixels_and_percent():
    assert geometry.fit((300, 100), "crop", (128, 128)).report() == (
        "300x100 to 128x128 by crop; cropped 100 px left, 100 px right (66.7 % of the picture)"
    )
    padded = geometry.fit((64, 32), "pad", (64, 64)).report()
    assert "padded 16 px top, 16 px bottom (50.0 % of the canvas)" in padded
    assert "aspect ratio changed by -50.0 %" in geometry.fit((64, 32), "stretch", (64, 64)).report()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((10, 10), "zoom"), "stretch, crop, pad, keep"),
        (((10, 10), "stretch", (100, 128)), "100x128.*multiples of 16, try 96x128"),
        (((10, 10), "keep", (128, 128)), "use stretch, crop or pad"),
        (((0, 10), "stretch"), "empty"),
        (((10, 10), "stretch", "large"), "'large'"),
    ],
)
def test_bad_requests_are_refused_with_what_is_allowed(arguments, words):
    with pytest.raises(ValueError, match=words):
        geometry.fit(*arguments)


def test_a_picture_that_is_its_own_canvas_goes_there_and_back_as_it_is():
    plan = geometry.unfitted((104, 73))
    image = torch.rand(1, 3, 73, 104)
    assert torch.equal(geometry.invert(plan, geometry.apply(plan, image)), image)
    assert Geometry.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="multiples of 16"):
        Geometry(
            policy="keep", source=(104, 73), size=(104, 72), window=(0, 0, 104, 73), content=(0, 0, 104, 72)
        )


def test_a_padding_is_mirror_or_a_colour():
    assert geometry.parse_padding(" Mirror ") is None and geometry.parse_padding("#FF8000") == (255, 128, 0)
    with pytest.raises(ValueError, match="use mirror, or a colour"):
        geometry.parse_padding("orange")


def test_a_wrong_canvas_or_a_missing_original_is_refused():
    plan = geometry.fit((300, 100), "crop", (128, 128))
    with pytest.raises(ValueError, match=r"expected .B,C,100,300."):
        geometry.apply(plan, torch.zeros(1, 3, 128, 128))
    with pytest.raises(ValueError, match=r"expected .B,C,128,128."):
        geometry.invert(plan, torch.zeros(1, 3, 100, 300))
    with pytest.raises(ValueError, match="give the original"):
        geometry.invert(plan, torch.zeros(1, 3, 128, 128))
    with pytest.raises(ValueError, match="has the fields"):
        Geometry.from_json({"policy": "crop"})
