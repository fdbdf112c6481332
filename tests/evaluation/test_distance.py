"""The patch distance and the sharpness: zero for the same, ordered as the eye orders, the same every time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kontext_core.evaluation.distance import (
    compare,
    distance,
    mean_share,
    patch_space,
    sharpness,
    sharpness_share,
)


def pictures(count: int = 48, seed: int = 0, size: int = 24) -> torch.Tensor:
    """Bars of random place, direction and colour: pictures with edges."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.zeros(count, 3, size, size)
    for picture in made:
        color = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        start, width = (int(torch.randint(2, 10, (), generator=generator)) for _ in range(2))
        picture += torch.rand(3, 1, 1, generator=generator) - 0.5
        if torch.rand((), generator=generator) < 0.5:
            picture[:, start : start + width] = color
        else:
            picture[:, :, start : start + width] = color
    return made


def blurred(images: torch.Tensor, size: int = 5) -> torch.Tensor:
    return F.avg_pool2d(F.pad(images, [size // 2] * 4, mode="replicate"), size, stride=1)


def test_equal_sets_are_at_distance_zero_and_order_does_not_matter():
    images = pictures()
    space = patch_space(images)
    assert distance(space, images, images) == 0
    assert distance(space, images.flip(0), images) == pytest.approx(0, abs=1e-6)  # sums in another order


def test_blur_moves_a_set_away_and_more_blur_more():
    truth, other = pictures(seed=0), pictures(seed=1)
    space = patch_space(truth)
    found = [distance(space, x, truth) for x in (other, blurred(other, 3), blurred(other, 5))]
    assert found == sorted(found) and found[2] > 2 * found[0]


def test_one_picture_for_all_is_far_even_if_it_is_a_real_one():
    truth, other = pictures(seed=0), pictures(seed=1)
    space = patch_space(truth)
    assert distance(space, other[:1].expand_as(other), truth) > 2 * distance(space, other, truth)


def test_the_distance_of_shifted_noise_is_the_shift():
    # Wasserstein distance of N(m, 1) and N(0, 1) is m; on one direction of 1×1 patches of one channel that is all
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(64, 1, 16, 16, generator=generator)
    space = patch_space(truth, levels=1, patch=1, num_directions=4)
    # the histograms' cells are 10/128 wide
    assert distance(space, truth + 0.5, truth) == pytest.approx(0.5, abs=0.04)


def test_a_comparison_is_deterministic_and_its_intervals_hold_the_value():
    truth, other = pictures(seed=0), pictures(seed=1)
    first, second = (compare({"sharp": other, "blurred": blurred(other)}, truth) for _ in range(2))
    assert first == second
    for interval in (*first.distances.values(), *first.nearer.values()):
        assert interval.low <= interval.value <= interval.high
    assert first.nearer["blurred"].low > 0 and "sharp" not in first.nearer


def test_each_set_is_compared_with_the_one_that_is_named():
    truth, other = pictures(seed=0), pictures(seed=1)
    sets = {"sharp": other, "blurred": blurred(other), "more": blurred(other, 7)}
    found = compare(sets, truth, rivals={"more": "blurred", "sharp": "blurred"})
    apart = {name: found.distances[name].value for name in sets}
    assert list(found.nearer) == ["more", "sharp"]
    for name, interval in found.nearer.items():
        assert interval.value == pytest.approx(apart[name] - apart["blurred"], abs=1e-6)
    assert found.nearer["sharp"].high < 0 < found.nearer["more"].low


def test_a_mean_s_share_is_paired_and_holds_the_value():
    generator = torch.Generator().manual_seed(0)
    theirs = torch.rand(200, generator=generator) + 1
    rivals = 0.5 * theirs + 0.01 * torch.rand(200, generator=generator)
    alone, above = mean_share(0.8 * theirs, theirs), mean_share(0.8 * theirs, theirs, rivals)
    # the same numbers scaled: resampled together, nothing of their own spread is left
    assert alone.value == pytest.approx(0.8) and alone.high - alone.low < 1e-5
    assert above.value == pytest.approx(0.8 - float(rivals.mean() / theirs.mean()), abs=1e-5)
    assert above.low < above.value < above.high and above.high - above.low < 0.01
    right = (torch.arange(8) % 4 == 0).float()
    assert mean_share(right, right).value == 1  # though some resamples hold no right one
    with pytest.raises(ValueError, match="nothing to be a share of"):
        mean_share(right, torch.zeros(8))


def test_sharpness_falls_with_blur_and_is_a_share_of_the_truth():
    truth = pictures()
    assert (sharpness(blurred(truth)) < sharpness(truth)).all()
    assert sharpness_share(truth, truth).value == 1
    share = sharpness_share(blurred(truth), truth)
    assert share.high < 0.8


def test_sets_that_cannot_be_compared_are_refused():
    truth = pictures(8)
    with pytest.raises(ValueError, match="one picture a request"):
        compare({"other": truth[:4]}, truth)
    with pytest.raises(ValueError, match="too small for 5 levels"):
        patch_space(truth, levels=5)
    with pytest.raises(ValueError, match="no distribution"):
        patch_space(truth[:1])
