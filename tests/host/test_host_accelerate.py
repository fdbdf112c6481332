"""Kontext Accelerate in the host: through official patch points, on our models and on native ones."""

from __future__ import annotations

import pytest

# float32, eight steps through approximate paths: rounding of the two implementations, carried along
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def result(inside) -> dict:
    return inside("accelerate")


def test_nothing_asked_for_is_the_plain_model_bit_for_bit(result):
    assert result["modes"]["off"]["equal"] and result["modes"]["off"]["ours"] == {}


def test_with_everything_in_the_warmup_nothing_changes(result):
    assert result["modes"]["never"]["to_plain"] < 1e-6
    assert result["modes"]["never"]["ours"]["share"] == 0


@pytest.mark.parametrize("mode", ["context", "some_regions", "all_regions", "first_block", "all"])
def test_every_mode_saves_and_does_the_same_on_a_native_model(result, mode):
    found = result["modes"][mode]
    assert found["ours"]["share"] > 0.05
    assert found["ours"] == found["native"]
    assert found["same_on_both"] < TOLERANCE
    assert found["to_plain"] > 1e-4


def test_what_is_counted_is_what_the_mode_does(result):
    modes = result["modes"]
    assert modes["context"]["ours"]["part"] == 4 and modes["context"]["ours"]["skipped"] == 0
    assert modes["context"]["ours"]["share"] < modes["some_regions"]["ours"]["share"]
    assert modes["some_regions"]["ours"]["share"] < modes["all_regions"]["ours"]["share"]
    assert modes["first_block"]["ours"]["part"] == 0 and modes["first_block"]["ours"]["skipped"] > 0


def test_a_picture_of_a_batch_is_the_one_it_is_alone(result):
    assert result["batch"] < TOLERANCE


@pytest.mark.parametrize("change", ["prompt", "picture", "guidance"])
def test_nothing_of_an_earlier_sampling_is_used(result, change):
    assert result["changed"][change] < TOLERANCE


def test_references_with_settings_of_their_own_are_computed_in_full(result):
    assert result["own_settings"] < 1e-6


@pytest.mark.parametrize("mode", ["some_regions", "first_block"])
def test_a_controlnet_adds_to_every_token_and_block_so_none_is_left_out(result, mode):
    assert result["control_matters"] > 0.01
    assert result["control"][mode]["to_plain"] < 1e-6
    assert result["control"][mode]["same_on_both"] < TOLERANCE


def test_context_reuse_goes_with_a_controlnet(result):
    found = result["control"]["context"]
    assert found["ours"]["part"] == 4 and found["same_on_both"] < TOLERANCE
    assert 1e-4 < found["to_plain"] < 0.5


def test_nothing_is_kept_when_the_sampling_is_over(result):
    assert result["kept_after"] == 0
