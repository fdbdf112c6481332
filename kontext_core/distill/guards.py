"""Guards against the known collapses of adversarial distillation: they stop, with a sentence.

Known: hinge loss with a batch of 1 collapses; zeros (or anything constant) taken for real latents teach the student
to give that; a student can lose its variety or blow up; a discriminator can win for good.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Collapsed(ValueError):
    """Distillation stopped because going on would only spoil the student."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When to stop.

    Attributes:
        min_batch: samples a micro-batch, at least.
        spread: (low, high) of the student's variety from pure noise, as a share of the truth's: low is what may be left
            of the most it has had (a student starts with blurred means, whose variety is small), high is absolute.
        won: a discriminator loss below this means that it has won (2 is undecided, 0 is all told apart).
        score: the largest mean size of a score.
        memory: of the running means, as a decay; patience: steps in a row beyond a limit.
    """

    min_batch: int = 4
    spread: tuple[float, float] = (0.5, 2.0)
    won: float = 0.02
    score: float = 50.0
    memory: float = 0.95
    patience: int = 100


def check_batch(batch: int, config: GuardConfig) -> None:
    """Raises Collapsed where the batch is too small for the hinge loss."""
    if batch < config.min_batch:
        raise Collapsed(
            f"a batch of {batch} is too small: with few samples the hinge loss collapses to one picture. Use "
            f"{config.min_batch} or more (memory short? a smaller model dtype, or LoRA, rather than a smaller batch)"
        )


def check_real(real: Tensor) -> None:
    """Raises Collapsed where a latent (B, N, C) that is to be the truth is constant or not finite."""
    spread = real.float().flatten(1).std(dim=1)
    if not bool(torch.isfinite(spread).all()):
        raise Collapsed("the real latents hold NaN or infinity: synthesize them again")
    if float(spread.min()) < 1e-4:
        count = int((spread < 1e-4).sum())
        raise Collapsed(
            f"{count} of {len(spread)} real latents are constant (zeros?): the student would learn to give that. "
            "Make the real latents with the teacher (the synthesize stage)"
        )


def batch_spread(x: Tensor) -> float:
    """How different the samples of a batch are: root mean variance over the batch (B, N, C), pixel by pixel."""
    return float(x.detach().float().var(dim=0, unbiased=False).mean().sqrt())


class Watch:
    """Running means of the opponents' statistics, and how long each has been beyond its limit."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.means: dict[str, float] = {}
        self.beyond: dict[str, int] = {}

    def update(
        self, *, real_score: float, fake_score: float, head_loss: float, spread: float | None = None
    ) -> None:
        """Take in a step's statistics; `spread` is the student's as a share of the truth's, None where not measured.

        Raises:
            Collapsed: a limit was passed for `patience` steps in a row.
        """
        values = {"real": real_score, "fake": fake_score, "loss": head_loss, "spread": spread}
        memory = self.config.memory
        for name, value in values.items():
            if value is not None:
                self.means[name] = memory * self.means.get(name, value) + (1 - memory) * value
        if "spread" in self.means:
            self.means["most"] = max(self.means.get("most", 0.0), min(1.0, self.means["spread"]))
            self._check_spread()
        means = self.means
        size = max(abs(means["real"]), abs(means["fake"]))
        self._count(
            "won",
            means["loss"] < self.config.won,
            f"the discriminator tells every student's picture from a real one (loss {means['loss']:.3f}, limit "
            f"{self.config.won}): it teaches nothing more. Lower head_lr or head_channels",
        )
        self._count(
            "score",
            size > self.config.score,
            f"the scores have grown to {size:.0f} (limit {self.config.score:.0f}). Lower head_lr",
        )

    def _check_spread(self) -> None:
        now, most, (low, high) = self.means["spread"], self.means["most"], self.config.spread
        self._count(
            "narrow",
            now < low * most,
            f"the student's pictures have become alike: their variety is {now:.2f} of the truth's and was {most:.2f} "
            f"(limit {low} of that). Lower the student's learning rate, or use a larger batch",
        )
        self._count(
            "wide",
            now > high,
            f"the student's latents have blown up: their variety is {now:.2f} of the truth's (limit {high}). Lower "
            "both learning rates",
        )

    def _count(self, name: str, beyond: bool, sentence: str) -> None:
        self.beyond[name] = self.beyond.get(name, 0) + 1 if beyond else 0
        if self.beyond[name] >= self.config.patience:
            raise Collapsed(f"stopped, {self.config.patience} steps in a row: {sentence}")

    def state(self) -> dict[str, dict[str, float]]:
        """For a checkpoint's JSON."""
        return {"means": dict(self.means), "beyond": dict(self.beyond)}

    def load(self, state: dict[str, dict[str, float]]) -> None:
        self.means = dict(state["means"])
        self.beyond = {name: int(count) for name, count in state["beyond"].items()}
