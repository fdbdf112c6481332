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
    assert calls["rope"] == 1


def test_position_tables_that_outlive_a_sampling_are_few(result):
    assert result["ropes_kept"] == 4


def test_more_prompts_than_tables_are_kept_for_cost_no_more_than_a_row_a_step(result):
    assert result["many_rows"] == 6 * result["steps"]
    assert result["many"] < TOLERANCE


def test_a_schedule_in_parts_is_computed_once(result):
    assert result["parts_rows"] == 2 * result["steps"]
    assert result["parts"] < TOLERANCE


def test_nothing_is_kept_when_the_sampling_is_over(result):
    assert not result["kept_after"]


@pytest.mark.parametrize("case", ["plain", "batch", "heun", "no_reference"])
def test_a_sampling_equals_the_native_models(result, case):
    assert result[case] < TOLERANCE


@pytest.mark.parametrize("change", ["prompt", "picture", "guidance", "weights", "weights_back"])
def test_after_a_change_the_result_is_that_of_the_new_input(result, change):
    assert result["weights_matter"] > 0.01
    assert result["changed"][change] < TOLERANCE
