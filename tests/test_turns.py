"""Turns follow one another, branch, are redone, and are not computed twice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kontext_core import geometry
from kontext_core.edit import edit_image
from kontext_core.turns import Session, parse_turns, run_session, three_steps, write_turns
from kontext_core.weights.load import load_model


@pytest.fixture(scope="module")
def model(random_tiny_folder):
    return load_model(random_tiny_folder)


@pytest.fixture(scope="module")
def start() -> torch.Tensor:
    return torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1


SETTINGS = {"num_steps": 1, "fit": "crop"}


def test_latents_are_handed_on_without_decoding(model, start):
    session = Session(settings=SETTINGS).add("make it red", seed=3).add("add a star")
    assert [turn.seed for turn in session.turns] == [3, 4]
    results = run_session(model, start, session)
    first = edit_image(model, start, "make it red", seed=3, **SETTINGS)
    second = edit_image(model, None, "add a star", seed=4, num_steps=1, reference_latents=[first.latent])
    assert torch.equal(results[0].image, first.images) and torch.equal(results[1].latent, second.latent)
    expected = geometry.invert(first.geometry, second.images, start)
    assert torch.equal(results[1].image, expected) and expected.shape == start.shape


def test_pictures_can_be_handed_on_instead(model, start):
    session = Session(chain="pictures", settings=SETTINGS).add("one").add("two")
    results = run_session(model, start, session)
    again = edit_image(model, results[0].image, "two", seed=1, **SETTINGS)
    assert torch.equal(results[1].image, again.images)


def test_branches_and_second_tries_compute_only_what_is_new(model, start):
    session = Session(settings=SETTINGS).add("one").add("two")
    results = run_session(model, start, session)
    longer = session.branch(0, "three", seed=9).redo(1, seed=7).branch(None, "four")
    assert [turn.parent for turn in longer.turns] == [None, 0, 0, 0, None]
    assert longer.turns[3].instruction == "two" and longer.turns[3].seed == 7
    assert longer.path(3) == [0, 3] and longer.path(4) == [4]
    finished: list[int] = []
    more = run_session(model, start, longer, results, on_turn=lambda number, _: finished.append(number))
    assert finished == [2, 3, 4]
    assert more[1] is results[1]
    assert not torch.equal(more[3].latent, more[1].latent)


def test_a_turns_own_settings_come_before_the_sessions(model, start):
    steps: list[int] = []
    session = Session(settings=SETTINGS).add("one").add("two", num_steps=3)
    run_session(model, start, session, on_step=lambda info: steps.append(info.num_steps))
    assert steps == [1, 3, 3, 3]


def test_what_is_finished_before_a_stop_is_kept(model, start):
    kept = {}
    count = []

    def stop(_):
        count.append(1)
        if len(count) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        session = Session(settings=SETTINGS).add("one").add("two")
        run_session(model, start, session, on_turn=kept.__setitem__, on_step=stop)
    assert list(kept) == [0]


def test_a_session_survives_json_and_a_damaged_one_is_refused():
    session = Session(chain="pictures", settings={"num_steps": 4}).add("赤").branch(None, "two", guidance=3.0)
    assert Session.from_json(session.to_json()) == session
    assert "loras" not in session.to_json()
    with_lora = replace(session, turns=(replace(session.turns[0], loras=(("a.safetensors", 0.5, "sha"),)),))
    assert Session.from_json(with_lora.to_json()) == with_lora
    data = json.loads(session.to_json())
    for change, words in (
        ({"turns": 3}, "turns are a list"),
        ({"format": 2}, "another format"),
        ({"chain": "knots"}, "choose one of latents, pictures"),
        ({"turns": [{}]}, "turn 1 has the fields"),
        ({"turns": [{**data["turns"][0], "seed": "x"}]}, "turn 1 is of a wrong type"),
        ({"turns": [{**data["turns"][0], "parent": 4}]}, "comes later"),
        ({"more": 1}, "a session has the fields"),
        ({"turns": [{**data["turns"][0], "loras": [["../a.safetensors", 1.0, "x"]]}]}, "of a wrong type"),
        (
            {"turns": [{**data["turns"][0], "loras": [["a.safetensors", float("nan"), "x"]]}]},
            "of a wrong type",
        ),
        ({"turns": [{**data["turns"][0], "loras": "a.safetensors"}]}, "of a wrong type"),
    ):
        with pytest.raises(ValueError, match=words):
            Session.from_json(json.dumps({**data, **change}))
    with pytest.raises(ValueError, match="not JSON"):
        Session.from_json("{")


def test_turns_that_are_not_there_and_sizes_are_refused(model, start):
    session = Session().add("one")
    for wrong in (lambda: session.redo(1, 0), lambda: session.branch(5, "x"), lambda: session.path(2)):
        with pytest.raises(ValueError, match="there is no turn"):
            wrong()
    with pytest.raises(ValueError, match="keeps the picture's size"):
        run_session(model, start, session.add("two", size=(64, 64)))


def test_seeds_count_on_from_0_after_the_largest_one(model, start):
    last = 2**64 - 1
    session = Session(settings=SETTINGS).add("one", seed=last).add("two").branch(0, "three")
    assert [turn.seed for turn in session.turns] == [last, 0, 0]
    assert [turn.seed for turn in parse_turns("one\ntwo\nfrom 0: three", seed=last).turns] == [last, 0, last]
    assert run_session(model, start, session).keys() == {0, 1, 2}
    batch = edit_image(model, start, ["one", "one"], seed=last, **SETTINGS)
    assert batch.seeds == (last, 0)


def test_the_three_steps_say_what_stays():
    steps = three_steps("Move the cup to the left", "", "Change the style to a woodcut")
    assert len(steps) == 2 and all("while keeping" in step for step in steps)
    with pytest.raises(ValueError, match="at least one"):
        three_steps("", " ", "")


def test_a_session_is_written_as_lines_of_text():
    text = """
        Make the circle red
        Add a star [seed 40]

        from 1: add a "moon [big]"
        redo 2 [seed 77]
        from 0: remove the circle
        and a tree
    """
    turns = parse_turns(text, seed=5).turns
    assert [turn.parent for turn in turns] == [None, 0, 0, 0, None, 4]
    assert [turn.seed for turn in turns] == [5, 40, 6, 77, 5, 6]
    assert [turn.instruction for turn in turns][2:5] == [
        'add a "moon [big]"',
        "Add a star",
        "remove the circle",
    ]


def test_a_line_may_have_steps_and_guidance_of_its_own():
    text = "one [guidance 3.5] [steps 12]\ntwo [seed 4]\nredo 1 [steps 2] [seed 9]\nthree [seed 5] [seed 6]"
    turns = parse_turns(text).turns
    assert [turn.settings for turn in turns] == [
        {"num_steps": 12, "guidance": 3.5}, {}, {"num_steps": 2, "guidance": 3.5}, {},
    ]  # fmt: skip
    assert (turns[3].instruction, turns[3].seed) == ("three [seed 5]", 6)


def test_a_session_written_as_lines_is_read_as_the_same_session():
    """Branches, instructions of several lines or that look like a line's own signs, and settings of a turn's own."""
    session = (
        Session().add("make it\n\n  red", seed=7).add("redo 1", num_steps=3).add("from 2: x", guidance=2.25)
    )
    session = (
        session.branch(0, "a star [seed 4]").branch(None, "the words [steps 5]", seed=2**64 - 1).add("last")
    )
    common = {"num_steps": 28, "guidance": 2.5}
    text = write_turns(session, 7, common)
    assert len(text.splitlines()) == len(session.turns)
    again = parse_turns(text, seed=7)
    for before, after in zip(session.turns, again.turns, strict=True):
        assert after.instruction == " ".join(before.instruction.split())
        assert (after.parent, after.seed) == (before.parent, before.seed)
        assert {**common, **after.settings} == {**common, **before.settings}
    assert write_turns(parse_turns("one\ntwo"), 0, common) == "one\ntwo"
    for wrong in (Session().add(" \n"), Session().add("x", sampler="heun")):
        with pytest.raises(ValueError, match="turn 1 cannot be a line"):
            write_turns(wrong, 0, common)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one [steps 0]", "has 0 steps: give 1 or more"),
        (" \n ", "write one a line"),
        ("redo 1", "say with which seed"),
        ("one\nredo 2 [seed 1]", "there is no turn 2"),
        ("from 3: x", "there is no turn 3"),
        ("one\nfrom 1:", "the instruction is missing"),
        ("[seed 3]", "the instruction is missing"),
        ("one [seed 18446744073709551616]", "a seed is at most 18446744073709551615"),
    ],
)
def test_lines_that_make_no_session_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_turns(text)
