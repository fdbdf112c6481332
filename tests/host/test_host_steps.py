"""What no step changes is computed once a sampling, and after any change of input nothing of before is used."""

from __future__ import annotations

import pytest

# float32, four steps; the two implementations differ in the order of a few sums.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def result(inside) -> dict:
    return inside("steps")


def test_text_modulation_and_references_are_computed_once_a_sampling(result):
    calls, steps = result["calls"], result["steps"]
    assert calls["blocks"] == steps
    assert calls["text"] == 1
    assert calls["modulation"] == 1 and calls["final"] == 1
    assert calls["pictures"] == steps + 1  # the target every time, the reference once


def test_nothing_is_kept_when_the_sampling_is_over(result):
    assert not result["kept_after"]


@pytest.mark.parametrize("case", ["plain", "batch", "heun", "no_reference"])
def test_a_sampling_equals_the_native_models(result, case):
    assert result[case] < TOLERANCE


@pytest.mark.parametrize("change", ["prompt", "picture", "guidance", "weights", "weights_back"])
def test_after_a_change_the_result_is_that_of_the_new_input(result, change):
    assert result["weights_matter"] > 0.01
    assert result["changed"][change] < TOLERANCE
