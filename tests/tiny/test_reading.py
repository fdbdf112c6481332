"""What instructions are asked for, and that the encoders learn to answer."""

from __future__ import annotations

import pytest
import torch

from kontext_core.tiny import parts, phrases, reading, recipe, world
from kontext_core.tiny.reading import FIELDS, KINDS, UNASKED


def plans(category: str, count: int = 60) -> list[world.Plan]:
    return [world.plan("train", category, index) for index in range(count)]


@pytest.mark.parametrize("category", sorted(reading.MIX))
def test_every_answer_is_one_there_is(category):
    for plan in plans(category):
        row = reading.numbers(category, plan)
        assert len(row) == len(FIELDS)
        for number, (name, values) in zip(row, FIELDS.items(), strict=True):
            assert number == UNASKED or 0 <= number < len(values), name
        assert row[0] != UNASKED and KINDS[row[0]] == reading.answers(category, plan)["kind"]


@pytest.mark.parametrize("category", ["local", "generate", "style"])
def test_words_that_are_asked_for_stand_in_the_text(category):
    names = ("old shape", "old colour", "new shape", "new colour", "ink", "top", "wear colour")
    asked = 0
    for plan in plans(category):
        found = reading.answers(category, plan)
        for name in [*names, *(name for name in FIELDS if name.startswith("colour of"))]:
            if found.get(name):
                asked += 1
                assert found[name] in plan.instruction, (name, plan.instruction)
    assert asked > 60


def test_letters_are_those_of_the_new_word():
    spelt = 0
    for plan in plans("text"):
        found = reading.answers("text", plan)
        word = "".join(found.get(f"letter {k}", "") for k in range(6))
        if plan.kind == "recolour word":
            assert not word
        else:
            spelt += 1
            assert word == plan.truth.after.sign.word and f'"{word}"' in plan.instruction
    assert spelt > 30


def test_a_place_is_asked_for_only_where_one_is_named():
    for plan in plans("generate", 120):
        named = any(way in plan.instruction for ways in phrases.WHERE.values() for way in ways)
        assert ("shape at upper left" in reading.answers("generate", plan)) == named


def spreads(t5, ids: torch.Tensor) -> list[float]:
    """The standard deviation of every head's logits without the position bias, block by block."""
    found = []

    def listen(module, args):
        heads = module.params.num_heads
        q, k = (layer(args[0]).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (module.q, module.k))
        found.extend((q @ k.transpose(-1, -2)).std((0, 2, 3)).tolist())

    hooks = [block.layer[0].SelfAttention.register_forward_pre_hook(listen) for block in t5.encoder.block]
    with torch.no_grad():
        t5(ids, dtype=torch.float32)
    for hook in hooks:
        hook.remove()
    return found


def test_tempering_frees_attention_that_has_become_one_hot():
    module, _ = parts.build_module()
    data = reading.Texts("train", {"text": 16}, first=0, tokenizers=parts.ASSETS)
    ids = data.batch(0, 0, 16)["t5"]
    fresh = {name: value.clone() for name, value in module.t5.state_dict().items()}
    reading.temper(module.t5, ids, spread=3)
    for name, value in module.t5.state_dict().items():
        torch.testing.assert_close(value, fresh[name], rtol=0, atol=0)
    with torch.no_grad():
        for block in module.t5.encoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(20)
    assert min(spreads(module.t5, ids)) > 5
    reading.temper(module.t5, ids)
    assert spreads(module.t5, ids) == pytest.approx([1.5] * 16, rel=1e-3)


def test_staggered_heads_look_back_and_ahead():
    module, _ = parts.build_module()
    reading.stagger(module.t5)
    attention = module.t5.encoder.block[0].layer[0].SelfAttention
    bias = attention.position_bias(12, torch.device("cpu"))[0].detach()
    assert (bias[0].argmax(-1)[1:] == torch.arange(11)).all()
    assert (bias[1].argmax(-1)[:-1] == torch.arange(1, 12)).all()
    back = bias[2, 11].flip(0)[:7]  # from the last token on itself, then further and further back
    assert (back.diff() < 0).all() and bias[2, 0, 1:].max() < bias[2, 0, 0] - 3


def test_encoders_learn_to_spell(tmp_path):
    """Sixteen texts are learnt by heart, by encoders that begin with nothing."""
    torch.manual_seed(0)
    module, _ = parts.build_module()
    reader = reading.Reader(module.t5, module.clip)
    data = reading.Texts("train", {"text": 8, "local": 8}, first=0, tokenizers=parts.ASSETS)
    before = reading.accuracy(reader, data)
    config = reading.LoopConfig(
        steps=120, batch=16, lr=2e-3, muon_lr=4e-3, warmup=10, schedule="stable", ema=0.9
    )
    reading.train(reading.ReadingTask(reader, data), config, tmp_path)
    after = reading.accuracy(reader, data)
    assert sum(before.values()) / len(before) < 0.5
    assert sum(after.values()) / len(after) > 0.95, after
    assert after["kind"] == 1


def test_the_stage_hands_its_encoders_to_the_flow(tmp_path, monkeypatch):
    module, _ = parts.build_module()
    monkeypatch.setattr(reading, "HELD_OUT", 2)
    start = module.t5.state_dict()["shared.weight"].clone()
    found = reading.train_reading(
        module,
        tmp_path / "reading",
        tokenizers=parts.ASSETS,
        steps=2,
        examples=12,
        first=0,
        workers=1,
        lr=1e-3,
    )
    assert set(found) <= set(FIELDS) and "kind" in found
    taken = {}

    def train(task, *args, **kwargs):
        taken["t5"] = task.module.t5.state_dict()

    monkeypatch.setattr(recipe, "train", train)
    monkeypatch.setattr(
        recipe,
        "load_data",
        lambda *args, **kwargs: type("Data", (), {"groups": [], "__len__": lambda self: 0})(),
    )
    recipe.train_flow(
        tmp_path / "flow",
        tmp_path / "latents",
        reading.LoopConfig(steps=1, batch=1),
        recipe.FlowConfig(),
        compile_blocks=False,
        square=True,
        categories=(),
        seconds=None,
        reading=tmp_path / "reading",
    )
    learnt = module.t5.state_dict()
    assert not torch.equal(learnt["shared.weight"], start)
    for name, value in taken["t5"].items():
        torch.testing.assert_close(value, learnt[name], rtol=0, atol=0)
