"""An attention is used only after it gave the right answer here."""

from __future__ import annotations

import pytest
import torch

from kontext_core.models import backends
from kontext_core.models.attention import attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_own_attention_of_torch_is_right(dtype):
    assert backends.problem_of(attention, CPU, dtype) is None


def test_a_wrong_answer_is_found_with_and_without_a_mask():
    assert "off by" in backends.problem_of(
        lambda q, k, v, mask: attention(q * 1.01, k, v, mask), CPU, torch.float32
    )
    assert "off by" in backends.problem_of(lambda q, k, v, mask: attention(q, k, v), CPU, torch.float32)


def test_an_answer_that_is_no_number_and_an_error_are_found():
    assert "not finite" in backends.problem_of(lambda *a: attention(*a) * torch.nan, CPU, torch.float32)

    def broken(*_):
        raise RuntimeError("no kernel for this device")

    assert "RuntimeError: no kernel" in backends.problem_of(broken, CPU, torch.float32)


def test_auto_leaves_out_what_is_wrong_and_takes_the_fastest_of_the_rest(monkeypatch):
    calls = []

    def right(q, k, v, mask=None):
        calls.append(q.shape[2])
        return attention(q, k, v, mask)

    found = {
        "torch": attention,
        "wrong": lambda q, k, v, mask=None: attention(q, k, v * 2, mask),
        "right": right,
    }
    seconds = {attention: 2.0, right: 1.0}
    monkeypatch.setattr(backends, "candidates", lambda _: found)
    monkeypatch.setattr(backends, "_seconds", lambda function, *_: seconds[function])
    backends._chosen.cache_clear()
    assert backends.choose_attention("auto", CPU, torch.float32, num_tokens=300) is right
    checks = len(calls)
    assert backends.choose_attention("auto", CPU, torch.float32, num_tokens=500) is right
    assert len(calls) == checks, "it is checked once, not at every use"
    backends._chosen.cache_clear()


def test_names_that_are_not_to_be_had_are_errors_that_say_what_is():
    with pytest.raises(ValueError, match="attention is 'fast'; use one of auto, torch"):
        backends.choose_attention("fast", CPU, torch.float32)
    with pytest.raises(ValueError, match="'sage' is not to be had on cpu: here are torch"):
        backends.choose_attention("sage", CPU, torch.float32)


def test_on_a_cpu_there_is_nothing_to_measure():
    assert backends.choose_attention("auto", CPU, torch.float32) is attention
