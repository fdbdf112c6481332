"""What a device computes fast in.

A CPU without bfloat16 in hardware emulates its products, up to a hundred times slower than float32's; float16
is slower than float32 on every x86 CPU but the newest. Weights may stay as they are stored: only the products
are then in the wider dtype.
"""

from __future__ import annotations

import platform
from functools import lru_cache

import torch


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX-512 BF16, AMX, or Arm's BF16)."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False


def fast_dtype(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in on `device` with weights of `dtype`, when nobody asked for one.

    float32 on a CPU that is slow at half precision, float16 on a CUDA device older than bfloat16 (its range is
    too small for T5, which scales by itself); else `dtype`.
    """
    device = torch.device(device)
    if device.type == "cpu":
        if dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_bfloat16()):
            return torch.float32
    elif device.type == "cuda" and dtype == torch.bfloat16:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
    return dtype
