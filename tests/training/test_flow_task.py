"""The flow's loss: its sign, its weights, what is drawn, its precision, and that it goes down."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from compiler import needs_compiler
from torch.utils._python_dispatch import TorchDispatchMode

from kontext_core import latents
from kontext_core.models.attention import attention
from kontext_core.training.activation import Checkpointing, hooks
from kontext_core.training.data import LatentDataset, write_shard
from kontext_core.training.flow import FlowConfig, choose_tokens
from kontext_core.training.loop import LoopConfig, step_generator, train


def loss_and_gradients(task, batch, seed: int = 0):
    task.module.zero_grad()
    loss, numbers = task.loss(batch, step_generator(seed, 0, 0))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}
    return loss.detach(), numbers, gradients


def batch_of(task, group: str, size: int = 4) -> dict[str, torch.Tensor]:
    tensors = next(part for part in task.data.groups if part.name == group).tensors
    return {key: value[:size] for key, value in tensors.items()}


class Knows(torch.nn.Module):
    """A transformer that knows the data: from x_t = (1 − t)·x_0 + t·eps it gives eps − x_0 = (x_t − x_0)/t."""

    def __init__(self, x_0: torch.Tensor, sign: float = 1.0) -> None:
        super().__init__()
        self.x_0, self.sign = x_0, sign
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance, *, num_target, attend, hooks):
        x_t = img[:, :num_target]
        return self.sign * (x_t - self.x_0) / timesteps[:, None, None] + self.weight


@pytest.mark.parametrize("group", ["edit", "text"])
def test_who_knows_the_data_has_no_loss_and_the_opposite_sign_has_much(task_of, group):
    task = task_of()
    batch = batch_of(task, group)
    x_0 = latents.pack(batch["target"].float())
    task.module.transformer = Knows(x_0)
    # (x_t − x_0)/t in float32, with t as small as 0.02: rounding of 1e-7/t, squared
    assert task.loss(batch, step_generator(0, 0, 0))[0] < 1e-9
    task.module.transformer = Knows(x_0, sign=-1.0)
    # twice the velocity off: 4·(1 + 1), of unit noise and unit data
    assert 4 < task.loss(batch, step_generator(0, 0, 0))[0] < 16


def test_tokens_count_by_their_weight_within_each_example(task_of):
    task = task_of(config=FlowConfig(changed_weight=8.0))
    batch = batch_of(task, "edit", 2)
    x_0 = latents.pack(batch["target"].float())
    wrong = x_0.clone()
    wrong[0, 0] += 1.0
    task.module.transformer = Knows(wrong)
    losses = []
    for value in (0, 255):
        weight = torch.zeros(2, 4, dtype=torch.uint8)
        weight[0, 0] = value
        losses.append(task.loss({**batch, "weight": weight}, step_generator(0, 0, 0))[0].item())
    # one of four tokens: 1/4 of its error unweighted, 9/(9 + 3) weighted
    assert losses[1] / losses[0] == pytest.approx((9 / 12) / (1 / 4), rel=1e-4)


def test_the_same_generator_gives_the_same_loss_and_another_step_another(task_of):
    task = task_of()
    batch = batch_of(task, "edit")
    first = task.loss(batch, step_generator(0, 3, 1))[0]
    assert torch.equal(first, task.loss(batch, step_generator(0, 3, 1))[0])
    seeds = [(0, 3, 0), (0, 4, 1), (1, 3, 1)]
    assert all(not torch.equal(first, task.loss(batch, step_generator(*seed))[0]) for seed in seeds)


def test_dropped_captions_are_the_empty_prompt(task_of):
    task = task_of()
    ids = torch.randint(0, 30, (2, 6)), torch.tensor([[1, 2, 29, 29, 29, 29, 29, 29]] * 2)
    empty = task.empty[0][None].expand(2, -1), task.empty[1][None].expand(2, -1)
    dropped = task.encode(*ids, torch.tensor([True, True]))
    plain = task.encode(*empty, torch.tensor([False, False]))
    assert all(torch.equal(a, b) for a, b in zip(dropped, plain, strict=True))
    kept = task.encode(*ids, torch.tensor([False, True]))
    assert not torch.equal(kept[0][0], plain[0][0]) and torch.equal(kept[0][1], plain[0][1])


def test_every_weight_gets_a_gradient(task_of):
    task = task_of()
    _, _, gradients = loss_and_gradients(task, batch_of(task, "edit"))
    without = {name for name, _ in task.module.named_parameters()} - gradients.keys()
    # the last single-stream block's text tokens go nowhere, but its weights are shared with the picture's
    assert not without, without


def test_bfloat16_gradients_point_where_float32_ones_do(task_of):
    exact = loss_and_gradients(task_of(), batch_of(task_of(), "edit"))
    task = task_of(dtype=torch.bfloat16)
    mixed = loss_and_gradients(task, batch_of(task, "edit"))
    assert mixed[0].item() == pytest.approx(exact[0].item(), rel=0.02)
    for name in exact[2]:
        assert mixed[2][name].dtype == torch.float32
    whole = [torch.cat([part[2][name].flatten() for name in exact[2]]) for part in (exact, mixed)]
    cosine = torch.nn.functional.cosine_similarity(*whole, dim=0).item()
    # bfloat16 keeps 8 bits: an error of 2^-9 a product, some tens of them in a row
    assert cosine > 0.999


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_activations_change_no_bit(task_of, mode, every):
    plain = task_of()
    task = task_of(checkpointing=Checkpointing(mode, every))
    batch = batch_of(plain, "edit")
    loss, _, gradients = loss_and_gradients(plain, batch)
    again, _, same = loss_and_gradients(task, batch)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


def test_checkpointing_keeps_fewer_bytes_for_the_backward_pass(task_of):
    def kept(checkpointing) -> int:
        task = task_of(checkpointing=checkpointing)
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            task.loss(batch_of(task, "edit"), step_generator(0, 0, 0))
        return sum(seen.values())

    # "full" hides every block's insides; what "selective" keeps stays out of these hooks' sight
    assert kept(hooks("full")) < 0.8 * kept(None)
    with pytest.raises(ValueError, match="checkpointing is 'some'"):
        hooks("some")


class Counted(TorchDispatchMode):
    """How often each operation is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_no_attention_and_half_of_the_products_again(task_of):
    def backward(checkpointing) -> Counter[str]:
        task = task_of(checkpointing=checkpointing, attend=attention)
        loss, _ = task.loss(batch_of(task, "edit"), step_generator(0, 0, 0))
        with Counted() as counted:
            loss.backward()
        return counted.seen

    def products(seen: Counter[str]) -> int:
        return seen["mm"] + seen["addmm"]

    def attended(seen: Counter[str]) -> int:
        return sum(count for name, count in seen.items() if "attention" in name and "backward" not in name)

    plain, full, selective = (backward(hooks(mode)) for mode in ("none", "full", "selective"))
    blocks = 3
    assert (attended(plain), attended(full), attended(selective)) == (0, blocks, 0)
    again, kept = products(full) - products(plain), products(selective) - products(plain)
    # a double-stream block has eight products, a single-stream block two; modulation lies outside of them
    assert again >= 8 + 2 * 2 and kept == again // 2


