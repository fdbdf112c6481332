"""Packing, position ids and noise: exact properties, so every comparison is bit for bit."""

from __future__ import annotations

import pytest
import torch

from kontext_core import latents


@pytest.mark.parametrize("cells", [(2, 2), (16, 16), (6, 10), (196, 84)])
def test_unpack_undoes_pack(cells):
    latent = torch.randn(2, 16, *cells, generator=torch.Generator().manual_seed(0))
    tokens = latents.pack(latent)
    assert tokens.shape == (2, cells[0] * cells[1] // 4, 64)
    assert torch.equal(latents.unpack(tokens, *cells), latent)


def test_a_token_holds_its_patch_channel_by_channel():
    latent = torch.arange(3 * 4 * 6).reshape(1, 3, 4, 6)
    tokens = latents.pack(latent)
    for row in range(2):
        for column in range(3):
            patch = latent[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(tokens[0, 3 * row + column], patch.flatten())


def test_odd_cells_and_wrong_token_counts_are_errors_that_say_what_to_do():
    with pytest.raises(ValueError, match=r"5×4 cells.*multiples of 16"):
        latents.pack(torch.zeros(1, 16, 4, 5))
    with pytest.raises(ValueError, match="3 tokens do not fill"):
        latents.unpack(torch.zeros(1, 3, 64), 4, 4)


def test_position_ids_are_index_row_and_column():
    ids = latents.position_ids(4, 6, index=2, offset_y=10, offset_x=20)
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[2, 10 + row, 20 + column] for row in range(2) for column in range(3)]
    assert latents.position_ids(4, 6)[:, 0].eq(0).all()
    assert latents.text_ids(5).shape == (5, 3) and not latents.text_ids(5).any()


def test_a_sample_of_a_batch_has_the_noise_of_its_own_seed():
    batch = latents.noise(3, 4, 6, 10)
    assert batch.shape == (3, 16, 4, 6) and batch.dtype == torch.float32
    for i in range(3):
        assert torch.equal(batch[i : i + 1], latents.noise(1, 4, 6, 10 + i))
    listed = latents.noise(3, 4, 6, [12, 10, 11])
    assert torch.equal(listed, batch[[2, 0, 1]])


def test_seeds_of_a_batch_go_on_from_0_after_the_largest_one():
    last = 2**64 - 1
    assert [latents.seed_after(last, i) for i in range(3)] == [last, 0, 1] and latents.seed_after(4) == 5
    batch = latents.noise(2, 4, 6, last)
    assert torch.equal(batch, torch.cat([latents.noise(1, 4, 6, seed) for seed in (last, 0)]))


def test_noise_does_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = latents.noise(1, 4, 4, 0)
    torch.manual_seed(2)
    assert torch.equal(first, latents.noise(1, 4, 4, 0))


def test_bfl_noise_is_one_draw_in_bfloat16():
    # black-forest-labs/flux sampling.py get_noise: one seeded generator, torch.randn in bfloat16
    expected = torch.randn(2, 16, 4, 6, dtype=torch.bfloat16, generator=torch.Generator("cpu").manual_seed(7))
    assert torch.equal(latents.noise(2, 4, 6, 7, bfl=True), expected)


def test_too_few_seeds_are_an_error():
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        latents.noise(3, 4, 4, [1, 2])
