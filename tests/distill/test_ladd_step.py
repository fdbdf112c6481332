"""One step of LADD: what gets gradients, what the heads see, and that it starts at the teacher."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from kontext_core import latents
from kontext_core.distill import ladd
from kontext_core.distill.config import DistillConfig
from kontext_core.distill.guards import Collapsed
from kontext_core.distill.ladd import Distillation
from kontext_core.distill.network import encode_conditions, freeze, velocity
from kontext_core.distill.student import is_lora, lora_state, make_student, merged_state, save_student
from kontext_core.models.lora import read_lora
from kontext_core.models.lora_apply import patch_state
from kontext_core.training.data import LatentDataset


@pytest.fixture
def parts(build_module, write_toy_shard, tmp_path):
    """A teacher with random weights, everywhere above zero gradients, and a shard with contexts."""
    module = build_module()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    path = write_toy_shard(tmp_path / "shard.safetensors", count=16, context=True)
    return module, LatentDataset({"toy": [path]}, {"toy": 1.0})


def make(parts, *, objective="ladd", lora_rank=0, dtype=torch.float32) -> Distillation:
    module, data = parts
    student = make_student(module.transformer, lora_rank=lora_rank)
    config = DistillConfig(objective=objective, head_channels=8)
    return Distillation(module, student, data, config, dtype=dtype)


def losses(task: Distillation, step: int = 50):
    batch = task.data.batch(0, 0, 6)
    return task.losses(batch, torch.Generator().manual_seed(1), step=step, steps=100)


def gradients(module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_no_gradient_reaches_the_teacher(parts):
    task = make(parts)
    found = losses(task)
    (found.student + found.heads).backward()
    assert not gradients(task.teacher) and not gradients(parts[0])
    assert not any(p.requires_grad for p in task.teacher.parameters())
    assert all(p.requires_grad for p in parts[0].parameters()), "the caller's own module stays as it was"


def test_each_side_s_loss_moves_that_side_alone(parts):
    task = make(parts)
    losses(task).student.backward()
    assert len(gradients(task.student)) > 20 and not gradients(task.heads)
    task = make(parts)
    losses(task).heads.backward()
    assert not gradients(task.student)
    heads = {name.split(".")[1] for name in gradients(task.heads)}
    assert heads == {"0", "1", "2"}, "every block's head learns"
    assert all(p.requires_grad for p in task.heads.parameters())


def test_a_perfect_student_is_not_told_from_the_truth(parts, monkeypatch):
    """Both sides of a pair have one noise, so only what the student did wrong can tell them apart."""
    task = make(parts)
    honest = losses(task).numbers
    assert honest["real_score"] != honest["fake_score"]
    truth = latents.pack(task.data.batch(0, 0, 6)["target"].float())
    monkeypatch.setattr(ladd, "x_0_from_velocity", lambda *_: truth)
    perfect = losses(task).numbers
    assert perfect["real_score"] == perfect["fake_score"] and perfect["mse"] == 0


def test_the_student_s_gradient_comes_through_the_teacher_s_features(parts):
    task = make(parts)
    found = losses(task)
    found.student.backward()
    first = {name: p.grad.clone() for name, p in task.student.named_parameters() if p.grad is not None}
    other = make(parts)
    with torch.no_grad():
        for parameter in other.teacher.transformer.single_blocks.parameters():
            parameter.mul_(1.5)
    losses(other).student.backward()
    second = dict(other.student.named_parameters())
    assert any(not torch.allclose(grad, second[name].grad) for name, grad in first.items())


def test_heads_see_the_teacher_s_features_of_the_target_at_t_hat(parts):
    task = make(parts)
    batch = task.data.batch(0, 0, 4)
    given = encode_conditions(task.teacher, batch, guidance=2.5, dtype=torch.float32)
    x_t = torch.randn(4, given.num_target, 64, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    seen = []
    handle = task.teacher.transformer.single_blocks[-1].register_forward_hook(
        lambda _, __, out: seen.append(out)
    )
    features = task.features(x_t, t, given)
    handle.remove()
    num_text = given.txt.shape[1]
    assert len(features) == 3
    assert torch.equal(features[-1], seen[0][:, num_text : num_text + given.num_target])
    scores = task.scores(features, t, given)
    assert [score.shape for score in scores] == [(4, given.num_target)] * 3


def test_damping_counts_how_steep_the_scores_are_and_spares_the_student(parts):
    module, data = parts
    plain, damped = (
        Distillation(
            module,
            make_student(module.transformer),
            data,
            DistillConfig(head_channels=8, damping=damping),
            dtype=torch.float32,
        )
        for damping in (0.0, 0.5)
    )
    first, second = losses(plain), losses(damped)
    assert torch.equal(first.student, second.student)
    assert float(second.heads.detach()) > float(first.heads.detach())
    (second.heads - float(first.numbers["head_loss"])).backward()
    assert gradients(damped.heads) and not gradients(damped.student) and not gradients(damped.teacher)
    with torch.no_grad():
        for parameter in damped.heads.parameters():
            parameter.zero_()  # level scores cost nothing
    flat = losses(damped)
    assert float(flat.heads.detach()) == pytest.approx(flat.numbers["head_loss"])


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_student_starts_as_the_teacher(parts, lora_rank):
    task = make(parts, lora_rank=lora_rank)
    given = encode_conditions(task.teacher, task.data.batch(0, 0, 4), guidance=2.5, dtype=torch.float32)
    x_t, t = torch.randn(4, given.num_target, 64), torch.full((4,), 0.5)
    teacher, student = (velocity(net, x_t, t, given) for net in (task.teacher.transformer, task.student))
    assert torch.equal(teacher, student)


def test_a_lora_student_trains_the_lora_alone_and_its_file_is_read_back(parts, tmp_path):
    task = make(parts, lora_rank=4)
    with torch.no_grad():
        for name, parameter in task.student.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    losses(task).student.backward()
    assert is_lora(task.student) and all(".lora_" in name for name in gradients(task.student))
    save_student(task.student, tmp_path / "lora.safetensors", dtype=torch.float32)
    file = read_lora(load_file(tmp_path / "lora.safetensors"))
    assert not file.unmatched and len(file.patches) == len(lora_state(task.student)) // 2
    patched, _ = patch_state(task.teacher.transformer.state_dict(), [(file, 1.0)])
    merged = merged_state(task.student)
    assert patched.keys() == merged.keys()
    assert all(torch.allclose(patched[name], merged[name], atol=1e-5) for name in merged)


def test_bfloat16_is_computed_in_and_masters_stay_float32(parts):
    task = make(parts, dtype=torch.bfloat16)
    assert {p.dtype for p in task.teacher.transformer.parameters()} == {torch.bfloat16}
    found = losses(task)
    (found.student + found.heads).backward()
    for side in (task.student, task.heads):
        assert {p.dtype for p in side.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in side.parameters() if p.grad is not None} == {torch.float32}


def test_zeros_as_real_latents_stop_at_once(parts):
    task = make(parts)
    batch = task.data.batch(0, 0, 6)
    batch["target"] = torch.zeros_like(batch["target"])
    with pytest.raises(Collapsed, match="constant"):
        task.losses(batch, torch.Generator(), step=0, steps=10)


def test_regression_is_the_squared_error_of_x_0_and_has_no_heads(parts):
    task = make(parts, objective="regression")
    found = losses(task)
    assert task.heads is None and found.heads is None
    assert float(found.student.detach()) == pytest.approx(found.numbers["mse"])


def test_token_ids_need_text_encoders(parts):
    teacher = freeze(parts[0], torch.float32)
    teacher.t5 = None
    with pytest.raises(ValueError, match="no text encoders"):
        encode_conditions(teacher, parts[1].batch(0, 0, 2), guidance=1.0, dtype=torch.float32)
