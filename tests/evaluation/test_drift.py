"""Drift counts what nobody asked for, follows branches, and is drawn legibly."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from kontext_core.evaluation.drift import draw_drift, measure_drift, to_json


def scene(width: int = 160, height: int = 120) -> torch.Tensor:
    rng = np.random.default_rng(0)
    smooth = ndimage.zoom(rng.random((3, 5, 6)), (1, height / 5, width / 6), order=3).clip(0, 1)
    return (torch.from_numpy(smooth).float()[None] * 2 - 1) * 0.8


def edit(image: torch.Tensor, left: int, noise: float, seed: int = 0) -> torch.Tensor:
    """The picture with a red square at `left`..`left`+25 and noise everywhere."""
    out = image + noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    out[:, :, 40:65, left : left + 25] = torch.tensor([0.9, -0.8, -0.8]).view(1, 3, 1, 1)
    return out.clamp(-1, 1)


def test_edits_themselves_are_no_drift_and_noise_is():
    start = scene()
    first = edit(start, 20, 0.01)
    second = edit(first, 100, 0.02, seed=1)
    drift = measure_drift(start, [first, second])
    expected = [-10 * math.log10((noise / 2) ** 2) for noise in (0.01, math.hypot(0.01, 0.02))]
    assert [d.psnr for d in drift] == pytest.approx(expected, abs=0.3)
    assert 0.9 < drift[1].ssim < drift[0].ssim < 1
    assert 0.03 < drift[0].edited < 0.2 and drift[1].edited > 1.5 * drift[0].edited
    assert drift[0].shift == pytest.approx((0, 0), abs=0.05) and drift[0].similarity is None


def test_a_branch_leaves_out_only_its_own_parents_edits():
    start = scene()
    first, other = edit(start, 20, 0.0), edit(start, 100, 0.0)
    drift = measure_drift(start, [first, other], parents=[None, None])
    assert math.isinf(drift[0].psnr) and math.isinf(drift[1].psnr)
    assert drift[1].edited == pytest.approx(drift[0].edited, abs=0.03)


def test_given_masks_and_an_embedding_are_used():
    start = scene()
    mask = torch.zeros(1, 1, 120, 160)
    mask[:, :, 35:70, 15:50] = 1
    drift = measure_drift(start, [edit(start, 20, 0.0)], masks=[mask], embed=lambda x: x.mean((2, 3)))
    assert math.isinf(drift[0].psnr) and drift[0].edited == pytest.approx(mask.mean().item())
    assert -1 <= drift[0].similarity <= 1
    everything = measure_drift(start, [start], masks=[torch.ones_like(mask)])
    assert math.isnan(everything[0].psnr) and everything[0].report() == "all edited"
    assert json.loads(to_json([*drift, *everything]))[1]["psnr"] is None


def test_turns_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="turn 1 has shape"):
        measure_drift(scene(), [scene(100)])
    with pytest.raises(ValueError, match="turn 1 cannot come from turn 2"):
        measure_drift(scene(), [scene(), scene()], parents=[1, None])
    with pytest.raises(ValueError, match="do not go together"):
        draw_drift([], [])


def test_the_drawing_shows_a_line_for_each_measure_and_the_pictures():
    start = scene()
    turns = [edit(start, 20, 0.01), edit(start, 60, 0.03), edit(start, 100, 0.06)]
    labels = ["Make the circle red", "Add a very long instruction " * 6, "x"]
    plain = draw_drift(measure_drift(start, turns), labels)
    full = draw_drift(measure_drift(start, turns, embed=lambda x: x.mean((2, 3))), labels, pictures=turns)
    assert plain.width == full.width == 960 and full.height > plain.height
    for picture, colors in ((plain, 2), (full, 3)):
        pixels = np.asarray(picture).reshape(-1, 3)
        lines = [(31, 96, 170), (196, 92, 20), (30, 130, 76)]
        seen = [bool((pixels == line).all(1).sum() > 300) for line in lines]
        assert seen == [True, True, colors == 3]
    # Nothing is written over the edge.
    edge = np.asarray(full)
    assert (edge[:, :4] == 255).all() and (edge[:, -4:] == 255).all()


def test_pictures_below_the_window_of_ssim_are_measured_by_what_there_is():
    start = scene()[:, :, :10, :30]
    (found,) = measure_drift(start, [(start + 0.02).clamp(-1, 1)])
    assert math.isfinite(found.psnr) and math.isnan(found.ssim)
    assert found.report().endswith(" dB, SSIM not measured outside the 0% edited")
    assert json.loads(to_json([found]))[0]["ssim"] is None
    assert draw_drift([found, found], ["one", "two"], pictures=[start] * 2).width == 960


def test_many_turns_and_equal_pictures_are_drawn():
    start = scene(64, 48)
    drift = measure_drift(start, [start.clone() for _ in range(12)])
    assert all(math.isinf(d.psnr) and d.edited == 0 for d in drift)
    assert draw_drift(drift, ["same"] * 12, pictures=[start] * 12).size[0] == 960
