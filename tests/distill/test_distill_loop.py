"""The distillation loop: resume is bitwise, guards stop it; synthesis goes on where it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from kontext_core.distill.config import DistillConfig
from kontext_core.distill.guards import Collapsed
from kontext_core.distill.ladd import Distillation
from kontext_core.distill.loop import distill
from kontext_core.distill.student import make_student
from kontext_core.distill.synthesize import SynthesisConfig, shard_groups, synthesize
from kontext_core.training.data import LatentDataset
from kontext_core.training.loop import LoopConfig, Stopped

SMALL = LoopConfig(steps=6, batch=4, lr=1e-3, warmup=2, ema=0.9, checkpoint_every=2, log_every=1)


@pytest.fixture
def make(build_module, write_toy_shard, tmp_path):
    module = build_module()
    path = write_toy_shard(tmp_path / "shard.safetensors", count=12)
    data = LatentDataset({"toy": [path]}, {"toy": 1.0})

    def make(objective: str = "ladd", **config) -> Distillation:
        config = DistillConfig(objective=objective, head_channels=8, **config)
        return Distillation(module, make_student(module.transformer), data, config, dtype=torch.float32)

    return make


def log_of(folder) -> list[dict]:
    timing = ("seconds_per_step", "samples_per_second", "seconds_left")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


@pytest.mark.parametrize("objective", ["ladd", "regression"])
def test_a_run_that_is_stopped_and_resumed_goes_on_bitwise(make, tmp_path, objective):
    whole = distill(make(objective), SMALL, tmp_path / "whole")

    def stop(step: int, steps: int, numbers: dict) -> None:
        if step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        distill(make(objective), SMALL, tmp_path / "parts", on_step=stop)
    resumed = distill(make(objective), SMALL, tmp_path / "parts")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    first, second = (
        json.loads((tmp_path / name / "checkpoint/state.json").read_text()) for name in ("whole", "parts")
    )
    assert first["watch"] == second["watch"]


def test_a_killed_run_logs_no_step_twice(make, tmp_path):
    """Step 3 is logged and not in a checkpoint when the process dies in it."""
    distill(make(), SMALL, tmp_path / "whole")

    def die(step: int, steps: int, numbers: dict) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(make(), SMALL, tmp_path / "parts", on_step=die)
    assert log_of(tmp_path / "parts")[-1]["step"] == 3
    distill(make(), SMALL, tmp_path / "parts")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_the_same_training_over_is_the_same(make, tmp_path):
    logs = []
    for name in ("a", "b"):
        distill(make(), SMALL, tmp_path / name)
        logs.append(log_of(tmp_path / name))
    assert logs[0] == logs[1]


def test_only_the_heads_learn_in_the_head_start(make, tmp_path):
    task = make(head_start=100)
    before = {name: p.clone() for name, p in task.student.named_parameters()}
    heads = {name: p.clone() for name, p in task.heads.named_parameters()}
    distill(task, SMALL, tmp_path / "run")
    assert all(torch.equal(p, before[name]) for name, p in task.student.named_parameters())
    assert any(not torch.equal(p, heads[name]) for name, p in task.heads.named_parameters())


def test_a_batch_of_one_is_refused_before_anything_is_written(make, tmp_path):
    with pytest.raises(Collapsed, match="batch of 1"):
        distill(make(), LoopConfig(steps=2, batch=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_objective_is_refused(make, tmp_path):
    distill(make("regression"), SMALL, tmp_path / "run")
    with pytest.raises(ValueError, match="another distillation"):
        distill(make(), SMALL, tmp_path / "run")


def test_synthesis_keeps_words_makes_latents_and_goes_on_where_it_was(toy, tmp_path):
    config = SynthesisConfig(num_steps=2, batch=48, repeats=2, shift="none")
    paths = synthesize(toy.teacher, [toy.held_out], tmp_path, config, dtype=torch.float32)
    source, first, second = (load_file(path) for path in (toy.held_out, *paths))
    assert all(torch.equal(source[key], first[key]) for key in ("t5", "clip", "weight"))
    assert not torch.equal(first["target"], second["target"]), "repeats have noise of their own"
    paths[0].unlink()
    kept = paths[1].stat().st_mtime_ns
    synthesize(toy.teacher, [toy.held_out], tmp_path, config, dtype=torch.float32)
    assert torch.equal(load_file(paths[0])["target"], first["target"])
    assert paths[1].stat().st_mtime_ns == kept
    assert list(shard_groups(paths).values()) == [paths]
