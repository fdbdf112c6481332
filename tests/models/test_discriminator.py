"""The discriminator's heads: what they see, and what they tell apart."""

from __future__ import annotations

import pytest
import torch

from kontext_core.models.discriminator import (
    BlockFeatures,
    Discriminator,
    DiscriminatorParams,
    discriminator_params,
)
from kontext_core.models.transformer import Flux, TransformerParams

PARAMS = TransformerParams(
    in_channels=8,
    out_channels=8,
    vec_in_dim=4,
    context_in_dim=6,
    hidden_size=16,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(2, 2, 4),
)
TARGET, CONTEXT, TEXT = 4, 6, 3


@pytest.fixture(scope="module")
def flux() -> Flux:
    torch.manual_seed(0)
    return Flux(PARAMS)


def arguments(batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    img = torch.randn(batch, TARGET + CONTEXT, 8, generator=generator)
    ids = torch.arange(TARGET + CONTEXT, dtype=torch.float32)[:, None].expand(-1, 3)
    txt = torch.randn(batch, TEXT, 6, generator=generator)
    y = torch.randn(batch, 4, generator=generator)
    return img, ids, txt, torch.zeros(TEXT, 3), torch.full((batch,), 0.5), y, torch.ones(batch)


def test_features_are_the_target_tokens_that_leave_every_block(flux):
    seen = []

    def double(_, __, output):
        seen.append(output[0][:, :TARGET])

    def single(_, __, output):
        seen.append(output[:, TEXT : TEXT + TARGET])

    handles = [block.register_forward_hook(double) for block in flux.double_blocks]
    handles += [block.register_forward_hook(single) for block in flux.single_blocks]
    hooks = BlockFeatures(TARGET)
    with_hooks = flux(*arguments(), num_target=TARGET, hooks=hooks)
    for handle in handles:
        handle.remove()
    assert len(hooks.features) == len(seen) == PARAMS.depth + PARAMS.depth_single_blocks
    assert all(torch.equal(a, b) for a, b in zip(hooks.features, seen, strict=True))
    assert torch.equal(with_hooks, flux(*arguments(), num_target=TARGET))


def make(seed: int = 0) -> Discriminator:
    made = Discriminator(discriminator_params(PARAMS, channels=8))
    made.init_weights(torch.Generator().manual_seed(seed))
    return made


def features(batch: int = 2, rows: int = 2, columns: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, rows * columns, 16, generator=generator) for _ in range(5)]


def test_every_block_has_a_head_of_its_own_that_scores_every_token():
    heads = make()
    scores = heads(features(), 2, 3, torch.tensor([0.3, 0.8]), torch.randn(2, 4))
    assert [score.shape for score in scores] == [(2, 6)] * 5
    scores[1].sum().backward()
    touched = {name.split(".")[1] for name, p in heads.named_parameters() if p.grad is not None}
    assert touched == {"1"}


def test_scores_depend_on_noise_level_and_on_words():
    heads, t, vec = (
        make(),
        torch.tensor([0.3, 0.8]),
        torch.randn(2, 4, generator=torch.Generator().manual_seed(5)),
    )
    scores = heads(features(), 2, 3, t, vec)
    for changed in (heads(features(), 2, 3, t / 2, vec), heads(features(), 2, 3, t, vec + 1)):
        assert all(not torch.allclose(a, b) for a, b in zip(scores, changed, strict=True))


def test_tokens_are_laid_out_row_by_row():
    heads = make()
    block = features(batch=1, rows=4, columns=5)
    t, vec = torch.tensor([0.5]), torch.zeros(1, 4)
    before = heads(block, 4, 5, t, vec)[0].reshape(4, 5)
    block[0][0, 0] += torch.linspace(-3, 3, 16)  # the top left token
    changed = (heads(block, 4, 5, t, vec)[0].reshape(4, 5) - before).abs() > 1e-6
    # one 3×3 convolution: the token and its neighbours, not the end of the row above or below
    assert changed.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_features_are_standardised_by_what_calibration_saw():
    heads, generator = make(), torch.Generator().manual_seed(7)
    scale = torch.logspace(-1, 1, 16)  # within what the floor for still channels leaves alone
    batches = [
        [scale * torch.randn(8, 6, 16, generator=generator) + scale for _ in range(5)] for _ in range(20)
    ]
    heads.calibrate(iter(batches))
    for head in heads.heads:  # 960 tokens: 3 % is a standard error of the mean
        assert torch.allclose(head.center, scale, rtol=0.15, atol=0)
        assert torch.allclose(head.spread, scale, rtol=0.1, atol=0)


def test_a_louder_token_is_another_token():
    heads = make()
    t, vec = torch.tensor([0.5, 0.5]), torch.zeros(2, 4)
    quiet, loud = (heads([factor * block for block in features()], 2, 3, t, vec) for factor in (1, 2))
    assert all(not torch.allclose(a, b, rtol=0.05) for a, b in zip(quiet, loud, strict=True))


def test_a_discriminator_of_another_teacher_is_refused():
    with pytest.raises(ValueError, match="2 blocks' features for 5 heads"):
        make()(features()[:2], 2, 3, torch.ones(2), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="channels is 0"):
        DiscriminatorParams(num_blocks=1, hidden_size=8, vec_in_dim=4, channels=0)
