"""The guards stop what is known to collapse, and say what to do."""

from __future__ import annotations

import pytest
import torch

from kontext_core.distill.guards import (
    Collapsed,
    GuardConfig,
    Watch,
    batch_spread,
    check_batch,
    check_real,
)

CONFIG = GuardConfig(memory=0.5, patience=5)
HEALTHY = {"real_score": 0.3, "fake_score": -0.2, "head_loss": 1.6, "spread": 0.95}


def test_a_batch_of_one_is_refused():
    with pytest.raises(Collapsed, match="a batch of 1 is too small"):
        check_batch(1, GuardConfig())
    check_batch(4, GuardConfig())


def test_zeros_are_no_truth():
    real = torch.randn(4, 6, 8)
    check_real(real)
    real[2] = 0
    with pytest.raises(Collapsed, match="1 of 4 real latents are constant"):
        check_real(real)
    with pytest.raises(Collapsed, match="NaN"):
        check_real(torch.full((2, 6, 8), torch.nan))


def test_the_spread_of_a_batch_is_zero_where_all_are_alike():
    one = torch.randn(1, 6, 8)
    assert batch_spread(one.expand(5, -1, -1)) == pytest.approx(0, abs=1e-6)
    assert batch_spread(torch.randn(500, 6, 8)) == pytest.approx(1, abs=0.05)


def test_a_healthy_training_goes_on():
    watch = Watch(CONFIG)
    for _ in range(50):
        watch.update(**HEALTHY)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"spread": 0.1}, "have become alike"),
        ({"spread": 9.0}, "have blown up"),
        ({"head_loss": 0.0}, "tells every student's picture"),
        ({"real_score": 900.0}, "scores have grown"),
    ],
)
def test_what_stays_wrong_stops_with_a_sentence(wrong, sentence):
    watch = Watch(CONFIG)
    for _ in range(20):
        watch.update(**HEALTHY)
    with pytest.raises(Collapsed, match=sentence):
        for _ in range(40):
            watch.update(**{**HEALTHY, **wrong})


def test_a_short_excursion_is_forgiven():
    watch = Watch(CONFIG)
    for _ in range(10):
        for values in (HEALTHY, HEALTHY, HEALTHY, {**HEALTHY, "spread": 0.1}, {**HEALTHY, "spread": 0.1}):
            watch.update(**values)


def test_what_was_watched_survives_a_checkpoint():
    import json

    first, second = Watch(CONFIG), Watch(CONFIG)
    first.update(**HEALTHY)
    for _ in range(4):
        first.update(**{**HEALTHY, "spread": 0.1})
    second.load(json.loads(json.dumps(first.state())))
    with pytest.raises(Collapsed):
        for _ in range(2):
            second.update(**{**HEALTHY, "spread": 0.1})


def test_blurred_pictures_at_the_start_are_no_collapse():
    watch = Watch(CONFIG)
    for step in range(60):
        watch.update(**{**HEALTHY, "spread": None if step % 3 else 0.1 + step / 100})
    with pytest.raises(Collapsed, match="alike"):
        for _ in range(20):
            watch.update(**{**HEALTHY, "spread": 0.1})
