"""One step of latent adversarial diffusion distillation, or of its control, plain regression.

    x_t   = interpolate(x_0, eps, t)          x_0 made by the teacher, t in {1, .75, .5, .25}
    x̂_0  = x_t − t·student(x_t, t)
    t̂    ~ LogitNormal(1, 1)
    real  = heads(teacher's features of interpolate(x_0, eps', t̂))
    fake  = heads(teacher's features of interpolate(x̂_0, eps', t̂))

Both sides of a pair have the same eps' and t̂: the expected gradients are what they are with two draws, but what noise
alone does to the scores cancels in the heads' and leaves what the student did.

The teacher's weights are frozen; gradients go through it to the student. Both sides' losses come from one pass: the
student's with the heads' weights held, the heads' on features cut off from the student.
Source: arXiv 2403.12015 section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import latents
from ..flow import interpolate, x_0_from_velocity
from ..models.discriminator import BlockFeatures, Discriminator, discriminator_params
from ..models.transformer import Flux
from ..training import mixed
from ..training.data import LatentDataset
from ..training.flow import KontextModule
from .config import DistillConfig, renoise_times, student_times
from .guards import batch_spread, check_real
from .losses import discriminator_hinge, generator_hinge
from .network import Conditions, encode_conditions, freeze, velocity

DAMPING_STEP = 0.1  # noise added, in deviations of a latent
CALIBRATION = 16  # batches of four whose features tell the heads their scale


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """What each side goes down, and numbers for log and guards; `heads` is None in regression."""

    student: Tensor
    heads: Tensor | None = None
    numbers: dict[str, float] = field(default_factory=dict)


class Distillation:
    """Teacher, student and heads.

    Args:
        teacher: transformer and text encoders; frozen, in `dtype` (copied if it is not that already).
        student: starts as the teacher (`student.make_student`); float32 masters.
        data: shards whose targets the teacher made (`synthesize`).
        dtype: computed in; losses and updates are in float32.
        compile_blocks: torch.compile each block of teacher and student.
    """

    def __init__(
        self,
        teacher: KontextModule,
        student: Flux,
        data: LatentDataset,
        config: DistillConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        compile_blocks: bool = False,
        seed: int = 0,
    ) -> None:
        self.teacher, self.student, self.data, self.config = freeze(teacher, dtype), student, data, config
        self.dtype = dtype
        self.heads: Discriminator | None = None
        if config.objective == "ladd":
            params = discriminator_params(teacher.transformer.params, config.head_channels)
            self.heads = Discriminator(params, operations=mixed)
            self.heads.init_weights(torch.Generator().manual_seed(seed))
            self.heads.to(next(student.parameters()).device)
            self.heads.calibrate(self._calibration(seed))
        if compile_blocks:
            for transformer in (self.teacher.transformer, student):
                for block in [*transformer.double_blocks, *transformer.single_blocks]:
                    block.compile()

    @torch.no_grad()
    def _calibration(self, seed: int) -> Iterator[list[Tensor]]:
        """Features of real latents, by which the heads are scaled; the same ones whenever a run goes on."""
        settings, generator = self.config, torch.Generator().manual_seed(seed)
        for step in range(CALIBRATION):
            batch = self.data.batch(step, 0, 4)
            given = encode_conditions(self.teacher, batch, guidance=settings.guidance, dtype=self.dtype)
            x_0 = latents.pack(batch["target"].float())
            t_hat = renoise_times(len(x_0), settings.renoise_mean, settings.renoise_std, generator)
            x_t = interpolate(x_0, torch.randn(x_0.shape, generator=generator), t_hat)
            device = given.txt.device
            yield self.features(x_t.to(device), t_hat.to(device), given)

    def losses(
        self, batch: dict[str, Tensor], generator: torch.Generator, *, step: int, steps: int
    ) -> StepLosses:
        """Both sides' losses on a batch of `training.data`'s layout."""
        given = encode_conditions(self.teacher, batch, guidance=self.config.guidance, dtype=self.dtype)
        device = given.txt.device
        x_0 = latents.pack(batch["target"].to(device).float())
        check_real(x_0)

        def noise() -> Tensor:
            return torch.randn(x_0.shape, generator=generator).to(device)

        t = student_times(len(x_0), self.config.probabilities(step, steps), generator).to(device)
        x_t = interpolate(x_0, noise(), t)
        guess = x_0_from_velocity(x_t, velocity(self.student, x_t, t, given), t)
        mse = F.mse_loss(guess, x_0)
        numbers = {"mse": float(mse.detach())}
        blind = t == 1
        if int(blind.sum()) > 1 and (truth := batch_spread(x_0[blind])) > 1e-3:
            # from pure noise, where variety must be made and can be lost
            numbers["spread"] = batch_spread(guess[blind]) / truth
        if self.heads is None:
            return StepLosses(student=mse, numbers=numbers)

        settings = self.config
        t_hat = renoise_times(len(x_0), settings.renoise_mean, settings.renoise_std, generator).to(device)
        eps = noise()
        real_x, fake_x = interpolate(x_0, eps, t_hat), interpolate(guess, eps, t_hat)
        with torch.no_grad():
            real_features = self.features(real_x, t_hat, given)
        fake_features = self.features(fake_x, t_hat, given)
        with held(self.heads):
            student = generator_hinge(self.scores(fake_features, t_hat, given))
        real = self.scores(real_features, t_hat, given)
        fake = self.scores([block.detach() for block in fake_features], t_hat, given)
        heads = discriminator_hinge(real, fake)
        if settings.damping:
            heads = heads + settings.damping * sum(
                self._steepness(x_t, noise(), scores, t_hat, given)
                for x_t, scores in ((real_x, real), (fake_x.detach(), fake))
            )
        numbers["real_score"], numbers["fake_score"] = (
            float(torch.stack([s.detach().mean() for s in side]).mean()) for side in (real, fake)
        )
        numbers["head_loss"] = float(heads.detach())
        return StepLosses(student=student, heads=heads, numbers=numbers)

    def _steepness(
        self, x_t: Tensor, eps: Tensor, scores: list[Tensor], t: Tensor, given: Conditions
    ) -> Tensor:
        """How much the scores move with a little noise: the squared gradient of R1, by a finite difference."""
        with torch.no_grad():
            moved = self.features(x_t + DAMPING_STEP * eps, t, given)
        pairs = zip(scores, self.scores(moved, t, given), strict=True)
        return torch.stack([(a - b).square().mean() for a, b in pairs]).mean() / DAMPING_STEP**2

    def features(self, x_t: Tensor, t: Tensor, given: Conditions) -> list[Tensor]:
        """The frozen teacher's target tokens (B, N, hidden) after every block."""
        hooks = BlockFeatures(given.num_target)
        velocity(self.teacher.transformer, x_t, t, given, hooks)
        return hooks.features

    def scores(self, features: list[Tensor], t: Tensor, given: Conditions) -> list[Tensor]:
        return self.heads(features, given.rows, given.columns, t, given.vec)


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's own weights from what is computed inside; they pass through it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
