"""The loop's sums: gradients over micro-batches, what a compiled task computes, and the time left."""

from __future__ import annotations

import json

import pytest
import torch
from compiler import needs_compiler
from torch import nn

from kontext_core.training.loop import LoopConfig, step_generator, train


class Line:
    """y = w·x by least squares on fixed rows, `size` a micro-batch, in order."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(5, 3, bias=False)
        self.x, self.y = torch.randn(12, 5), torch.randn(12, 3)

    def batch(self, step: int, micro: int, size: int) -> dict[str, torch.Tensor]:
        rows = slice(micro * size, (micro + 1) * size)
        return {"x": self.x[rows], "y": self.y[rows]}

    def loss(self, batch, generator):
        return ((self.module(batch["x"]) - batch["y"]) ** 2).mean(), {}


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_micro_batches_add_up_to_the_gradient_of_all_their_rows(tmp_path, clip):
    def trained(folder: str, batch: int, accumulate: int) -> torch.Tensor:
        config = LoopConfig(
            steps=3, batch=batch, accumulate=accumulate, lr=1e-2, warmup=0, ema=0, clip=clip, log_every=1
        )
        return train(Line(), config, tmp_path / folder).weight.detach()

    whole = trained("whole", 12, 1)
    torch.testing.assert_close(trained("thirds", 4, 3), whole, rtol=1e-5, atol=1e-7)
    # the same number of rows a step from a third of the data is another gradient
    assert (trained("one", 4, 1) - whole).abs().max() > 1e-3
    losses, norms = (
        [
            [json.loads(row)[key] for row in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "thirds")
        ]
        for key in ("loss", "gradient_norm")
    )
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_the_time_left_is_that_of_the_steps_left(tmp_path):
    config = LoopConfig(steps=6, batch=4, lr=1e-2, warmup=0, ema=0, log_every=2)
    train(Line(), config, tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        # seconds a step are written to 4 digits, seconds left as whole ones
        assert row["seconds_left"] == pytest.approx((6 - row["step"]) * row["seconds_per_step"], abs=0.51)
        assert row["samples_per_second"] > 0


@needs_compiler
def test_compiled_blocks_train_as_eager_ones(task_of):
    found = {}
    for compiled in (False, True):
        task = task_of(compile_blocks=compiled)
        group = next(part for part in task.data.groups if part.name == "edit").tensors
        batch = {key: value[:4] for key, value in group.items()}
        loss, _ = task.loss(batch, step_generator(0, 0, 0))
        loss.backward()
        found[compiled] = (
            loss.detach(),
            {name: p.grad for name, p in task.module.named_parameters() if p.grad is not None},
        )
    (eager, gradients), (loss, compiled) = found[False], found[True]
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-6)
    assert compiled.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # other orders of sums in float32, relative to the largest of each weight
        assert (compiled[name] - gradient).abs().max() <= 2e-4 * gradient.abs().max() + 1e-7, name
