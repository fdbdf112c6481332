"""The recipe of kontext-tiny in two minutes: its own stages on eight edits, a small transformer, and what it learnt.

The autoencoder goes on from the bundled weights; transformer and text encoders begin with nothing. Eight edits can be
learnt by heart: three of four must come out right, scored on pictures as the benchmark does. Held to are the last
losses, the share of edits done and kept, and that a model which learnt for one step does none of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kontext_core.models.autoencoder import Autoencoder
from kontext_core.tiny import autoencode, parts, recipe
from kontext_core.tiny.bench import run_bench
from kontext_core.tiny.editor import model_editor
from kontext_core.tiny.encode import ShardJob, encode_world, shard_jobs
from kontext_core.tiny.world import plan
from kontext_core.training.autoencoder import reconstruction_psnr
from kontext_core.training.checkpoint import save_checkpoint
from kontext_core.training.data import write_shard
from kontext_core.training.flow import FlowConfig
from kontext_core.training.loop import LoopConfig
from kontext_core.weights.load import load_model

CATEGORIES, EACH = ("local", "global"), 4
LOSS, RATE = 0.25, 0.75  # of the last steps, at most; of the edits, at least
SMALL = replace(parts.TRANSFORMER, hidden_size=128, num_heads=2, depth=1, depth_single_blocks=2)
LOOP = LoopConfig(
    steps=400,
    batch=8,
    lr=2e-3,
    muon_lr=4e-3,
    warmup=20,
    schedule="stable",
    ema=0.97,
    checkpoint_every=10_000,
    log_every=20,
)


def right(folder: Path) -> dict[str, float]:
    """Done and kept, by category, of the edits that are trained on."""
    editor = model_editor(load_model(folder), num_steps=8)
    report = run_bench(editor, split="train", count=EACH, categories=CATEGORIES, batch=2 * EACH)
    return {name: row["both"] for name, row in report.summary["categories"].items()}


@pytest.mark.timeout(900)
def test_two_minutes_of_the_recipe_learn_eight_edits(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "TRANSFORMER", SMALL)
    monkeypatch.setattr(parts, "SUPERVISED", 1)
    runs, model = tmp_path / "runs", tmp_path / "model"
    autoencoder = runs / "autoencoder"
    autoencode.train_autoencoder(
        autoencoder, steps=2, finish_steps=1, pool=24, batch=4, seconds=None, warm=True, held_out=8
    )
    module = Autoencoder(autoencode.AUTOENCODER)
    module.load_state_dict(load_file(autoencoder / "ae.safetensors"))
    held_out = autoencode.picture_pool(8, "val").float() / 127.5 - 1
    assert reconstruction_psnr(module, held_out) > 27

    jobs = [ShardJob(split="train", category=name, start=0, count=EACH) for name in CATEGORIES]
    encode_world(jobs, autoencoder / "ae.safetensors", parts.ASSETS, runs / "latents", 1)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(parts.ASSETS / name, model / name)

    def train(loop: LoopConfig) -> None:
        recipe.train_flow(
            runs / "flow",
            runs / "latents",
            loop,
            FlowConfig(changed_weight=2.0, caption_dropout=0.0),
            compile_blocks=False,
            square=True,
            categories=(),
            seconds=None,
        )
        recipe.export(model, flow=runs / "flow", autoencoder=recipe.autoencoder_of(runs, warm=False))

    train(LoopConfig(steps=1, batch=8, lr=1e-4, checkpoint_every=1, log_every=1))
    assert max(right(model).values()) == 0  # noise: the scorer gives nothing away
    shutil.rmtree(runs / "flow")

    train(LOOP)
    rows = [json.loads(line) for line in (runs / "flow" / "log.jsonl").read_text().splitlines()]
    losses = torch.tensor([row["loss"] for row in rows])
    assert losses[0] > 1 and losses[-3:].mean() < LOSS
    assert sum(right(model).values()) / len(CATEGORIES) >= RATE


def test_a_guidance_stage_that_is_not_finished_is_not_taken_for_the_model(tmp_path):
    def begin(stage: str, step: int) -> None:
        state = {"step": step, "config": {"steps": 4}}
        save_checkpoint(tmp_path / stage / "checkpoint", {"weights": {"a": torch.zeros(1)}}, state)

    with pytest.raises(ValueError, match="run the flow stage first"):
        recipe.trained(tmp_path, warm=False)
    begin("flow", 2)
    assert recipe.last_stage(tmp_path) == tmp_path / "flow"
    begin("guidance", 3)
    with pytest.raises(ValueError, match="step 3 of 4: run the guidance stage to its end"):
        recipe.trained(tmp_path, warm=False)
    begin("guidance", 4)
    assert recipe.last_stage(tmp_path) == tmp_path / "guidance"


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_one_half_of_the_autoencoder_leaves_the_other_as_it_is(tmp_path, half):
    autoencode.train_half(tmp_path, half, steps=2, pool=8, batch=4, lr=1e-3, seconds=None, held_out=4)
    before, after = load_file(autoencode.BUNDLED_FILE), load_file(tmp_path / "ae.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name].float(), after[name])}
    assert changed and all(name.startswith(f"{half}.") for name in changed)


@pytest.mark.parametrize("text", ["foo=1", "local", "local=0", "local=much"])
def test_shares_that_make_no_sense_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        recipe._mix(text)


def test_shares_add_up_to_one():
    assert recipe._mix("local=3,text=1") == {"local": 0.75, "text": 0.25}


def test_shards_of_chosen_kinds_hold_no_others():
    shares = recipe._mix("local=1,local:bigger+smaller=3")
    plain, *chosen = shard_jobs("train", 24, weights=shares, shard=6)
    assert (plain.kinds, plain.numbers()) == ((), list(range(6)))
    assert [job.start for job in chosen] == [0, 96, 192]
    for job in chosen:
        numbers = job.numbers()
        kinds = {plan("train", "local", number).kind for number in numbers}
        assert kinds == {"bigger", "smaller"} and len(set(numbers)) == 6
        assert job.start <= numbers[0] and numbers[-1] < job.start + 96
    assert len({job.name for job in [plain, *chosen]}) == 4
    with pytest.raises(ValueError, match="96 examples of 'local' hold 0 of the kinds taller"):
        replace(chosen[0], kinds=("taller",)).numbers()


def test_shards_are_grouped_and_drawn_alone_as_asked(tmp_path):
    def shard(name: str) -> None:
        tensors = {
            "target": torch.zeros(2, 16, 4, 4),
            "t5": torch.zeros(2, 6).int(),
            "clip": torch.zeros(2, 8).int(),
            "weight": torch.zeros(2, 4, dtype=torch.uint8),
        }
        if name.startswith("edit"):
            tensors["context"] = torch.zeros(2, 16, 4, 4)
            tensors["context_labels"] = torch.zeros(2, 4, 3, dtype=torch.uint8)
        write_shard(tmp_path / name, tensors)

    for name in ("edit-128x128-train-text-0", "edit-128x128-train-local-0", "edit-160x96-train-text-0"):
        shard(f"{name}.safetensors")
    shard("text-128x128-train-generate-0.safetensors")

    def groups(**options) -> dict[str, int]:
        data = recipe.load_data(tmp_path, square=True, **options)
        return {group.name: len(group) for group in data.groups}

    assert groups() == {"edit-128x128": 4, "text-128x128": 2}
    assert groups(alone=["text"]) == {"edit-128x128": 4, "text-128x128": 2, "alone-edit-128x128": 2}
    assert groups(categories=["generate"], alone=["text"]) == {"text-128x128": 2, "alone-edit-128x128": 2}
    data = recipe.load_data(tmp_path, square=True, categories=["generate"], alone=["text"])
    assert not any("context" in group.tensors or "context_labels" in group.tensors for group in data.groups)
