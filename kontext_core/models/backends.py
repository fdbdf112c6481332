"""Which attention to use on this device: measured once, and never used before it gave the right answer here.

`torch` leaves the choice of kernel to PyTorch. On a CUDA device PyTorch's kernels can also be named one by one, and the
packages flash-attn and sageattention are used where they are installed; on a CPU `rows` is for half precision where
PyTorch's own is slow at it. `auto` takes the fastest of those that compute
in the tensors' own precision; `sage` computes in 8 bits and is used only by its name. PyTorch's own is checked like the
others; it is what remains when no other is right, and where its answers are off too a warning says so.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import Attention, attention
from .rows import rows_attention

logger = logging.getLogger("kontext")

KERNELS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NAMES = ("auto", "torch", *KERNELS, "flash", "sage", "rows")
APPROXIMATE = {"sage"}
# Largest error over the largest value: a few roundings of each dtype; 8-bit products for the approximate ones.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
APPROXIMATE_TOLERANCE = 0.1
# What takes more of PyTorch's time than this is no faster: pictures must not depend on which won a tie this time.
CLEARLY_FASTER = 0.9
LARGEST_MEASURED = {"cpu": 2048}  # tokens; it is the same order beyond, and a processor would take seconds
WORTH_ROWS = 1024  # tokens up to which rows are not tried


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, *, head_dim: int = 128, num_tokens: int = 4096
) -> Attention:
    """The attention of this name, checked; `auto` is the fastest exact one for about this many tokens.

    Raises:
        ValueError: no such name, not to be had here, or its answers are wrong here.
    """
    if name not in NAMES:
        raise ValueError(f"attention is {name!r}; use one of {', '.join(NAMES)}")
    size = (
        1 << max(num_tokens - 1, 1).bit_length()
    )  # one measurement serves all sizes up to the next power of two
    size = min(size, LARGEST_MEASURED.get(torch.device(device).type, 8192))
    return _chosen(name, str(torch.device(device)), dtype, head_dim, size)


@lru_cache(maxsize=64)
def _chosen(name: str, device: str, dtype: torch.dtype, head_dim: int, num_tokens: int) -> Attention:
    here = torch.device(device)
    found = candidates(here)
    if name == "torch":
        return _last_resort(here, dtype, head_dim)
    if name != "auto":
        if name not in found:
            raise ValueError(f"attention {name!r} is not to be had on {device}: here are {', '.join(found)}")
        problem = problem_of(found[name], here, dtype, head_dim, approximate=name in APPROXIMATE)
        if problem is not None:
            raise ValueError(f"attention {name!r} is not used on {device} in {dtype}: {problem}; use torch")
        return found[name]
    exact = {key: value for key, value in found.items() if key not in APPROXIMATE}
    if dtype == torch.float32 or num_tokens <= WORTH_ROWS:
        exact.pop("rows", None)
    if len(exact) == 1:
        return _last_resort(here, dtype, head_dim)
    seconds = {}
    for key, function in exact.items():
        problem = problem_of(function, here, dtype, head_dim)
        if problem is None:
            seconds[key] = _seconds(function, here, dtype, head_dim, num_tokens)
        else:
            logger.info("attention %r is left out on %s: %s", key, device, problem)
    if not seconds:
        return _last_resort(here, dtype, head_dim)
    best = min(seconds, key=seconds.get)
    if seconds[best] > CLEARLY_FASTER * seconds.get("torch", float("inf")):
        best = "torch"
    logger.info(
        "attention for %d tokens on %s: %s of %s",
        num_tokens, device, best, ", ".join(f"{key} {1000 * value:.2f} ms" for key, value in seconds.items()),
    )  # fmt: skip
    return exact[best]


def _last_resort(device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """PyTorch's own attention, with a warning where its answers are off: there is nothing else to use."""
    problem = problem_of(attention, device, dtype, head_dim)
    if problem is not None:
        logger.warning("PyTorch's attention on %s in %s may spoil pictures: %s", device, dtype, problem)
    return attention


def candidates(device: torch.device) -> dict[str, Attention]:
    """What may be tried on a device, by name."""
    found: dict[str, Attention] = {"torch": attention}
    if device.type == "cpu":
        found["rows"] = rows_attention
    if device.type == "cuda":
        found |= {name: partial(_by_kernel, kernel) for name, kernel in KERNELS.items()}
        if importlib.util.find_spec("flash_attn") is not None:
            found["flash"] = _flash
        if importlib.util.find_spec("sageattention") is not None:
            found["sage"] = _sage
    return found


def problem_of(
    function: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 128,
    *,
    approximate: bool = False,
) -> str | None:
    """What is wrong with an attention here, or None: its answer beside softmax(q·k)·v in float32.

    Asked as the blocks ask: v is a view into joined projections, with and without a mask, and with fewer queries than
    keys, as when context is reused.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 200, 3, 3, head_dim, generator=generator)  # B, L, (q, k, v), heads, D
    drawn[:, :, 1, :, 0] += 3  # keys share a direction, as a trained model's do
    every, k, v = rearrange(drawn.to(device, dtype), "b l three h d -> three b h l d")
    every, k = every.contiguous(), k.contiguous()
    mask = torch.zeros(200, 200, dtype=dtype, device=device)
    mask[:, 150:] = float("-inf")
    for q, given in ((every, None), (every, mask), (every[:, :, :130].contiguous(), None)):
        scores = q.float() @ k.float().transpose(-1, -2) * head_dim**-0.5
        if given is not None:
            scores = scores + given.float()
        expected = rearrange(scores.softmax(-1) @ v.float(), "b h l d -> b l (h d)")
        try:
            found = function(q, k, v, given)
        except (
            Exception
        ) as error:  # whatever a kernel raises that cannot do this: it is not used, and says why
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        if found.shape != expected.shape or not torch.isfinite(found).all():
            return f"it gives {tuple(found.shape)} or numbers that are not finite"
        error = float((found.float() - expected).abs().max() / expected.abs().max())
        allowed = APPROXIMATE_TOLERANCE if approximate else TOLERANCE[dtype]
        if error > allowed:
            return f"its answers are off by {error:.2g} of the largest value, and {allowed:.2g} is allowed"
    return None


def _seconds(
    function: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int
) -> float:
    """The best of three calls with 4 heads."""
    q, k, v = torch.randn(3, 1, 4, num_tokens, head_dim, device=device).to(dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(4):
        wait()
        started = time.perf_counter()
        function(q, k, v)
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def _by_kernel(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:  # not every kernel takes one
        return attention(q, k, v, mask)
    with sdpa_kernel(kernel):
        return attention(q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        return attention(q, k, v, mask)
    from flash_attn import flash_attn_func

    return flash_attn_func(*(part.transpose(1, 2) for part in (q, k, v))).flatten(2)


def _sage(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        return attention(q, k, v, mask)
    from sageattention import sageattn

    return rearrange(sageattn(q, k, v, tensor_layout="HND"), "b h l d -> b l (h d)")
