"""An attention is used only after it gave the right answer here."""

from __future__ import annotations

import logging

import pytest
import torch

from kontext_core.models import backends
from kontext_core.models.attention import attention
from kontext_core.models.rows import rows_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_own_attention_of_torch_is_right(dtype):
    assert backends.problem_of(attention, CPU, dtype) is None


def test_a_wrong_answer_is_found_with_and_without_a_mask():
    assert "off by" in backends.problem_of(
        lambda q, k, v, mask: attention(q * 1.01, k, v, mask), CPU, torch.float32
    )
    assert "off by" in backends.problem_of(lambda q, k, v, mask: attention(q, k, v), CPU, torch.float32)


def test_an_answer_that_is_wrong_for_fewer_queries_than_keys_is_found():
    def square(q, k, v, mask=None):
        return attention(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]], mask)

    assert "off by" in backends.problem_of(square, CPU, torch.float32)


def test_an_answer_that_is_wrong_for_a_view_is_found():
    def by_address(q, k, v, mask=None):
        return attention(q, k, torch.as_strided(v, v.shape, q.stride()[:2] + k.stride()[2:]), mask)

    assert "off by" in backends.problem_of(by_address, CPU, torch.float32)


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
    with pytest.raises(ValueError, match="'sage' is not to be had on cpu: here are torch, rows"):
        backends.choose_attention("sage", CPU, torch.float32)


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_pytorchs_own_is_checked_once_too_and_a_wrong_one_is_told(monkeypatch, caplog, name):
    checks = []

    def wrong(q, k, v, mask=None):
        checks.append(q.shape)
        return attention(q, k, v * 2, mask)

    monkeypatch.setattr(backends, "attention", wrong)
    backends._chosen.cache_clear()
    with caplog.at_level(logging.WARNING, logger="kontext"):
        for _ in range(3):
            assert backends.choose_attention(name, CPU, torch.float32) is wrong
    assert len(checks) == 1 and caplog.text.count("may spoil pictures") == 1
    backends._chosen.cache_clear()


def test_where_none_is_right_pytorchs_own_remains_with_a_warning(monkeypatch, caplog):
    def wrong(q, k, v, mask=None):
        return v.flatten(2)

    monkeypatch.setattr(backends, "attention", wrong)
    monkeypatch.setattr(backends, "candidates", lambda _: {"torch": wrong, "flash": wrong})
    backends._chosen.cache_clear()
    with caplog.at_level(logging.WARNING, logger="kontext"):
        assert backends.choose_attention("auto", CPU, torch.float32) is wrong
    assert "PyTorch's attention on cpu" in caplog.text
    backends._chosen.cache_clear()


@pytest.mark.parametrize(("dtype", "num_tokens"), [(torch.float32, 4096), (torch.bfloat16, 500)])
def test_in_float32_or_for_few_tokens_there_is_nothing_to_measure_on_a_cpu(monkeypatch, dtype, num_tokens):
    monkeypatch.setattr(backends, "_seconds", lambda *_: pytest.fail("it is measured"))
    backends._chosen.cache_clear()
    assert backends.choose_attention("auto", CPU, dtype, num_tokens=num_tokens) is attention


@pytest.mark.parametrize(
    ("of_torch", "expected"), [(0.8, rows_attention), (0.95, attention), (1.3, attention)]
)
def test_rows_are_taken_in_half_precision_where_they_are_clearly_faster(monkeypatch, of_torch, expected):
    sizes = []

    def seconds(function, device, dtype, head_dim, num_tokens):
        sizes.append(num_tokens)
        return of_torch if function is rows_attention else 1.0

    monkeypatch.setattr(backends, "_seconds", seconds)
    backends._chosen.cache_clear()
    for num_tokens in (2560, 8704):
        assert backends.choose_attention("auto", CPU, torch.bfloat16, num_tokens=num_tokens) is expected
    assert sizes == [2048, 2048], "both once, and no larger than takes a moment"
    backends._chosen.cache_clear()
