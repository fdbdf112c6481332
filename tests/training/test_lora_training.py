"""LoRA layers: they begin as nothing, train alone, and are saved so that a loaded file gives the trained model."""

from __future__ import annotations

import pytest
import torch

from kontext_core.models.lora import read_lora
from kontext_core.training.flow import KontextModule
from kontext_core.training.loop import LoopConfig, train
from kontext_core.training.lora import TARGETS, add_lora, save_trained_lora


def frozen(task) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.module.transformer.named_parameters()}


def test_a_new_lora_changes_nothing_and_freezes_the_rest(task_of):
    plain, task = task_of(), task_of()
    layers = add_lora(task.module.transformer, rank=4)
    batch = plain.batch(0, 0, 2)
    generator = torch.Generator
    assert torch.equal(
        plain.loss(batch, generator().manual_seed(0))[0], task.loss(batch, generator().manual_seed(0))[0]
    )
    trained = {name for name, p in task.module.transformer.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in layers for part in ("down", "up")}


@pytest.mark.parametrize(("targets", "count"), [("attention", 8), ("blocks", 12), ("all", 16)])
def test_targets_choose_layers(task_of, targets, count):
    # one double block: 2 streams × (qkv, proj), 2 × 2 of MLPs, 2 modulations; two single blocks: 2 linear, 1 modulation
    assert len(add_lora(task_of().module.transformer, targets=targets)) == count
    assert targets in TARGETS


def test_targets_that_match_nothing_and_ranks_that_are_none_are_errors(task_of):
    transformer = task_of().module.transformer
    with pytest.raises(ValueError, match=r"no layer matches \['to_q'\].*double_blocks"):
        add_lora(transformer, targets="to_q")
    with pytest.raises(ValueError, match="no regular expressions"):
        add_lora(transformer, targets="(")
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(transformer, rank=0)


def test_a_trained_lora_is_saved_whole(task_of, tmp_path):
    task = task_of()
    before = frozen(task)
    task.module = KontextModule(task.module.transformer, task.module.t5, task.module.clip)
    task.module.t5.requires_grad_(False)
    task.module.clip.requires_grad_(False)
    layers = add_lora(task.module.transformer, rank=3, alpha=6, targets="all")
    config = LoopConfig(steps=3, batch=2, lr=1e-2, warmup=0, ema=0)
    train(task, config, tmp_path)
    path = tmp_path / "lora.safetensors"
    save_trained_lora(path, layers, dtype=torch.float32, metadata={"rank": "3"})
    from safetensors.torch import load_file

    file = read_lora(load_file(path))
    assert file.format == "kohya LoRA" and not file.unmatched and len(file.patches) == len(layers)
    # merged into the weights it began from, the file gives the trained model's output
    merged = task_of()
    for patch in file.patches:
        weight = merged.module.transformer.get_parameter(patch.key)
        assert torch.equal(weight, before[patch.key])
        change = patch.delta(weight)
        assert change.abs().max() > 1e-4
        weight.data.add_(change)
    batch = merged.batch(0, 0, 2)
    losses = [t.loss(batch, torch.Generator().manual_seed(0))[0].item() for t in (task, merged)]
    # W·x + s·B(A·x) against (W + s·B·A)·x, in float32
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
