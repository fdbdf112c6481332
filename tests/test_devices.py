"""What is computed in where nobody says: fast on the device, and the same weights."""

from __future__ import annotations

import time

import pytest
import torch

from kontext_core import devices
from kontext_core.devices import cpu_has_bfloat16, fast_dtype
from kontext_core.weights.load import load_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("hardware", (True, False))
def test_a_cpu_computes_half_precision_only_in_hardware(monkeypatch, hardware):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: hardware)
    assert fast_dtype(CPU, torch.bfloat16) == (torch.bfloat16 if hardware else torch.float32)
    assert fast_dtype(CPU, torch.float16) == torch.float32
    assert fast_dtype(CPU, torch.float32) == torch.float32
    assert fast_dtype("mps", torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("hardware", (True, False))
def test_an_old_gpu_computes_in_float16(monkeypatch, hardware):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: hardware)
    assert fast_dtype(CUDA, torch.bfloat16) == (torch.bfloat16 if hardware else torch.float16)
    assert fast_dtype(CUDA, torch.float16) == torch.float16


def test_the_model_is_loaded_in_it_and_a_dtype_asked_for_wins(monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: False)
    model = load_model("kontext-tiny", dtype=torch.bfloat16)
    wide = load_model("kontext-tiny")
    for part in ("transformer", "autoencoder", "t5", "clip"):
        for name, value in getattr(model, part).state_dict().items():
            other = getattr(wide, part).state_dict()[name]
            assert value.dtype == torch.bfloat16 and other.dtype == torch.float32, name
            assert torch.equal(value.float(), other), name


def test_what_is_called_fast_is_no_slower_than_the_other():
    a = {dtype: torch.randn(256, 256).to(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def seconds(dtype: torch.dtype) -> float:
        best = 1e9
        for _ in range(5):
            start = time.perf_counter()
            a[dtype] @ a[dtype]
            best = min(best, time.perf_counter() - start)
        return best

    chosen = fast_dtype(CPU, torch.bfloat16)
    other = torch.float32 if cpu_has_bfloat16() else torch.bfloat16
    assert seconds(chosen) < 3 * seconds(other)
