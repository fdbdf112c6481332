"""The student beside its controls: distance from the teacher's many-step pictures, sharpness and error, by steps.

Controls: the teacher itself in as few steps, and a student of plain regression with the same compute (`compute`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation.distance import Interval, compare, sharpness_share
from ..models.transformer import Flux
from ..schedules import timesteps
from ..training.flow import KontextModule
from .guards import check_real
from .network import encode_conditions, freeze
from .synthesize import SynthesisConfig, sample_latents, sample_student


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of making the pictures, against the truth.

    Attributes:
        distance: from the truth's distribution (`evaluation.distance`); ladd_nearer: how much nearer the LADD student
            is at as many steps, above 0 where it is; None for itself.
        sharpness: as a share of the truth's.
        mse: of the latents against the truth's: what counts where the answer is unique.
    """

    name: str
    num_steps: int
    distance: Interval
    ladd_nearer: Interval | None
    sharpness: Interval
    mse: float


@torch.inference_mode()
def compare_students(
    teacher: KontextModule,
    students: dict[str, Flux],
    rows: dict[str, Tensor],
    *,
    num_steps: Sequence[int] = (1, 2, 4),
    config: SynthesisConfig | None = None,
    truth: Tensor | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    levels: int = 2,
) -> list[Row]:
    """Sample every student and the teacher on held-out rows and compare.

    Args:
        students: name -> transformer; the first is the one the others are compared with.
        rows: a batch in the layout of `training.data`.
        config: the teacher's own sampling; its batch is used for all.
        truth: latents to compare with; by default the rows' targets.
        decode: latents -> pictures in which distance and sharpness are measured; latents themselves by default.
        levels: of the pyramid; latents of 16×16 cells take 2, pictures 3 or more.

    Raises:
        Collapsed: the truth holds constant latents: a shard whose pictures were never made.
    """
    config = config or SynthesisConfig()
    teacher = freeze(teacher, dtype)
    truth = rows["target"].float() if truth is None else truth.float()
    check_real(truth.flatten(2).transpose(1, 2))
    count, num_target = len(truth), truth[0, 0].numel() // 4
    show = decode or (lambda latent: latent)
    shown_truth = show(truth)
    batches = [slice(start, min(count, start + config.batch)) for start in range(0, count, config.batch)]

    def run(transformer: Flux, number: int, *, few_step: bool) -> Tensor:
        made = []
        for part in batches:
            batch = {key: value[part] for key, value in rows.items()}
            given = encode_conditions(teacher, batch, guidance=config.guidance, dtype=dtype)
            seeds = [config.seed + 7_000_000 + row for row in range(part.start, part.stop)]
            if few_step:
                made.append(sample_student(transformer, given, seeds, number, guidance=config.guidance))
            else:
                grid = timesteps(number, num_target, config.shift)
                made.append(
                    sample_latents(
                        transformer, given, seeds, grid=grid, sampler=config.sampler, guidance=config.guidance
                    )
                )
        return torch.cat(made).float().cpu()

    found: list[Row] = []
    for number in num_steps:
        made = {name: run(student, number, few_step=True) for name, student in students.items()}
        made["teacher"] = run(teacher.transformer, number, few_step=False)
        shown = {name: show(latent) for name, latent in made.items()}
        result = compare(shown, shown_truth, levels=levels)
        found += [_row(name, number, made, shown, truth, shown_truth, result) for name in made]
    many = {"teacher": run(teacher.transformer, config.num_steps, few_step=False)}
    shown = {name: show(latent) for name, latent in many.items()}
    result = compare(shown, shown_truth, levels=levels)
    return [*found, _row("teacher", config.num_steps, many, shown, truth, shown_truth, result)]


def _row(name, number, made, shown, truth, shown_truth, result) -> Row:
    return Row(
        name=name,
        num_steps=number,
        distance=result.distances[name],
        ladd_nearer=result.nearer.get(name),
        sharpness=sharpness_share(shown[name], shown_truth),
        mse=float((made[name] - truth).square().mean()),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one a line."""
    lines = [f"{'':12} {'steps':>5}  {'distance':26} {'student nearer by':26} {'sharpness':26} {'mse':>8}"]
    for row in rows:
        nearer = "" if row.ladd_nearer is None else str(row.ladd_nearer)
        lines.append(
            f"{row.name:12} {row.num_steps:5}  {row.distance!s:26} {nearer:26} {row.sharpness!s:26} {row.mse:8.4f}"
        )
    return "\n".join(lines)
