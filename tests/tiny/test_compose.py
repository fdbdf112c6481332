"""The habit of composing: one layout for the same words, any of them right, and nothing else changed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kontext_core.tiny import compose, phrases, world
from kontext_core.tiny.scene import Thing
from kontext_core.tiny.scorer import score

COUNT = 60


def pairs(category: str):
    for index in range(COUNT):
        free, usual = (world.plan("train", category, index, habit=habit) for habit in (False, True))
        yield free, usual


@pytest.mark.parametrize("category", world.OPEN)
def test_only_the_layout_changes(category):
    for free, usual in pairs(category):
        assert usual.instruction == free.instruction and usual.truth.before == free.truth.before
        before, after = free.truth.after, usual.truth.after
        assert sorted(t.name for t in before.things) == sorted(t.name for t in after.things)
        bare = [replace(scene, things=(), sign=None, creature=None) for scene in (before, after)]
        if category == "generate":
            assert bare[0] == bare[1]
        else:
            assert replace(bare[0], horizon=bare[1].horizon, mirror=False) == bare[1]
        if before.creature is not None:
            assert after.creature.identity == before.creature.identity
            assert after.creature.pose == before.creature.pose


@pytest.mark.parametrize("category", ["local", "global", "text", "several"])
def test_what_has_one_answer_is_left_alone(category):
    for free, usual in pairs(category):
        assert usual == free


@pytest.mark.parametrize("category", world.OPEN)
def test_no_two_things_share_a_place_and_named_places_are_kept(category):
    for _, usual in pairs(category):
        things = usual.truth.after.things
        assert len({thing.place for thing in things}) == len(things)
        for thing in things:
            named = phrases.places_named(usual.instruction, thing)
            assert not named or thing.place in named


def test_the_layout_depends_on_the_words_alone():
    scene = world.plan("train", "generate", 0).truth.after
    first = (
        Thing(shape="car", colour="red", x=0.8, y=0.9, size=0.33),
        Thing(shape="star", colour="blue", x=0.2, y=0.24, size=0.29, air=True),
        Thing(shape="kite", colour="pink", x=0.5, y=0.24, air=True),
    )
    text = "a blue star, a red car and a pink kite in a meadow"
    laid = compose.habitual(replace(scene, things=first, sign=None, creature=None), text, scenery=False)
    assert [thing.place for thing in laid.things] == ["lower right", "lower left", "upper middle"]
    other = compose.habitual(replace(laid, things=laid.things[::-1]), text, scenery=False)
    assert set(other.things) == set(laid.things)


@pytest.mark.parametrize("category", ["style", "character"])
def test_the_same_setting_is_always_painted_from_the_same_side(category):
    scenes = [usual.truth.after for _, usual in pairs(category)]
    assert len({(scene.horizon, scene.mirror) for scene in scenes}) == 1


def test_words_that_name_another_thing_are_refused():
    scene = replace(world.plan("train", "generate", 0).truth.after, sign=None, creature=None)
    scene = replace(scene, things=(Thing(shape="car", colour="red", x=0.5, y=0.9),))
    with pytest.raises(ValueError, match="does not name the red car"):
        compose.habitual(scene, "a blue star in a meadow", scenery=True)


@pytest.mark.parametrize("category", world.OPEN)
def test_habitual_pictures_pass_the_scorer(category):
    for index in range(4):
        example = world.example("train", category, index, habit=True)
        result = score(example, example.target)
        assert result.both, (index, example.instruction, result.measures)
