"""The synthetic world: deterministic, disjoint splits, unique answers, and words that stay few and short."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kontext_core.tiny import holdout, phrases, world
from kontext_core.tiny.dice import Dice
from kontext_core.tiny.figures import letter_centres
from kontext_core.tiny.scene import BIGGER, COLUMNS, SMALLER, THING_SIZE, Sign, slot

ROOT = Path(__file__).parents[2]
DRAFTS = 400
GOLDEN_DICE = [566, 449, 415, 517, 273]
GOLDEN_WORDS = "1bdf7471150d4e2b"
GOLDEN_MEANS = [171.74, 105.13, 215.47, 161.26, 183.21, 159.64]


def test_dice_give_the_numbers_they_always_gave() -> None:
    dice = Dice("a", 1)
    assert [dice.below(1000) for _ in range(5)] == GOLDEN_DICE
    assert sorted(dice.shuffled(range(9))) == list(range(9))


def test_an_example_depends_on_nothing_but_its_name() -> None:
    first = world.example("train", "local", 7)
    world.example("test", "style", 3)
    again = world.example("train", "local", 7)
    assert first.instruction == again.instruction
    assert np.array_equal(first.context, again.context) and np.array_equal(first.target, again.target)


def test_another_process_with_another_hash_seed_makes_the_same_words_and_pictures() -> None:
    code = (
        "from kontext_core.tiny import world; import hashlib; h = hashlib.sha256()\n"
        "for c in world.CATEGORIES:\n"
        "    e = world.example('val', c, 5); h.update(e.instruction.encode() + e.target.tobytes())\n"
        "print(h.hexdigest())"
    )
    here = hashlib.sha256()
    for category in world.CATEGORIES:
        item = world.example("val", category, 5)
        here.update(item.instruction.encode() + item.target.tobytes())
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == here.hexdigest()


def test_the_world_is_the_version_that_the_bundled_model_was_trained_on() -> None:
    """Words must be exactly these; pictures' means may differ by a rounding of another Pillow."""
    digest = hashlib.sha256()
    means = []
    for category in world.CATEGORIES:
        for index in range(20):
            plan = world.plan("train", category, index)
            digest.update(f"{plan.instruction}|{plan.caption}".encode())
        means.append(world.example("train", category, 0).target.mean())
    assert digest.hexdigest()[:16] == GOLDEN_WORDS, "scenes or phrasings changed: raise world.VERSION"
    assert np.allclose(means, GOLDEN_MEANS, atol=0.2)


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_training_never_shows_a_held_out_combination(category: str) -> None:
    held = holdout.HELD["val"] | holdout.HELD["test"]
    for index in range(DRAFTS):
        truth = world.plan("train", category, index).truth
        assert not (holdout.combinations(truth.before) | holdout.combinations(truth.after)) & held


@pytest.mark.parametrize("category", world.CATEGORIES)
@pytest.mark.parametrize(("split", "other"), [("val", "test"), ("test", "val")])
def test_half_of_each_held_out_split_asks_for_something_new(category: str, split: str, other: str) -> None:
    for index in range(60):
        plan = world.plan(split, category, index)
        seen = holdout.combinations(plan.truth.before) | holdout.combinations(plan.truth.after)
        assert plan.novel == (index % 2 == 1)
        assert bool(seen & holdout.HELD[split]) == plan.novel
        assert not seen & holdout.HELD[other]


def test_splits_share_no_scene() -> None:
    scenes = {split: {world.plan(split, "local", i).truth for i in range(200)} for split in holdout.SPLITS}
    assert not scenes["train"] & scenes["test"] and not scenes["val"] & scenes["test"]


def test_texts_are_short_and_their_words_few() -> None:
    texts = world.corpus(6000)
    assert len(texts) == 6000
    assert max(phrases.tokens(text) for text in texts) <= phrases.LIMIT
    assert 8 <= np.median([len(text.split()) for text in texts]) <= 20
    words = {word for text in texts for word in re.findall(r"[a-z]+", text)}
    assert 250 <= len(words) <= 600
    assert not any(re.search(r"[{}|()]|  | ,", text) for text in texts)


@pytest.mark.parametrize("kind", sorted(phrases.TEMPLATES))
def test_every_instruction_has_dozens_of_phrasings(kind: str) -> None:
    dice = Dice("phrasings", kind)
    names = (
        "the",
        "a",
        "old",
        "new",
        "bare",
        "where",
        "side",
        "scenery",
        "at",
        "time",
        "when",
        "bad",
        "grade",
        "sign",
    )
    fields = {name: name for name in (*names, "content", "setting")} | {"ink": ""}
    framed = kind not in ("style", "character")
    assert len({phrases.phrase(dice, kind, frame=framed, **fields) for _ in range(1500)}) >= 24


