"""Our transformer inside the host against the host's own, same weights, every patch point that packs rely on."""

from __future__ import annotations

import pytest

# float32 throughout; the two differ in the order of a few sums (fused norms and gates).
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def result(inside) -> dict:
    return inside("transformer")


@pytest.mark.parametrize(
    "case",
    ["plain", "batch", "no_guidance", "no_pooled", "odd", "mask", "control"],
)
def test_a_forward_equals_the_native_one(result, case):
    assert result[case] < TOLERANCE


@pytest.mark.parametrize("method", ["offset", "index", "uxo"])
def test_references_are_placed_as_natively(result, method):
    assert result[f"references_{method}"] < TOLERANCE


def test_references_told_t_0_matter_except_at_t_0(result):
    """The host has this method for other models and fails on FLUX.1 with it: there is nothing to compare with."""
    assert result["zero_time"]["at_0"] < TOLERANCE
    assert result["zero_time"]["at_1"] > 0.01


@pytest.mark.parametrize(
    "patch", ["rope_options", "replace", "post_input", "wrapper", "override", "attention_patches"]
)
def test_a_patch_changes_ours_as_it_changes_the_native_model(result, patch):
    assert result[patch] < TOLERANCE


@pytest.mark.parametrize("patch", ["replace", "post_input", "wrapper", "override", "attention_patches"])
def test_a_patch_is_called_as_often_and_with_the_same_as_natively(result, patch):
    seen = result["calls"][patch]
    assert seen["ours"] == seen["native"]
    assert seen["ours"] or patch == "attention_patches"


def test_text_encoders_of_another_model_are_refused_in_a_sentence(result):
    assert "41 numbers a token" in result["wrong_text"]
    assert "belong to the model" in result["wrong_text"]


def test_on_a_cpu_the_core_chooses_the_attention_unless_somebody_else_did(result):
    blocks = 4
    assert result["by_the_core"] == {"pytorch": blocks, "overridden": 0, "other": 0}
