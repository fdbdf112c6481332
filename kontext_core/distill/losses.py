"""Hinge losses over the scores of many heads; high scores are real.

L_D = mean relu(1 − D(real)) + mean relu(1 + D(fake));  L_G = −mean D(fake).  Source: arXiv 1705.02894 section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """What the discriminator goes down: real above 1 and fake below −1 cost nothing; the heads count alike."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


def generator_hinge(fake: Sequence[Tensor]) -> Tensor:
    """What the student goes down: the fakes' scores, negated."""
    return -torch.stack([f.mean() for f in fake]).mean()
