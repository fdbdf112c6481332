"""What our MODEL computes in on a CPU: bfloat16 where that is fast, unless the loader or the host is told otherwise."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def result(inside, tmp_path_factory) -> dict:
    return inside("compute_dtype", str(tmp_path_factory.mktemp("compute_dtype")))


@pytest.mark.parametrize("asked", ["default", "bfloat16", "packed"])
def test_a_cpu_computes_bfloat16_weights_in_bfloat16_where_it_is_fast_at_it(result, asked):
    assert result[f"{asked} True"] == "bfloat16"
    assert result[f"{asked} False"] == "float32"


@pytest.mark.parametrize("hardware", [True, False])
def test_other_dtypes_are_computed_in_float32_on_every_cpu(result, hardware):
    assert result[f"float32 {hardware}"] == "float32"
    assert result[f"float16 {hardware}"] == "float32"


def test_the_hosts_own_options_decide(result):
    assert result["fp32_unet"] == ["float32", "float32"]
    assert result["bf16_unet"] == ["bfloat16", "bfloat16"]


def test_the_velocity_in_bfloat16_is_that_of_float32_but_for_rounding(result):
    # 2^-8 a rounding, through 12 blocks; README has 0.007 for one evaluation
    assert 0 < result["error"] < 0.05
