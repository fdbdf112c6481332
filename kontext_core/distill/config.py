"""What a distillation does, apart from how long and how fast (`training.loop.LoopConfig` says that)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Objective = Literal["ladd", "regression"]

STUDENT_TIMES = (1.0, 0.75, 0.5, 0.25)
"""Where the student is asked for x_0; sampling in 1, 2 or 4 steps visits these and no others."""


@dataclass(frozen=True, kw_only=True)
class TimeStage:
    """Probabilities of `STUDENT_TIMES` from a share of the training on."""

    start: float
    probabilities: tuple[float, float, float, float]


STAGES = (
    TimeStage(start=0.0, probabilities=(0.0, 0.0, 0.5, 0.5)),
    TimeStage(start=0.1, probabilities=(0.7, 0.1, 0.1, 0.1)),
)
"""Little noise first, where the teacher is almost right already; then mostly from pure noise.

Source: arXiv 2403.12015 section 3.2 (second-hand); the share at which it changes is ours.
"""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How teacher samples become losses.

    Attributes:
        objective: "ladd", or "regression": the mean squared error of x_0 against the teacher's, the control.
        stages: probabilities of the student's times, by share of the training done.
        renoise_mean, renoise_std: of the logit-normal t̂ at which the discriminator looks. 1 and 1 are for a megapixel;
            smaller pictures are hidden by less noise: the mean less by half the logarithm of the ratio of the areas.
        guidance: the embedded guidance of teacher and student; the model's own default.
        head_channels: width of a discriminator head; head_lr: its learning rate.
        betas: of AdamW, for both sides: a short memory, since the opponent moves.
        damping: weight of the squared gradient of the heads' scores by their input, on real and fake (R1 and R2 of
            arXiv 1801.04406, as a finite difference): it stops the two sides from circling; 0 saves two passes.
        head_start: steps in which only the discriminator learns: untrained heads push the student nowhere useful.
    """

    objective: Objective = "ladd"
    stages: tuple[TimeStage, ...] = STAGES
    renoise_mean: float = 1.0
    renoise_std: float = 1.0
    guidance: float = 2.5
    head_channels: int = 64
    head_lr: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.99)
    damping: float = 0.0
    head_start: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("ladd", "regression"):
            raise ValueError(f"objective is {self.objective!r}; use 'ladd' or 'regression'")
        if not 0 <= self.damping < math.inf or self.head_start < 0:
            raise ValueError(
                f"damping is {self.damping} and head_start {self.head_start}; they must be 0 or more, and finite"
            )
        if not (math.isfinite(self.renoise_mean) and 0 <= self.renoise_std < math.inf):
            raise ValueError(
                f"renoise_mean is {self.renoise_mean} and renoise_std {self.renoise_std}; they must be finite, the "
                "second 0 or more"
            )
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1:
            raise ValueError(
                f"stages start at {starts}; the first starts at 0, the others later and before 1"
            )
        for stage in self.stages:
            if min(stage.probabilities) < 0 or abs(sum(stage.probabilities) - 1) > 1e-6:
                raise ValueError(
                    f"probabilities {stage.probabilities} of the student's times must be 0 or more and add up to 1"
                )

    def probabilities(self, step: int, steps: int) -> tuple[float, float, float, float]:
        """Of `STUDENT_TIMES`, at step `step` of `steps`."""
        share = step / max(1, steps)
        return next(stage.probabilities for stage in reversed(self.stages) if stage.start <= share)


def student_times(
    batch: int, probabilities: tuple[float, float, float, float], generator: torch.Generator
) -> Tensor:
    """t (B,) drawn from `STUDENT_TIMES`."""
    rows = torch.multinomial(torch.tensor(probabilities), batch, replacement=True, generator=generator)
    return torch.tensor(STUDENT_TIMES)[rows]


def renoise_times(batch: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """t̂ (B,) ~ LogitNormal(mean, std): what the discriminator sees is mostly noise, so it judges the whole."""
    return torch.sigmoid(mean + std * torch.randn(batch, generator=generator))
