"""The world as latents on disk: render, encode, tokenize, one shard a job, in parallel processes."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..devices import fast_dtype
from ..models.autoencoder import Autoencoder, params_from_shapes
from ..models.tokenizers import ClipTokenizer, T5Tokenizer
from ..training.data import write_shard
from . import world
from .labels import token_labels
from .render import mask_of
from .scene import Scene

log = logging.getLogger("kontext")

SQUARE = (128, 128)
OTHER_SIZES = ((144, 112), (112, 144), (160, 96), (96, 160))
"""(width, height) of the buckets beside the square one that the world is also drawn at."""


SCENERY = 0.25
"""What a token of scenery counts in a picture that is new altogether, where one of a thing counts 1."""
SPREAD = 16
"""How many numbers an example of chosen kinds may use up, on average over a shard."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Examples start..start+count of one category at one (width, height).

    `kinds`: only examples of these, the first `count` of SPREAD times as many numbers from `start` on; any when empty.
    `habit`: open layouts are the usual ones, see `compose`.
    """

    split: str
    category: str
    start: int
    count: int
    size: tuple[int, int] = SQUARE
    kinds: tuple[str, ...] = ()
    habit: bool = False

    @property
    def group(self) -> str:
        """Shards of one group have the same shapes and go into the same batches."""
        return f"{'text' if self.category == 'generate' else 'edit'}-{self.size[0]}x{self.size[1]}"

    @property
    def name(self) -> str:
        kinds = "".join(f"-{kind.replace(' ', '_')}" for kind in self.kinds)
        habit = "-habit" if self.habit else ""
        return f"{self.group}-{self.split}-{self.category}{kinds}{habit}-{self.start:07d}.safetensors"

    def numbers(self) -> list[int]:
        """The numbers of its examples.

        Raises:
            ValueError: the world's category has too few of these kinds.
        """
        if not self.kinds:
            return list(range(self.start, self.start + self.count))
        candidates = range(self.start, self.start + SPREAD * self.count)
        fitting = (n for n in candidates if world.plan(self.split, self.category, n).kind in self.kinds)
        found = list(islice(fitting, self.count))
        if len(found) < self.count:
            raise ValueError(
                f"{len(candidates)} examples of {self.category!r} hold {len(found)} of the kinds "
                f"{', '.join(self.kinds)}, but the shard wants {self.count}: name kinds that the category has, "
                "or more of them"
            )
        return found


def token_weights(change_mask: np.ndarray) -> Tensor:
    """uint8 (N,): how much of each 16×16-pixel token of a bool (H, W) mask is set, 0..255."""
    height, width = change_mask.shape
    blocks = torch.from_numpy(change_mask).float().reshape(height // 16, 16, width // 16, 16).mean((1, 3))
    return (blocks.flatten() * 255).round().to(torch.uint8)


def drawn_weights(scene: Scene, size: tuple[int, int]) -> Tensor:
    """uint8 (N,) for a picture that is new altogether: things, creature and sign count whole, the scenery `SCENERY` of
    that. Scenery is most of a picture and learnt long before what stands in it."""
    w, h = size
    parts = [*scene.things, *(part for part in (scene.creature, scene.sign) if part is not None)]
    covered = np.max([np.zeros((h, w), np.float32), *(mask_of(part, size) for part in parts)], axis=0)
    share = token_weights(covered > 0.5).float() / 255
    return ((SCENERY + (1 - SCENERY) * (4 * share).clamp(max=1)) * 255).round().to(torch.uint8)


def encode_shard(job: ShardJob, autoencoder: Path, tokenizers: Path, folder: Path) -> int:
    """Render and encode one job; returns how many examples it wrote."""
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    weights = load_file(autoencoder)
    module = Autoencoder(params_from_shapes({key: tuple(value.shape) for key, value in weights.items()}))
    module.load_state_dict(weights)
    module = module.to(fast_dtype("cpu", torch.bfloat16)).to(memory_format=torch.channels_last).eval()
    examples = [
        world.example(job.split, job.category, number, job.size, habit=job.habit) for number in job.numbers()
    ]
    words = [example.instruction for example in examples]
    tensors = {
        "target": _encode(module, [example.target for example in examples]),
        "t5": T5Tokenizer.from_path(tokenizers / "tokenizer_2").encode(words).ids.int(),
        "clip": ClipTokenizer.from_path(tokenizers / "tokenizer").encode(words).ids.int(),
        "weight": torch.stack([_weights(example, job.size) for example in examples]),
        "labels": _labels([example.truth.after for example in examples], job.size),
    }
    if examples[0].context is not None:
        tensors["context_labels"] = _labels([example.truth.before for example in examples], job.size)
        tensors["context"] = _encode(module, [example.context for example in examples])
    write_shard(folder / job.name, tensors)
    return len(examples)


def _weights(example: world.Example, size: tuple[int, int]) -> Tensor:
    if example.category in world.OPEN:
        return drawn_weights(example.truth.after, size)
    return token_weights(example.change_mask)


def _labels(scenes: list[Scene], size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.stack([token_labels(scene, size) for scene in scenes]))


@torch.inference_mode()
def _encode(module: Autoencoder, pictures: list[np.ndarray]) -> Tensor:
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    dtype = module.encoder.conv_out.weight.dtype
    parts = [
        module.encode((part.to(dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)).half()
        for part in images.split(5)
    ]
    return torch.cat(parts).contiguous()


def shard_jobs(
    split: str, examples: int, *, weights: dict[str, float], shard: int = 500, habit: bool = False
) -> list[ShardJob]:
    """Jobs for about `examples` examples in the given shares, every 10th shard of a category at another size.

    A share's name is a category, or a category and those of its kinds that are wanted: "local:replace+bigger".
    `habit`: of the open categories, see `compose`.
    """
    jobs = []
    for name, share in weights.items():
        category, _, kinds = name.partition(":")
        chosen = tuple(kinds.split("+")) if kinds else ()
        for number in range(max(1, round(examples * share / shard))):
            size = OTHER_SIZES[(number // 10) % len(OTHER_SIZES)] if number % 10 == 9 else SQUARE
            start = number * shard * (SPREAD if chosen else 1)
            jobs.append(
                ShardJob(
                    split=split,
                    category=category,
                    start=start,
                    count=shard,
                    size=size,
                    kinds=chosen,
                    habit=habit and category in world.OPEN,
                )
            )
    # every category early, so that training can begin on any number of finished shards
    return sorted(jobs, key=lambda job: (job.start, job.category))


def encode_world(
    jobs: list[ShardJob], autoencoder: Path, tokenizers: Path, folder: Path, workers: int
) -> None:
    """Run the jobs whose shard is not there yet, in `workers` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [job for job in jobs if not (folder / job.name).exists()]
    log.info("%d of %d shards to encode", len(left), len(jobs))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(encode_shard, job, autoencoder, tokenizers, folder) for job in left]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if done % 10 == 0 or done == len(left):
                log.info("encoded %d of %d shards", done, len(left))
