"""A run that is killed anywhere and resumed goes on with bitwise the losses and weights of an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from kontext_core.training import checkpoint
from kontext_core.training.checkpoint import load_checkpoint, save_checkpoint
from kontext_core.training.loop import LoopConfig, Stopped, train

HERE = Path(__file__).parent
CONFIG = LoopConfig(
    steps=8, batch=3, accumulate=2, lr=1e-3, muon_lr=1e-3, warmup=2, ema=0.9, checkpoint_every=3, log_every=1
)


class Losses:
    """Records every step's loss; raises at one of them."""

    def __init__(self, stop_at: int | None = None, error: type[BaseException] = Stopped) -> None:
        self.seen, self.stop_at, self.error = {}, stop_at, error

    def __call__(self, step: int, steps: int, loss: float) -> None:
        self.seen[step] = loss
        if step == self.stop_at:
            raise self.error


def run(task, folder, losses: Losses, config: LoopConfig = CONFIG) -> dict[str, torch.Tensor]:
    return {
        name: value.clone()
        for name, value in train(task, config, folder, on_step=losses).state_dict().items()
    }


@pytest.fixture(scope="module")
def whole(task_of, tmp_path_factory):
    losses = Losses()
    weights = run(task_of(), tmp_path_factory.mktemp("whole"), losses)
    return losses.seen, weights


def assert_goes_on_as(whole, task, folder, before: Losses) -> None:
    losses = Losses()
    weights = run(task, folder, losses)
    assert {**before.seen, **losses.seen} == whole[0]
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["loss"] for row in rows] == [whole[0][step] for step in range(1, 9)]


@pytest.mark.parametrize("step", [1, 4, 7])
def test_stopped_politely_between_checkpoints(whole, task_of, tmp_path, step):
    before = Losses(stop_at=step)
    with pytest.raises(Stopped):
        run(task_of(), tmp_path, before)
    assert load_checkpoint(tmp_path / "checkpoint")[1]["step"] == step
    assert_goes_on_as(whole, task_of(), tmp_path, before)


@pytest.mark.parametrize("step", [2, 5])
def test_killed_between_checkpoints_takes_the_lost_steps_again(whole, task_of, tmp_path, step):
    before = Losses(stop_at=step, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(task_of(), tmp_path, before)
    found = load_checkpoint(tmp_path / "checkpoint")
    assert (found[1]["step"] if found else 0) == step - 2
    assert_goes_on_as(whole, task_of(), tmp_path, before)


@pytest.mark.parametrize("moment", ["partial", "old", "old and partial"])
def test_killed_while_a_checkpoint_was_written(whole, task_of, tmp_path, moment):
    before = Losses(stop_at=5)
    with pytest.raises(Stopped):
        run(task_of(), tmp_path, before)
    folder = tmp_path / "checkpoint"
    if "partial" in moment:  # killed inside a file
        shutil.copytree(folder, tmp_path / "checkpoint.partial")
        (tmp_path / "checkpoint.partial" / "state.json").unlink()
        (tmp_path / "checkpoint.partial" / "weights.safetensors").write_bytes(b"half")
    if "old" in moment:  # killed between the two renames
        folder.rename(tmp_path / "checkpoint.old")
    assert_goes_on_as(whole, task_of(), tmp_path, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "log.jsonl"]


def test_a_log_line_that_a_kill_cut_off_is_dropped(whole, task_of, tmp_path):
    before = Losses(stop_at=5)
    with pytest.raises(Stopped):
        run(task_of(), tmp_path, before)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert_goes_on_as(whole, task_of(), tmp_path, before)


def test_at_every_moment_of_writing_a_whole_checkpoint_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"

    def save(step: int) -> None:
        save_checkpoint(folder, {"weights": {"w": torch.full((2,), float(step))}}, {"step": step})

    class Killed(BaseException):
        pass

    save(0)
    newest = 0
    for kill_at in range(1, 12):  # the kill-th call that changes a name or takes something away
        calls = []

        def counted(function, kill_at=kill_at, calls=calls):
            def call(*args, **kwargs):
                calls.append(function)
                if len(calls) == kill_at:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "replace", counted(checkpoint.os.replace))
            patch.setattr(checkpoint.shutil, "rmtree", counted(checkpoint.shutil.rmtree))
            patch.setattr(checkpoint, "save_tensors", counted(checkpoint.save_tensors))
            try:
                save(kill_at)
            except Killed:
                pass
        parts, state = load_checkpoint(folder)
        assert parts["weights"]["w"].eq(state["step"]).all()
        assert state["step"] >= newest
        newest = state["step"]


def test_a_process_that_is_killed_outright_again_and_again_has_the_losses_of_one_that_never_was(
    shards, tmp_path
):
    """SIGKILL at moments that nothing chose: while a step runs, and while a checkpoint is written."""
    steps, shard_folder = 60, next(iter(shards.values()))[0].parent

    def start(name: str) -> subprocess.Popen:
        inside = HERE / "inside" / "killable.py"
        return subprocess.Popen(
            [sys.executable, str(inside), str(HERE), str(shard_folder), str(tmp_path / name), str(steps)],
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )

    def rows(text: str) -> dict[int, str]:
        whole = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return {int(step): loss for step, loss in whole}

    whole = rows(start("whole").communicate()[0])
    assert list(whole) == list(range(1, steps + 1))
    seen: list[dict[int, str]] = []
    for lines, wait in ((9, 0.0), (12, 0.017), (15, 0.031)):
        process = start("killed")
        text = "".join(process.stdout.readline() for _ in range(lines))
        time.sleep(wait)
        process.kill()
        seen.append(rows(text + process.communicate()[0]))
    seen.append(rows(start("killed").communicate()[0]))
    assert seen[-1] and max(seen[-1]) == steps
    for before, after in zip(seen, seen[1:], strict=False):
        # no step is left out, and at most those since the last checkpoint are taken again
        assert max(before) - 2 < min(after) <= max(before) + 1
    assert all(whole[step] == loss for part in seen for step, loss in part.items())
    first, second = (load_checkpoint(tmp_path / name / "checkpoint")[0] for name in ("whole", "killed"))
    assert first.keys() == second.keys()
    for part, tensors in first.items():
        assert all(torch.equal(tensors[name], value) for name, value in second[part].items())
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == losses[1]


def test_out_of_time_is_a_checkpoint_and_an_early_return(task_of, tmp_path):
    losses = Losses()
    train(task_of(), CONFIG, tmp_path, on_step=losses, stop_after_seconds=0.0)
    assert list(losses.seen) == [1] and load_checkpoint(tmp_path / "checkpoint")[1]["step"] == 1


def test_a_finished_run_gives_the_same_weights_again(whole, task_of, tmp_path):
    run(task_of(), tmp_path, Losses())
    again = Losses()
    weights = run(task_of(), tmp_path, again)
    assert again.seen == {}
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())


def test_a_checkpoint_of_another_model_is_named(task_of, tmp_path):
    run(task_of(), tmp_path, Losses(), LoopConfig(steps=1, batch=2))
    other = task_of()
    other.module.transformer.single_blocks.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"is of another model: transformer\.single_blocks\.2"):
        run(other, tmp_path, Losses(), LoopConfig(steps=2, batch=2))
    with pytest.raises(ValueError, match="go on with the same muon_lr"):
        run(task_of(), tmp_path, Losses(), LoopConfig(steps=2, batch=2, muon_lr=1e-3))
