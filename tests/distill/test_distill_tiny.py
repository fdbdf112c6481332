"""The recipe's stage: from a teacher and its shards to two students, resumable."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kontext_core.distill.compute import step_flops
from kontext_core.distill.config import DistillConfig
from kontext_core.distill.synthesize import SynthesisConfig
from kontext_core.tiny.distill import _sources, distill_tiny
from kontext_core.training.data import LatentDataset
from kontext_core.training.loop import LoopConfig

OPTIONS = {
    "loop": LoopConfig(steps=2, batch=4, warmup=1, checkpoint_every=1),
    "synthesis": SynthesisConfig(num_steps=1, batch=16),
    "config": DistillConfig(head_channels=8),
    "dtype": torch.float32,
}


@pytest.fixture
def runs(write_toy_shard, tmp_path):
    for number, category in enumerate(("local", "style")):
        write_toy_shard(
            tmp_path / "latents" / f"edit-64x64-train-{category}-{0:07d}.safetensors",
            count=8,
            seed=number,
            context=True,
        )
    write_toy_shard(tmp_path / "latents" / "text-64x64-train-generate-0000000.safetensors", count=8, seed=3)
    return tmp_path


def test_the_stage_makes_both_students_and_goes_on_where_it_stopped(runs, build_module):
    teacher = build_module()
    first = distill_tiny(runs, teacher, seconds=0, examples=24, **OPTIONS)
    assert not first.finished
    for _ in range(12):
        if first.finished:
            break
        first = distill_tiny(runs, teacher, seconds=0.01, examples=24, **OPTIONS)
    assert first.finished
    assert len(list((runs / "distill" / "latents").glob("*.safetensors"))) == 3
    for path in (first.ladd, first.regression):
        tensors = load_file(path)
        assert tensors["img_in.weight"].shape == (32, 64)
        assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    steps = {
        name: json.loads((runs / "distill" / name / "checkpoint" / "state.json").read_text())["step"]
        for name in ("ladd", "regression")
    }
    data = LatentDataset({"edit": sorted((runs / "distill" / "latents").glob("edit-*"))}, {"edit": 1.0})
    flops = {
        name: step_flops(teacher, data, replace(OPTIONS["config"], objective=name)) * number
        for name, number in steps.items()
    }
    half_a_step = 0.5 / steps["regression"]
    assert steps["ladd"] == 2 and flops["regression"] / flops["ladd"] == pytest.approx(1, abs=2 * half_a_step)


def test_a_lora_student_stands_beside_the_full_one(runs, build_module):
    teacher = build_module()
    with torch.no_grad():  # the last layer begins at zero, which lets no gradient through to the blocks
        teacher.transformer.final_layer.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    done = distill_tiny(runs, teacher, examples=8, lora_rank=2, control=False, **OPTIONS)
    assert done.finished and not done.regression.exists()
    assert "img_in.weight" in load_file(done.ladd)
    lora = load_file(done.lora)
    assert all(key.startswith("diffusion_model.") and ".lora_" in key for key in lora)
    assert {value.shape[0] for key, value in lora.items() if ".lora_A" in key} == {2}
    assert max(float(value.abs().max()) for key, value in lora.items() if ".lora_B" in key) > 0
    state = json.loads((runs / "distill" / "lora" / "checkpoint" / "state.json").read_text())
    assert state["config"]["lr"] == pytest.approx(4 * OPTIONS["loop"].lr)


def test_samples_are_taken_by_category_and_the_first_numbers_first(write_toy_shard, tmp_path):
    names = {
        "generate": "text-64x64-train-generate-habit",
        "style": "edit-64x64-train-style-habit",
        "local": "edit-64x64-train-local-replace",
        "other": "edit-64x64-train-other",  # not of the mix: left out
    }
    for category, name in names.items():
        for number in range(6):
            path = tmp_path / f"{name}-{number:07d}.safetensors"
            write_toy_shard(path, count=2, seed=number, context=category != "generate")
    # 0.36, 0.18 and 0.14 of 16 examples: 8.5, 4.2 and 3.3, in whole shards of two
    expected = {"generate": 4, "style": 2, "local": 2}
    chosen = [path.stem for path in _sources(tmp_path, 16)]
    assert chosen == [
        f"{names[key]}-{number:07d}" for key, count in expected.items() for number in range(count)
    ]
    # of little there is still something of every category
    assert len(_sources(tmp_path, 1)) == 3


def test_a_negative_rank_is_refused_before_anything_is_trained(runs, build_module):
    with pytest.raises(ValueError, match="lora_rank is -1"):
        distill_tiny(runs, build_module(), lora_rank=-1, **OPTIONS)
    assert not (runs / "distill").exists()


def test_without_shards_it_says_what_to_run_first(build_module, tmp_path):
    with pytest.raises(ValueError, match="run the encode stage first"):
        distill_tiny(tmp_path, build_module(), **OPTIONS)
