"""Deep supervision: the classifier learns what tokens show, and changes nothing where there are no labels."""

from __future__ import annotations

import torch

from kontext_core.models.transformer import BlockHooks
from kontext_core.training.supervision import Listening, TokenClassifier, heavier


def test_the_classifier_learns_what_linear_features_say() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 9, 16, generator=generator)
    labels = torch.stack((tokens[..., 0] > 0, tokens[..., 1:4].argmax(-1)), -1)
    classifier = TokenClassifier(16, (2, 3), after=0)
    weight = torch.ones(4, 9)
    first, _ = classifier.loss(tokens, labels, heavier(torch.rand(4, 9, generator=generator), 8.0))
    assert torch.isclose(first, (torch.tensor(2.0).log() + torch.tensor(3.0).log()) / 2, rtol=1e-4)
    optimizer = torch.optim.Adam(classifier.parameters(), 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss, _ = classifier.loss(tokens, labels, weight)
        loss.backward()
        optimizer.step()
    share = torch.zeros(4, 9)
    share[:, 4:] = 1
    loss, right = classifier.loss(tokens, labels, heavier(share, 8.0))
    assert loss < 0.2 and right > 0.95


def test_equal_weights_count_every_token() -> None:
    """Where all of a picture changes, or nothing, no token is heavier than the mean."""
    classifier = TokenClassifier(8, (3,), after=0)  # zeros: class 0 is its answer
    tokens, labels = torch.randn(2, 9, 8), torch.zeros(2, 9, 1, dtype=torch.int16)
    labels[1] = 1
    for share in (torch.ones(2, 9), torch.zeros(2, 9)):
        assert float(classifier.loss(tokens, labels, heavier(share, 8.0))[1]) == 0.5


def test_heavier_keeps_the_mean_of_every_example() -> None:
    weight = heavier(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), 8.0)
    assert torch.allclose(weight.mean(1), torch.ones(2))
    assert torch.allclose(weight[0, 2] / weight[0, 0], torch.tensor(9.0))
    assert torch.equal(weight[1], torch.ones(3))


def test_listening_hears_one_block_and_runs_what_is_within() -> None:
    class Counting(BlockHooks):
        calls = 0

        def single(self, index, run, x, num_text):
            self.calls += 1
            return run(x)

    within = Counting()
    listening = Listening(1, within)
    x = torch.arange(12.0).reshape(1, 4, 3)
    for index in range(3):
        x = listening.single(index, lambda value: value + 1, x, 1)
    assert within.calls == 3
    assert listening.heard is not None
    assert torch.equal(listening.heard, torch.arange(12.0).reshape(1, 4, 3)[:, 1:] + 2)
