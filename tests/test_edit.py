"""edit_image on random weights: batches, sizes, determinism, cancelling, and errors in a sentence."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from kontext_core import edit, geometry, latents
from kontext_core.edit import edit_image
from kontext_core.weights.load import load_model

SIZE = {"num_steps": 2, "size": (48, 32)}


@pytest.fixture(scope="module")
def model(random_tiny_folder):
    return load_model(random_tiny_folder)


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_same_seed_same_bits_and_another_seed_another_picture(model, picture):
    first = edit_image(model, picture, "make it red", seed=3, **SIZE)
    assert torch.equal(first.images, edit_image(model, picture, "make it red", seed=3, **SIZE).images)
    assert not torch.equal(first.images, edit_image(model, picture, "make it red", seed=4, **SIZE).images)
    assert first.images.shape == (1, 3, 32, 48) and first.images.dtype == torch.float32
    assert first.images.abs().max() <= 1
    assert set(first.seconds) == {"encode", "sample", "decode"} and first.steps == 2


@pytest.mark.parametrize("sampler", ["euler", "few_step"])
def test_a_picture_of_a_batch_is_the_one_it_is_alone(model, picture, sampler):
    pictures = torch.cat((picture, -picture, picture.flip(-1)))
    prompts = ["make it red", "", "add a star"]
    together = edit_image(model, pictures, prompts, seed=7, sampler=sampler, **SIZE)
    assert together.seeds == (7, 8, 9)
    for i in range(3):
        alone = edit_image(model, pictures[i : i + 1], prompts[i], seed=7 + i, sampler=sampler, **SIZE)
        # the same sums in batched kernels, which may round in another order: float32 noise through two steps
        assert torch.allclose(together.latent[i], alone.latent[0], atol=1e-4)
        assert torch.allclose(together.images[i], alone.images[0], atol=1e-3)


def test_one_picture_and_prompt_serve_a_batch_of_seeds(model, picture):
    batch = edit_image(model, picture, "x", batch=2, seed=[5, 9], **SIZE)
    assert len(batch.images) == 2 and batch.seeds == (5, 9)
    assert not torch.equal(batch.latent[0], batch.latent[1])


@pytest.mark.parametrize("size", [(16, 16), (16, 96), (80, 48), (112, 64)])
def test_any_multiple_of_16(model, picture, size):
    result = edit_image(model, picture, "x", num_steps=1, size=size)
    assert result.images.shape[-2:] == size[::-1]
    assert result.latent.shape[-2:] == (size[1] // 8, size[0] // 8)
    assert edit_image(model, None, "x", num_steps=1, size=size).images.shape[-2:] == size[::-1]


@pytest.mark.parametrize("size", geometry.PREFERRED_SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_preferred_size_is_left_as_it_is(size):
    # on the meta device: every shape on the way, at no cost
    plan = geometry.fit(size)
    assert plan.size == size
    latent = torch.empty(1, 16, size[1] // 8, size[0] // 8, device="meta")
    tokens = latents.pack(latent)
    assert tokens.shape[1] == size[0] * size[1] // 256
    assert latents.position_ids(*latent.shape[-2:]).shape[0] == tokens.shape[1]
    assert latents.unpack(tokens, *latent.shape[-2:]).shape == latent.shape


def test_auto_comes_back_at_the_pictures_own_size(model):
    odd = torch.rand(1, 3, 41, 67, generator=torch.Generator().manual_seed(1)) * 2 - 1
    small = copy.copy(model)
    small.preset = replace(model.preset, max_area=48 * 48)
    result = edit_image(small, odd, "x", num_steps=1)
    assert result.images.shape == (1, 3, 41, 67)
    width, height = result.geometry.size
    assert width % 16 == 0 and height % 16 == 0 and width > height
    text_only = edit_image(small, None, "x", num_steps=1)
    assert text_only.geometry is None and text_only.images.shape[-2:] == (48, 48)


def test_a_latent_can_be_the_reference(model, picture):
    latent = edit.encode_image(model, picture)
    direct = edit_image(model, picture, "x", seed=1, **SIZE)
    chained = edit_image(model, None, "x", seed=1, reference_latents=[latent], num_steps=2)
    assert torch.equal(direct.latent, chained.latent)


@pytest.mark.parametrize("convention", ["offset", "index", "uxo"])
def test_several_references_change_the_picture(model, picture, convention):
    one = edit_image(model, [picture], "x", convention=convention, **SIZE)
    two = edit_image(model, [picture, -picture], "x", convention=convention, **SIZE)
    assert not torch.allclose(one.latent, two.latent, atol=1e-4)


def test_steps_are_told_and_raising_stops_the_edit(model, picture):
    seen = []

    def on_step(info):
        seen.append(info.index)
        assert info.x_0.shape == (1, 6, 64)
        if info.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit_image(model, picture, "x", num_steps=5, size=(48, 32), on_step=on_step)
    assert seen == [0, 1]
    # nothing is left half done: the next edit is as if there had been none
    again = edit_image(model, picture, "x", seed=3, **SIZE)
    assert torch.equal(again.images, edit_image(model, picture, "x", seed=3, **SIZE).images)


def test_few_step_needs_a_distilled_model(model, picture, random_few_step_folder):
    with pytest.raises(
        ValueError, match="few-step sampling needs a distilled model and random-tiny has none"
    ):
        edit_image(model, picture, "x", few_step=4)
    distilled = load_model(random_few_step_folder)
    result = edit_image(distilled, picture, "x", few_step=2, size=(48, 32))
    assert result.steps == 2
    with pytest.raises(ValueError, match="1, 2 or 4 steps, not 3"):
        edit_image(distilled, picture, "x", few_step=3)


def test_nan_weights_are_an_error_that_says_so(model, picture):
    damaged = copy.copy(model)
    damaged.transformer = copy.deepcopy(model.transformer)
    with torch.no_grad():
        damaged.transformer.single_blocks[0].linear1.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"random-tiny gave NaN.*float32.*weights are damaged"):
        edit_image(damaged, picture, "x", **SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (50, 32)}, "size is 50.32|target is 50x32"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"guidance": -1}, "guidance is -1"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; use one of"),
        ({"shift": "log"}, "shift is 'log'"),
        ({"convention": "grid"}, "convention is 'grid'"),
        ({"fit": "squash"}, "squash"),
        ({"batch": 0}, "batch of 0"),
        ({"seed": [1, 2]}, "2 seeds for a batch of 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_are_errors_that_name_them(model, picture, options, message):
    with pytest.raises(ValueError, match=message):
        edit_image(model, picture, "x", **{**SIZE, **options})


def test_pictures_that_are_none_are_errors(model, picture):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        edit_image(model, picture[0], "x", **SIZE)
    with pytest.raises(ValueError, match="NaN or infinite"):
        edit_image(model, picture * torch.nan, "x", **SIZE)
    with pytest.raises(ValueError, match="a batch of 3 needs 1 or 3"):
        edit_image(model, torch.cat((picture, picture)), ["a", "b", "c"], **SIZE)


def test_an_empty_prompt_works(model, picture):
    result = edit_image(model, picture, "", **SIZE)
    assert result.warnings == () and torch.isfinite(result.images).all()