@needs_compiler
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_blocks_can_be_compiled(task_of, mode):
    plain, task = task_of(), task_of(checkpointing=hooks(mode), compile_blocks=True)
    batch = batch_of(plain, "edit")
    loss, _, gradients = loss_and_gradients(plain, batch)
    again, _, found = loss_and_gradients(task, batch)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # other orders of sums in float32, relative to the largest of each weight
        assert (found[name] - gradient).abs().max() <= 2e-4 * gradient.abs().max() + 1e-7, name


def test_two_halves_of_a_batch_have_the_whole_ones_loss(task_of):
    from kontext_core.training.parallel import World

    batch = batch_of(task_of(), "edit", 4)
    whole = task_of().loss(batch, step_generator(0, 0, 0))[0]
    halves = [task_of(world=World(rank, 2)).loss(batch, step_generator(0, 0, 0))[0] for rank in (0, 1)]
    # the same rows in two sums
    assert sum(halves).item() / 2 == pytest.approx(whole.item(), rel=1e-5)


def test_overfitting_two_examples_nears_the_least_loss_there_is(task_of, tmp_path):
    task = task_of(config=FlowConfig(changed_weight=0.0, caption_dropout=0.0, t_mean=1.5))
    group = next(part for part in task.data.groups if part.name == "edit")
    task.data.groups = [replace(group, tensors={key: value[:2] for key, value in group.tensors.items()})]
    task.data.phases = [(0, torch.ones(1))]
    losses = []
    config = LoopConfig(
        steps=150, batch=8, lr=1e-2, warmup=5, ema=0, checkpoint_every=1000, log_every=1000, muon_lr=1e-2
    )
    train(task, config, tmp_path, on_step=lambda step, steps, loss: losses.append(loss))
    # unit noise and unit data: knowing nothing costs 2; two memorised pictures leave the noise, of whose 64 numbers a
    # token of 32 can carry half, so about 0.5 is the least
    assert losses[0] > 1.5
    assert sum(losses[-20:]) / 20 < 0.75


