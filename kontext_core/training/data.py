"""What the flow is trained on: pre-encoded latents with token ids, in shards that are safetensors files.

A shard holds n examples of one kind (with or without context) and one size:
`target` (n, 16, h, w) and `context` (n, 16, h', w') scaled latents in float16; the words as `t5` (n, L) and
`clip` (n, 77) token ids in int32, or encoded as `txt` (n, L, context_in) and `vec` (n, vec_in); `weight` (n, N)
uint8: how much of each target token the edit changes, 0..255; and, if the data knows them, class numbers uint8
of the tokens, `labels` (n, N, fields) and `context_labels` (n, M, fields), for `supervision`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .checkpoint import save_weights

CONTEXT = ("context", "context_labels")
"""The parts of a shard that tell of what is edited."""


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one shard, beside and renamed.

    Raises:
        ValueError: a part is missing, or the parts differ in number.
    """
    words = {"txt", "vec"} if "txt" in tensors else {"t5", "clip"}
    missing = {"target", "weight", *words} - tensors.keys()
    counts = {len(value) for value in tensors.values()}
    if missing or len(counts) != 1:
        raise ValueError(
            "a shard needs target, weight, and t5 and clip (or txt and vec), all of one length; "
            f"missing {sorted(missing)}, lengths {sorted(counts)}"
        )
    save_weights(path, tensors)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Examples of one kind and size, all in memory."""

    name: str
    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.tensors["target"])


class LatentDataset:
    """Groups of shards, drawn from by step: the same step always gives the same batch.

    Args:
        groups: name -> shard files; every shard of a group has the same shapes.
        weights: name -> how often a micro-batch comes from that group.
        later: (first step, weights) of phases that take over, for training low resolutions first; what a phase
            leaves out is not drawn in it.
        alone: names of groups that are drawn without their contexts, as text to image: what a text asks for is
            learnt sooner with nothing else to look at.
    """

    def __init__(
        self,
        groups: dict[str, Sequence[Path]],
        weights: dict[str, float],
        later: Sequence[tuple[int, dict[str, float]]] = (),
        alone: Collection[str] = (),
    ) -> None:
        self.groups = [
            _load_group(name, files, CONTEXT if name in alone else ())
            for name, files in groups.items()
            if files
        ]
        if not self.groups:
            raise ValueError("no training data: encode some first")
        self.phases = [
            (first, torch.tensor([float(share.get(group.name, 0)) for group in self.groups]))
            for first, share in [(0, weights), *sorted(later, key=lambda phase: phase[0])]
        ]
        for first, share in self.phases:
            if not share.sum() > 0:
                raise ValueError(f"from step {first} on no group is drawn: give one of them a weight above 0")

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def batch(self, step: int, micro: int, size: int) -> dict[str, Tensor]:
        """`size` examples of one group, each drawn independently."""
        generator = torch.Generator().manual_seed(step * 1_009 + micro)
        share = [share for first, share in self.phases if first <= step][-1]
        group = self.groups[int(torch.multinomial(share, 1, generator=generator))]
        rows = torch.randint(len(group), (size,), generator=generator)
        return {key: value[rows] for key, value in group.tensors.items()}


def _load_group(name: str, files: Sequence[Path], without: Collection[str]) -> Group:
    shards = [{key: value for key, value in load_file(file).items() if key not in without} for file in files]
    keys = shards[0].keys()
    for file, shard in zip(files, shards, strict=True):
        if shard.keys() != keys:
            raise ValueError(f"{file} holds {sorted(shard)}, the others of {name!r} {sorted(keys)}")
    return Group(name=name, tensors={key: torch.cat([shard[key] for shard in shards]) for key in keys})
