"""The distillation stage of kontext-tiny's recipe: teacher samples, the LADD student, its control, a LoRA student.

The recipe calls `distill_tiny` with the trained teacher. Every part goes on where it was stopped. `compare` puts the
students beside each other.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from ..distill.compute import regression_steps
from ..distill.config import DistillConfig
from ..distill.guards import GuardConfig
from ..distill.ladd import Distillation
from ..distill.loop import distill
from ..distill.student import make_student, save_student
from ..distill.synthesize import SynthesisConfig, shard_groups, synthesize
from ..training.data import LatentDataset
from ..training.flow import KontextModule
from ..training.loop import LoopConfig, steps_done

log = logging.getLogger("kontext")

SYNTHESIS = SynthesisConfig(num_steps=12, batch=50)
LADD = DistillConfig(renoise_mean=-1.0, head_start=60, damping=0.1)
"""The paper's LogitNormal(1, 1) is for a megapixel. 64 tokens in place of 4,096 are hidden by as much less noise as
sampling's shift says: ½ ln of the ratio, -2.08. Without damping and with a momentum of 0.9 the two sides circle; at
5e-5 the student loses detail in one step (docs/log.md)."""
LOOP = LoopConfig(
    steps=400,
    batch=32,
    lr=2e-5,
    warmup=50,
    schedule="stable",
    decay=0.25,
    ema=0.98,
    checkpoint_every=50,
    log_every=20,
)
"""For 11 million parameters: AdamW alone, since Muon's updates are of full rank whatever the gradient's noise; the
heads learn far faster than the student, which starts as the teacher and has little to move."""
MIX = {
    "generate": 0.36, "style": 0.18, "character": 0.18, "local": 0.14, "global": 0.07, "several": 0.035, "text": 0.035,
}  # fmt: skip
"""Of the teacher's samples: most where many pictures are right, since that is what few steps blur."""
LORA_RATE = 4
"""How many times the full student's learning rate a LoRA's is: the same step in its factors moves the weights less. A
guess; it was not compared with others."""


@dataclass(frozen=True, kw_only=True)
class TinyStudents:
    """What the stage leaves: files (bfloat16, BFL keys; `lora` a LoRA's), and whether every part is finished."""

    ladd: Path
    regression: Path
    lora: Path
    finished: bool


def distill_tiny(
    runs: Path,
    teacher: KontextModule,
    *,
    examples: int = 7_000,
    loop: LoopConfig = LOOP,
    synthesis: SynthesisConfig = SYNTHESIS,
    config: DistillConfig = LADD,
    guards: GuardConfig | None = None,
    lora_rank: int = 0,
    control: bool = True,
    compile_blocks: bool = False,
    seconds: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> TinyStudents:
    """Distil the trained teacher with the shards of `runs`/latents; work lands in `runs`/distill.

    Args:
        examples: teacher samples to make, about, from whole source shards by `MIX`.
        loop: of the LADD student; the regression student takes as many steps as compute the same
            (`distill.compute`).
        lora_rank: of a LoRA that is trained by LADD as the full student is, and as long; 0 for none.
        control: also train the regression student.
        seconds: stop after this long, resumable.

    Raises:
        ValueError: no source shards, or a negative rank; Collapsed: a guard stopped the training.
    """
    if lora_rank < 0:
        raise ValueError(f"lora_rank is {lora_rank}; it must be 0 (no LoRA student) or more")
    started, folder = time.time(), runs / "distill"

    def left() -> float | None:
        return None if seconds is None else max(0.0, seconds - (time.time() - started))

    sources = _sources(runs / "latents", examples)
    paths = synthesize(
        teacher, sources, folder / "latents", synthesis, dtype=dtype, on_shard=lambda *_: left() == 0
    )
    names = ("ladd", "regression", "lora")
    students = TinyStudents(**{name: folder / f"{name}.safetensors" for name in names}, finished=False)
    if any(not path.exists() for path in paths):
        return students
    groups = shard_groups(paths)
    data = LatentDataset(groups, {name: len(files) for name, files in groups.items()})
    log.info("%d teacher samples in %d groups", len(data), len(groups))
    plans = [("ladd", config, loop)]
    if control:
        count, ratio = regression_steps(loop.steps, teacher, data, config, dtype=dtype)
        log.info(
            "a LADD step computes as much as %.2f of regression: %d and %d steps", ratio, loop.steps, count
        )
        longer = replace(loop, steps=count)
        plans.append(("regression", replace(config, objective="regression"), longer))
    if lora_rank:
        plans.append(("lora", config, replace(loop, lr=LORA_RATE * loop.lr)))
    for name, plan, steps in plans:
        if steps_done(folder / name) >= steps.steps and getattr(students, name).exists():
            continue
        student = make_student(teacher.transformer, lora_rank=lora_rank if name == "lora" else 0)
        task = Distillation(teacher, student, data, plan, dtype=dtype, compile_blocks=compile_blocks)
        distill(task, steps, folder / name, guards=guards, stop_after_seconds=left())
        save_student(student, getattr(students, name))
        if steps_done(folder / name) < steps.steps:
            return students
    return replace(students, finished=True)


def _sources(folder: Path, examples: int) -> list[Path]:
    """Source shards of the training split by `MIX`, at least one of each category, in the order of their numbers."""
    shards: dict[str, list[Path]] = {}
    for path in sorted(
        folder.glob("*-train-*.safetensors"), key=lambda path: (path.stem.rsplit("-", 1)[1], path.name)
    ):
        shards.setdefault(path.stem.partition("-train-")[2].split("-")[0], []).append(path)
    mix = {category: share for category, share in MIX.items() if category in shards}
    if not mix:
        raise ValueError(f"no shards in {folder}: run the encode stage first")
    chosen = []
    for category, share in mix.items():
        wanted, count = examples * share / sum(mix.values()), 0
        for path in shards[category]:
            size = _length(path)
            if count and count + size / 2 > wanted:
                break
            chosen.append(path)
            count += size
    return chosen


def _length(shard: Path) -> int:
    with safe_open(shard, "pt") as file:
        return file.get_slice("weight").get_shape()[0]
