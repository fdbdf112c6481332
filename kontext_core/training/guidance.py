"""Guidance distillation: a student that gives in one pass what its teacher gives in two.

The teacher, frozen, is run with the words and with the empty prompt; the student, told the scale w by its guidance
embedding, learns v_empty + w·(v_words − v_empty). Source: arXiv 2210.03142 eq. 4, in velocities; arXiv 2404.07724
for guiding a part of the way alone.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.transformer import Flux
from .flow import FlowTask, KontextModule


class GuidanceTask(FlowTask):
    """A `Task` for `loop.train`; arguments as for `FlowTask`, whose module is the student.

    `config.guidance` is the range of scales; captions are never dropped.

    Args:
        teacher: gives velocities with and without words; frozen here. A teacher with a guidance embedding is told
            scale 1.
        above: t from which on there is guidance; below, the student learns the teacher's velocity with words. What is
            painted is decided at high t; later guidance mostly exaggerates colours.
        gain: a scale s asks for w = 1 + gain·(s − 1): below 1, the published default of 2.5 is a weaker guidance.
    """

    def __init__(
        self,
        module: KontextModule,
        *args,
        teacher: KontextModule,
        above: float = 0.0,
        gain: float = 1.0,
        **options,
    ) -> None:
        if not module.transformer.params.guidance_embed:
            raise ValueError("the student has no guidance embedding: make it with `student_of`")
        super().__init__(module, *args, **options)
        self.above, self.gain = above, gain
        self.teacher = teacher.requires_grad_(False).eval()
        # the teacher's passes are the same task's, seen through its own weights
        self.teaching = copy.copy(self)
        self.teaching.module, self.teaching.checkpointing = self.teacher, None

    def loss(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        sample = self.noised(batch, generator)
        sample = replace(sample, dropped=torch.zeros_like(sample.dropped))
        with torch.no_grad():
            plain = replace(sample, guidance=torch.ones_like(sample.guidance))
            with_words = self.teaching.velocity(plain).float()
            without = self.teaching.velocity(replace(plain, dropped=torch.ones_like(sample.dropped))).float()
            scale = torch.where(sample.t >= self.above, 1 + self.gain * (sample.guidance - 1), 1.0)
            target = without + scale[:, None, None] * (with_words - without)
        loss = F.mse_loss(self.velocity(sample).float(), target)
        return loss, {"guided_by": (target - with_words).square().mean()}


def student_of(teacher: Flux, *, operations=None) -> Flux:
    """A copy of the teacher with a guidance embedding; a new one adds nothing yet, its last layer being zero.

    Args:
        operations: layers to build with; see `mixed`.
    """
    from . import mixed

    weight = teacher.img_in.weight
    params = replace(teacher.params, guidance_embed=True)
    student = Flux(params, operations=operations or mixed, dtype=weight.dtype, device=weight.device)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("guidance_in.") for name in missing)
    if missing:
        with torch.no_grad():
            student.guidance_in.out_layer.weight.zero_()
            student.guidance_in.out_layer.bias.zero_()
    return student
