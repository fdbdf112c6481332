"""What is not edited is returned bit for bit; the edit sets in gently, aligned and in the right colour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from kontext_core import images
from kontext_core.preserve import _components as components
from kontext_core.preserve import changed_mask, latent_mask, preserve, seam


def scene(seed: int = 0, width: int = 160, height: int = 120) -> torch.Tensor:
    """A smooth picture with edges (1,3,H,W) in [0,1]."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.zoom(rng.random((3, 5, 6)), (1, height / 5, width / 6), order=3).clip(0, 1)
    smooth[:, 20:50, 90:130] = rng.random((3, 1, 1))
    return torch.from_numpy(smooth * 0.8 + 0.1).float()[None]


def tinted_edit(original: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The original as a model gives it back: noisy, tinted, with a red square at x 40..80, y 60..90."""
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(seed)) * 2 / 255
    edit = original * 1.04 + 0.02 + noise
    edit[:, :, 60:90, 40:80] = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1)
    return edit.clamp(0, 1)


def square(value: float = 1.0) -> torch.Tensor:
    mask = torch.zeros(1, 1, 120, 160)
    mask[:, :, 55:95, 35:85] = value
    return mask


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("kind", ["unit", "signed", "uint8", "half"])
def test_no_pixel_outside_the_mask_changes_in_any_type(kind, automatic):
    original, edit = scene(), tinted_edit(scene())
    bounds = (0.0, 1.0)
    if kind == "signed":
        original, edit, bounds = original * 2 - 1, edit * 2 - 1, (-1.0, 1.0)
    elif kind == "uint8":
        original, edit = ((t * 255).round().byte() for t in (original, edit))
    elif kind == "half":
        original, edit = original.half(), edit.half()
    result = preserve(original, edit, None if automatic else square(), bounds=bounds)
    outside = (result.mask == 0).expand_as(original)
    assert result.image.dtype == original.dtype
    assert 0.5 < outside.float().mean() < 0.97
    assert torch.equal(result.image[outside], original[outside])
    assert (result.image != original).any()


def test_the_edit_is_whole_inside_and_has_the_colour_of_the_original():
    original, edit = scene(), tinted_edit(scene())
    result = preserve(original, edit, square(), feather=4, bounds=(0, 1))
    assert result.matches[0].gain == pytest.approx((1.04,) * 3, abs=0.01)
    # The middle of the square is the edit with the tint taken out of it.
    expected = (torch.tensor([0.9, 0.1, 0.1]) - 0.02) / 1.04
    assert torch.allclose(result.image[0, :, 75, 60], expected, atol=0.01)
    # Between the square and the mask's edge the edit shows the original's content: no seam is left.
    assert (result.image - original)[:, :, 56:59, 36:84].abs().mean() < 1.5 / 255
    raw = preserve(original, edit, square(), feather=4, match_color=False, bounds=(0, 1))
    assert (raw.image - original)[:, :, 56:59, 36:84].abs().mean() > 3 / 255


@pytest.mark.parametrize("seed", range(4))
def test_a_found_mask_covers_the_change_and_little_else(seed):
    original = scene(seed)
    result = preserve(original, tinted_edit(original, seed), grow=4, bounds=(0, 1))
    mask = result.mask[0, 0]
    assert (mask[60:90, 40:80] == 1).all()
    assert mask.sum() < 60 * 70
    assert "% of the picture edited; moved by" in result.report()


def test_a_change_of_lettering_alone_is_found():
    original = scene(2)
    original[:, :, 70:82, 50:100:4] = 0.1
    edit = original.clone()
    edit[:, :, 70:82, 50:100] = torch.roll(edit[:, :, 70:82, 50:100], 2, 3)
    mask = changed_mask(original[0], edit[0], grow=0)[0]
    assert mask[72:80, 55:95].mean() > 0.9 and mask.mean() < 0.2


def test_an_unchanged_picture_gives_an_empty_mask_and_itself():
    original = scene(5)
    result = preserve(original, original.clone(), bounds=(0, 1))
    assert result.mask.sum() == 0 and torch.equal(result.image, original)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(0)) * 3 / 255
    assert preserve(original, (original + noise).clamp(0, 1), bounds=(0, 1)).mask.sum() == 0


def test_holes_are_filled_and_specks_left_out():
    original = scene(6, 200, 200)
    edit = original.clone()
    edit[:, :, 60:140, 60:140] = 0.95
    edit[:, :, 92:106, 92:106] = original[:, :, 92:106, 92:106]
    edit[:, :, 20, 20] += 0.3
    mask = changed_mask(original[0], edit[0], grow=0)[0]
    assert mask[60:140, 60:140].all() and mask[15:26, 15:26].sum() == 0


def test_batches_are_done_picture_by_picture():
    originals = torch.cat([scene(0), scene(1)])
    edits = tinted_edit(originals)
    together = preserve(originals, edits, bounds=(0, 1))
    for i in range(2):
        alone = preserve(originals[i : i + 1], edits[i : i + 1], bounds=(0, 1))
        assert torch.equal(together.image[i], alone.image[0])
    assert len(together.matches) == 2
    one = preserve(originals[:1], edits, square(), bounds=(0, 1))
    assert one.image.shape == edits.shape


def test_the_originals_alpha_is_kept():
    original = torch.cat([scene(), torch.rand(1, 1, 120, 160)], 1)
    result = preserve(original, tinted_edit(original[:, :3]), square(), bounds=(0, 1))
    assert result.image.shape == original.shape
    assert torch.equal(result.image[:, 3], original[:, 3])


def test_masks_come_in_every_shape_a_host_gives():
    original, edit = scene(), tinted_edit(scene())
    masks = (square(), square()[0], square()[0, 0])
    results = [preserve(original, edit, mask, bounds=(0, 1)).image for mask in masks]
    assert all(torch.equal(results[0], other) for other in results)


def test_a_grey_mask_shows_a_part_of_the_edit():
    original, edit = scene(), tinted_edit(scene())
    half = preserve(original, edit, square(0.5), feather=0, match_color=False, align=False, bounds=(0, 1))
    middle = (original + (edit - original) * 0.5)[:, :, 75, 60]
    assert torch.allclose(half.image[:, :, 75, 60], middle, atol=1e-6)


def test_an_empty_and_a_full_mask_are_the_original_and_the_edit():
    original, edit = scene(), tinted_edit(scene())
    assert torch.equal(preserve(original, edit, torch.zeros(120, 160), bounds=(0, 1)).image, original)
    assert torch.equal(preserve(original, edit, torch.ones(120, 160), bounds=(0, 1)).image, edit)


@pytest.mark.parametrize("feather", [1, 5, 12])
def test_the_seam_follows_the_euclidean_distance_to_the_outside(feather):
    inside = torch.rand(2, 1, 40, 50, generator=torch.Generator().manual_seed(0)) > 0.01
    distance = np.stack([ndimage.distance_transform_edt(m[0].numpy()) for m in inside])[:, None]
    ramp = torch.from_numpy(distance).float().div(feather + 1).clamp(0, 1)
    assert torch.allclose(seam(inside, feather), ramp * ramp * (3 - 2 * ramp), atol=1e-6)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.55, 0.7])
def test_components_are_those_of_scipy(diagonal, share):
    cells = torch.rand(60, 71, generator=torch.Generator().manual_seed(1)) < share
    ours = components(cells, diagonal=diagonal)
    theirs, count = ndimage.label(cells.numpy(), np.ones((3, 3)) if diagonal else None)
    assert ours.max() == count
    # The numbers differ, the partition does not: each of ours meets one of theirs only.
    assert len(set(zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True))) == count + 1


def test_a_latent_cell_is_edited_when_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 32, 48)
    mask[0, 0, 9, 17] = 1
    cells = latent_mask(mask)
    assert cells.shape == (1, 1, 4, 6) and cells[0, 0, 1, 2] == 1 and cells.sum() == 1


def test_what_does_not_go_together_is_refused():
    original, edit = scene(), tinted_edit(scene())
    with pytest.raises(ValueError, match="160x120 and the edit 150x120: bring the edit back"):
        preserve(original, edit[..., :150])
    with pytest.raises(ValueError, match="give both in one type"):
        preserve(original, (edit * 255).byte())
    with pytest.raises(ValueError, match="2 originals for 1 edits"):
        preserve(original.repeat(2, 1, 1, 1), edit)
    with pytest.raises(ValueError, match="make it on the original picture"):
        preserve(original, edit, torch.ones(64, 64))
    with pytest.raises(ValueError, match="0 or more pixels"):
        preserve(original, edit, feather=-1)
    with pytest.raises(ValueError, match="the edit holds NaN"):
        preserve(original, edit * float("nan"))


def test_through_files_the_untouched_pixels_are_the_same_bytes(tmp_path):
    original, edit = scene() * 2 - 1, tinted_edit(scene()) * 2 - 1
    before = images.load_image(images.save_image(tmp_path / "a.png", original)).image
    result = preserve(before, edit, square())
    after = images.load_image(images.save_image(tmp_path / "b.png", result.image)).image
    outside = (square() == 0).expand_as(before)
    assert torch.equal(images.to_uint8(after)[outside], images.to_uint8(before)[outside])