def test_a_local_edit_changes_exactly_what_it_says() -> None:
    kinds = set()
    for index in range(DRAFTS):
        plan = world.plan("train", "local", index)
        before, after = plan.truth.before, plan.truth.after
        kinds.add(plan.kind)
        gone = [thing for thing in before.things if thing not in after.things]
        new = [thing for thing in after.things if thing not in before.things]
        assert len(gone) == (plan.kind != "add") and len(new) == (plan.kind != "remove")
        if plan.kind == "add":
            assert new[0].size == THING_SIZE and (new[0].x, new[0].y) == slot(new[0].place)[:2]
            assert any(where in plan.instruction for where in phrases.WHERE[new[0].place])
        elif plan.kind == "move":
            assert new[0].x in COLUMNS and new[0].y == gone[0].y and new[0].name == gone[0].name
        elif plan.kind in ("bigger", "smaller"):
            factor = BIGGER if plan.kind == "bigger" else SMALLER
            assert new[0].size == gone[0].size * factor
        elif plan.kind == "recolour":
            assert new[0].shape == gone[0].shape and f" {new[0].colour}" in f" {plan.instruction}"
        elif plan.kind == "replace":
            assert (new[0].x, new[0].y, new[0].size) == (gone[0].x, gone[0].y, gone[0].size)
            assert new[0].name in plan.instruction
        names = [thing.name for thing in after.things]
        assert len(set(names)) == len(names)
        assert len({thing.place for thing in after.things}) == len(names)
    assert kinds == {"recolour", "remove", "add", "replace", "move", "bigger", "smaller"}


def test_a_text_edit_names_its_word_and_every_letter_colour_that_is_not_the_usual_one() -> None:
    for index in range(DRAFTS):
        plan = world.plan("train", "text", index)
        before, after = plan.truth.before.sign, plan.truth.after.sign
        assert (before.kind, before.board) == (after.kind, after.board)
        if plan.kind == "recolour word":
            assert before.word == after.word and after.ink in plan.instruction
        else:
            assert f'"{after.word}"' in plan.instruction
            assert after.ink == before.ink or f" {after.ink}" in plan.instruction
        assert 2 <= len(after.word) <= 5


def test_a_character_keeps_its_identity_and_a_style_its_look() -> None:
    for index in range(100):
        truth = world.plan("train", "character", index).truth
        assert truth.before.creature.identity == truth.after.creature.identity
        assert truth.before.background != truth.after.background
        truth = world.plan("train", "style", index).truth
        assert truth.before.look == truth.after.look and truth.after.look.name != "flat"


@pytest.mark.parametrize("category", ["local", "text"])
def test_outside_the_change_mask_nothing_changes(category: str) -> None:
    for index in range(20):
        item = world.example("train", category, index)
        gap = np.abs(item.context.astype(int) - item.target.astype(int)).max(-1)
        assert gap[~item.change_mask].max() <= 4
        assert 0.002 < item.change_mask.mean() < 0.5


@pytest.mark.parametrize("size", [(96, 96), (160, 96), (96, 192), (131, 100), (256, 256)])
def test_a_scene_is_the_same_at_every_size(size: tuple[int, int]) -> None:
    for category in world.CATEGORIES:
        item = world.example("val", category, 3, size)
        assert item.target.shape == (size[1], size[0], 3) and item.target.dtype == np.uint8
        assert item.change_mask.shape == (size[1], size[0])
        assert item.instruction == world.plan("val", category, 3).instruction


def test_a_larger_picture_is_the_same_picture() -> None:
    small = world.example("train", "local", 1).target.astype(float)
    large = world.example("train", "local", 1, (256, 256)).target.astype(float)
    halved = large.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(small - halved).mean() < 2.5  # edges fall between pixels differently


def test_a_mixture_goes_on_where_it_stopped() -> None:
    whole = [item.instruction for item in world.examples("train", start=0, count=12, size=(64, 64))]
    rest = [item.instruction for item in world.examples("train", start=7, count=5, size=(64, 64))]
    assert whole[7:] == rest
    only = world.examples("val", {"text": 1.0}, count=3, size=(64, 64))
    assert {item.category for item in only} == {"text"}


def test_wrong_names_and_sizes_are_told() -> None:
    with pytest.raises(ValueError, match=r"split is 'dev', but must be one of train, val, test"):
        world.example("dev", "local", 0)
    with pytest.raises(ValueError, match=r"category is 'remix', but must be one of local"):
        world.example("train", "remix", 0)
    with pytest.raises(ValueError, match=r"at least 32 pixels"):
        world.example("train", "local", 0, (16, 128))


def test_several_edits_are_each_of_another_thing_and_named_in_turn() -> None:
    for index in range(100):
        plan = world.plan("train", "several", index)
        kinds = plan.kind.split(" + ")
        before, after = plan.truth.before.things, plan.truth.after.things
        gone = [thing for thing in before if thing not in after]
        assert 2 <= len(kinds) <= 3 and after
        assert len(gone) == sum(kind != "add" for kind in kinds)
        assert len(after) - len(before) == kinds.count("add") - kinds.count("remove")
        assert phrases.tokens(plan.instruction) <= phrases.LIMIT
        for thing in after:
            if thing not in before:
                named = {thing.name, thing.shape, thing.colour} | set(phrases.WHERE[thing.place])
                assert any(name in plan.instruction for name in named) or "move" in kinds
    assert "several" not in world.CATEGORIES


def test_a_letter_stands_in_the_tokens_of_its_cell_whatever_the_word() -> None:
    for kind in ("billboard", "shop", "poster"):
        for word in ("NO", "STOP", "HELLO"):
            centres = letter_centres(Sign(kind=kind, board="cream", word=word, ink="black"), (128, 128))
            assert [x for x, _ in centres] == [24 + 16 * k for k in range(len(word))]
            assert {y % 16 for _, y in centres} == {0}
    with pytest.raises(ValueError, match="7 letters, but a board has 6 cells"):
        letter_centres(Sign(kind="shop", board="cream", word="WELCOME", ink="black"), (128, 128))
