"""What was encoded once is not encoded again: results by content, bounded in memory, never stale.

A cache belongs to a network and to its weights as they are: another LoRA, other parameters, a training step or any
other change that PyTorch counts empties it. Keys are contents (a prompt's text, the digest of a picture's pixels), one
sample each, so a batch takes what is there and computes the rest. A weight that is written through `.data` is not
noticed, nor is a write to an inference tensor that leaves some of its values as they were: call `clear(network)` then.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

MAX_BYTES = (
    256 * 2**20
)  # of one network's results: 32 prompts of T5-XXL in float32, 250 pictures of a megapixel

_CACHES: weakref.WeakKeyDictionary[nn.Module, ContentCache] = weakref.WeakKeyDictionary()


class ContentCache:
    """Tuples of tensors, or of anything small, by content; what was used longest ago goes first.

    Attributes:
        hits, misses: how often something was there and how often it was computed.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self.nbytes = 0
        self._entries: OrderedDict[Hashable, tuple[Any, ...]] = OrderedDict()
        self._stamp: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self._entries)

    def belong_to(self, stamp: tuple[Any, ...]) -> None:
        """Forget everything unless it was computed under the same stamp."""
        same = len(stamp) == len(self._stamp) and all(
            a is b or (isinstance(a, (int, str)) and a == b) for a, b in zip(stamp, self._stamp, strict=True)
        )
        if not same:
            self.clear()
            self._stamp = stamp

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0

    def get(self, key: Hashable, make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What is kept under the key, else what `make` gives; tensors are kept on the CPU."""
        if key in self._entries:
            self.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        self.misses += 1
        value = make()
        size = _nbytes(value)
        if size <= self.max_bytes:
            self._entries[key] = tuple(part.cpu() if isinstance(part, Tensor) else part for part in value)
            self.nbytes += size
            while self.nbytes > self.max_bytes:
                self.nbytes -= _nbytes(self._entries.popitem(last=False)[1])
        return value


def _nbytes(value: tuple[Any, ...]) -> int:
    return sum(part.numel() * part.element_size() for part in value if isinstance(part, Tensor))


def cache_of(owner: nn.Module, *others: Any) -> ContentCache:
    """The cache of a network, empty if its weights or the others are not what they were.

    Args:
        others: further networks that take part, and objects that must be the same ones (tokenizers).
    """
    cache = _CACHES.setdefault(owner, ContentCache())
    stamp: list[Any] = []
    for part in (owner, *others):
        stamp += _stamp(part) if isinstance(part, nn.Module) else [part]
    cache.belong_to(tuple(stamp))
    return cache


def clear(owner: nn.Module) -> None:
    """Forget what was encoded with a network."""
    if owner in _CACHES:
        _CACHES[owner].clear()


def _stamp(module: nn.Module) -> list[Any]:
    """What changes when a network's weights do: which they are, where, PyTorch's count of writes, and applied LoRAs.

    An address alone says little: another parameter may lie where an earlier one was.
    """
    digest, parameters = hashlib.sha256(), []
    for parameter in module.parameters():
        written = _some_values(parameter) if parameter.is_inference() else parameter._version
        digest.update(f"{parameter.data_ptr()} {written} {parameter.dtype} {parameter.device};".encode())
        parameters.append(weakref.ref(parameter))
    return [module, digest.hexdigest(), module.__dict__.get("_kontext_lora"), *parameters]


def _some_values(weight: Tensor) -> list[float]:
    """A few values of a weight whose writes PyTorch does not count: spread over it, the first and the last included."""
    places = torch.linspace(0, weight.numel() - 1, 8).long().to(weight.device)
    return weight.detach().flatten()[places].float().tolist()


def content(tensor: Tensor) -> str:
    """A digest of a tensor's values, shape and dtype."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