def test_phases_draw_what_they_name(shards):
    data = LatentDataset(shards, {"edit": 1.0}, [(5, {"text": 1.0}), (10, {"edit": 1.0, "text": 1.0})])
    kinds = ["context" in data.batch(step, 0, 2) for step in range(40)]
    assert all(kinds[:5]) and not any(kinds[5:10]) and 5 < sum(kinds[10:]) < 25
    with pytest.raises(ValueError, match="from step 3 on no group is drawn"):
        LatentDataset(shards, {"edit": 1.0}, [(3, {"other": 1.0})])


def test_groups_drawn_alone_have_no_contexts(shards):
    groups = {"edit": shards["edit"], "alone": shards["edit"]}
    data = LatentDataset(groups, {"edit": 1.0}, [(5, {"alone": 1.0})], alone=["alone"])
    for step in range(10):
        batch = data.batch(step, 0, 2)
        assert ("context" in batch) == (step < 5)
        assert {"target", "t5", "clip", "weight"} <= batch.keys()


def test_a_shard_that_lacks_a_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing \['clip', 'weight'\]"):
        write_shard(tmp_path / "x.safetensors", {"target": torch.zeros(1, 16, 4, 4), "t5": torch.zeros(1, 6)})


def test_chosen_tokens_are_the_changed_ones_first_and_a_quarter_any():
    weight = torch.zeros(2, 64)
    weight[0, :10], weight[1, :60] = 0.4, 1.0
    chosen = choose_tokens(weight, 32, step_generator(0, 0, 0))
    assert chosen.shape == (2, 32)
    assert all(len(set(row)) == 32 and row == sorted(row) for row in chosen.tolist())
    assert set(range(10)) <= set(chosen[0].tolist())
    # of sixty changed ones three quarters of the places are theirs by right; the rest is drawn from all the others
    seen = torch.cat([choose_tokens(weight, 32, step_generator(0, step, 0))[1] for step in range(40)])
    assert set(seen.tolist()) == set(range(64))
    drawn = [choose_tokens(weight, 32, step_generator(0, 0, 0)) for _ in range(2)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("group", ["edit", "text"])
def test_who_knows_the_data_has_no_loss_on_chosen_tokens_either(task_of, group):
    task = task_of(config=FlowConfig(target_tokens=3, text_tokens=4))
    batch = batch_of(task, group)
    sample = task.noised(batch, step_generator(0, 0, 0))
    chosen = sample.chosen
    assert chosen.shape == (4, 3) and sample.target.shape == (4, 3, 64) and sample.weight.shape == (4, 3)
    h, w = batch["target"].shape[-2:]
    assert torch.equal(sample.ids[:, :3], latents.position_ids(h, w)[chosen])
    if group == "edit":
        assert torch.equal(sample.ids[:, 3:], latents.position_ids(4, 4, index=1).expand(4, -1, -1))
    x_0 = latents.pack(batch["target"].float()).gather(1, chosen[..., None].expand(-1, -1, 64))
    task.module.transformer = Knows(x_0)
    assert task.loss(batch, step_generator(0, 0, 0))[0] < 1e-9


def test_as_many_tokens_as_a_picture_has_are_all_of_it_and_words_are_cut_to_the_asked_length(task_of):
    whole, chosen = task_of(), task_of(config=FlowConfig(target_tokens=4, text_tokens=6))
    batch = batch_of(whole, "edit")
    assert torch.equal(
        whole.loss(batch, step_generator(0, 0, 0))[0], chosen.loss(batch, step_generator(0, 0, 0))[0]
    )
    short = task_of(config=FlowConfig(text_tokens=3))
    txt, _ = short.encode(batch["t5"], batch["clip"], torch.tensor([True, False, False, False]))
    assert txt.shape[:2] == (4, 3)
