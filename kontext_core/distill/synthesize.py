"""The teacher's own pictures as training data: every shard's targets are replaced by what the teacher makes.

LADD takes no real pictures: the words and contexts of the source shards are kept, the latents are the teacher's.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .. import latents
from ..conditioning import PromptConditioning, References
from ..denoise import Denoiser
from ..models.transformer import Flux
from ..samplers import SAMPLERS
from ..schedules import Shift, few_steps, timesteps
from ..training.data import write_shard
from ..training.flow import KontextModule
from .guards import check_real
from .network import Conditions, encode_conditions, freeze

log = logging.getLogger("kontext")


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """How the teacher samples.

    Attributes:
        num_steps: of the teacher; sampler: euler, heun or dpmpp_2m.
        guidance: the embedded one; shift: of the schedule, see `schedules.timesteps`.
        batch: samples at once; repeats: pictures a request, each from its own noise.
    """

    num_steps: int = 28
    sampler: str = "euler"
    guidance: float = 2.5
    shift: Shift = "resolution"
    batch: int = 64
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_steps, self.batch, self.repeats) < 1:
            raise ValueError(f"num_steps, batch and repeats must be 1 or more, not {self}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; use one of {', '.join(SAMPLERS)}")


def sample_latents(
    transformer: Flux,
    given: Conditions,
    seeds: Sequence[int],
    *,
    grid: Tensor,
    sampler: str,
    guidance: float,
) -> Tensor:
    """Latents (B, 16, h, w) float32 that a transformer makes for conditions, one seed a sample."""
    height, width = given.rows * latents.PATCH, given.columns * latents.PATCH
    references = None
    if given.context is not None:
        references = References(
            tokens=given.context,
            ids=given.ids[given.num_target :],
            lengths=(given.context.shape[1],),
        )
    denoiser = Denoiser(
        transformer,
        PromptConditioning(txt=given.txt, vec=given.vec),
        references,
        height,
        width,
        guidance=guidance,
        planned=grid[:-1].tolist(),
    )
    run = SAMPLERS[sampler]
    if sampler == "few_step":
        run = partial(run, seed=list(seeds))
    x = latents.pack(latents.noise(len(given.txt), height, width, list(seeds))).to(denoiser.device)
    return latents.unpack(run(denoiser, x, grid), height, width)


def sample_student(
    transformer: Flux, given: Conditions, seeds: Sequence[int], num_steps: int, *, guidance: float
) -> Tensor:
    """Latents (B, 16, h, w) of a distilled transformer in 1, 2 or 4 steps."""
    grid = few_steps(num_steps)
    return sample_latents(transformer, given, seeds, grid=grid, sampler="few_step", guidance=guidance)


def synthesize(
    teacher: KontextModule,
    sources: Sequence[Path],
    folder: Path,
    config: SynthesisConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    on_shard: Callable[[int, int], bool | None] | None = None,
) -> list[Path]:
    """Write a shard of teacher samples for each source shard and repeat that has none yet; returns all of them.

    Args:
        on_shard: called with (shards done, shards in all) after each new one; stops if it returns True.

    Raises:
        ValueError: no sources; Collapsed: the teacher made constant or infinite latents.
    """
    if not sources:
        raise ValueError("no source shards: encode contexts and words first")
    jobs = [(source, number) for source in sources for number in range(config.repeats)]
    paths = [folder / f"{source.stem}-s{number}.safetensors" for source, number in jobs]
    teacher = freeze(teacher, dtype)
    for done, ((source, number), path) in enumerate(zip(jobs, paths, strict=True), start=1):
        if path.exists():
            continue
        shard = load_file(source)
        first_seed = (zlib.crc32(f"{config.seed}/{source.stem}/{number}".encode()) << 20) + 1
        write_shard(path, {**shard, "target": _targets(teacher, shard, config, first_seed, dtype)})
        log.info("synthesized %s (%d of %d)", path.name, done, len(jobs))
        if on_shard is not None and on_shard(done, len(jobs)):
            break
    return paths


def _targets(
    teacher: KontextModule,
    shard: dict[str, Tensor],
    config: SynthesisConfig,
    first_seed: int,
    dtype: torch.dtype,
) -> Tensor:
    count = len(shard["target"])
    num_target = shard["target"][0, 0].numel() // latents.PATCH**2
    grid = timesteps(config.num_steps, num_target, config.shift)
    made = []
    for start in range(0, count, config.batch):
        rows = slice(start, min(count, start + config.batch))
        batch = {key: value[rows] for key, value in shard.items()}
        given = encode_conditions(teacher, batch, guidance=config.guidance, dtype=dtype)
        seeds = range(first_seed + rows.start, first_seed + rows.stop)
        x_0 = sample_latents(
            teacher.transformer,
            given,
            list(seeds),
            grid=grid,
            sampler=config.sampler,
            guidance=config.guidance,
        )
        check_real(x_0.flatten(2).transpose(1, 2))
        made.append(x_0.half().cpu())
    return torch.cat(made)


def shard_groups(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Shards by what can go into one batch: the same shapes of target and context."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(files):
        with safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape()[1:] for key in file.keys()}
        names = [
            f"{key}-{shapes[key][-1]}x{shapes[key][-2]}" for key in ("target", "context") if key in shapes
        ]
        groups.setdefault("-".join(names), []).append(path)
    return groups
