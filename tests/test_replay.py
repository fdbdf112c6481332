"""A record becomes what makes its picture again: one edit's widgets, or the lines of several turns."""

from __future__ import annotations

import pytest
import torch

from kontext_core import record
from kontext_core.__main__ import main
from kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer
from kontext_core.record import Record, Stamp
from kontext_core.replay import beyond_turns, replay
from kontext_core.turns import parse_turns
from kontext_core.weights.locate import BUNDLED

EDIT = {
    "seed": 5, "steps": 20, "guidance": 2.5, "few_step": "off", "fit": "stretch", "padding": "mirror",
    "convention": "offset", "width": 0, "height": 0, "sampler": "euler", "shift": "resolution", "mu": 1.15,
    "batch_size": 1, "batch": 1, "bfl_parity": False, "latent": False, "masked": False,
}  # fmt: skip
PICTURE = Stamp(role="image 1", name="1.0", size=3, digest="pixels:0")


def chain(*edits: dict, prompts: tuple[str, ...], inputs: tuple[Stamp, ...] = (PICTURE,)) -> Record:
    """The record that the last of several Kontext Edit nodes writes."""
    made = [{**EDIT, "latent": number > 0, **edit} for number, edit in enumerate(edits)]
    settings = {**made[-1], "earlier": made[:-1]} if len(made) > 1 else made[0]
    return Record(action="KontextEdit", prompts=prompts, settings=settings, inputs=inputs)


def test_a_chain_becomes_one_turn_an_edit_with_its_own_words_steps_and_guidance():
    edits = ({"seed": 5}, {"seed": 6, "steps": 8, "guidance": 3.25}, {"seed": 90})
    made = chain(*edits, prompts=("make it red\n\nkeep the rest", "redo 1", "from 1: a\nstar"))
    again = replay(made)
    assert (again["steps"], again["guidance"], again["chain"]) == (20, 2.5, "latents")
    assert again["prompt"].splitlines()[0] == "make it red keep the rest"
    turns = parse_turns(again["prompt"], again["seed"]).turns
    assert [turn.instruction for turn in turns] == ["make it red keep the rest", "redo 1", "from 1: a star"]
    assert [turn.seed for turn in turns] == [5, 6, 90] and [turn.parent for turn in turns] == [None, 0, 1]
    assert turns[1].settings == {"num_steps": 8, "guidance": 3.25}
    assert not beyond_turns(made)


def test_one_edit_keeps_the_lines_of_its_instruction():
    assert replay(chain({}, prompts=("one\ntwo",)))["prompt"] == "one\ntwo"


def test_the_text_encoders_read_a_line_break_as_the_space_that_stands_for_it():
    for tokenizer, folder in ((T5Tokenizer, "tokenizer_2"), (ClipTokenizer, "tokenizer")):
        encode = tokenizer.from_path(BUNDLED["kontext-tiny"] / folder).encode
        lines, line = (
            encode([text]).ids for text in ("make it red\n\n  add a star\n", "make it red add a star")
        )
        assert torch.equal(lines, line)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "heun"}, "turn 1 has sampler heun, where Kontext Turns has euler"),
        ({"fit": "pad"}, "turn 1 has fit pad, where Kontext Turns has stretch"),
        ({"few_step": "2"}, "turn 1 has few_step 2"),
        ({"bfl_parity": True}, "turn 1 has bfl_parity True"),
        ({"masked": True}, "turn 1 has a noise mask"),
        ({"latent": True}, "turn 1 goes on from a latent"),
        ({"loras": [["a.safetensors", 1.0]]}, "turn 1 has other LoRAs"),
        ({"reuse_context": 4}, "another acceleration"),
    ],
)
def test_what_turns_cannot_make_again_is_named(changes, words):
    (said,) = beyond_turns(chain(changes, {}, prompts=("one", "two")))
    assert words in said


def test_a_further_picture_and_a_chain_without_its_numbers_are_named():
    further = Stamp(role="turn 2 image 2", name="2.0", size=3, digest="pixels:1")
    made = chain({}, {}, prompts=("one", "two"), inputs=(PICTURE, further))
    assert beyond_turns(made) == ["there is a further picture, turn 2 image 2"]
    with pytest.raises(ValueError, match="no steps of turn 1"):
        replay(
            Record(action="x", prompts=("a", "b"), settings={**EDIT, "earlier": [{"seed": 1, "guidance": 2}]})
        )
    with pytest.raises(ValueError, match="1 instructions for 2 edits"):
        replay(chain({}, {}, prompts=("one",)))
    with pytest.raises(ValueError, match="turn 2 cannot be a line"):
        replay(chain({}, {}, prompts=("one", " \n")))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (chain({}, {}, prompts=("one", "two")), "2 edits one after another: do them with `kontext turns`"),
        (chain({"latent": True}, prompts=("one",)), "made from a latent, which its record does not hold"),
        (
            chain({"bfl_parity": True, "batch": 2, "batch_size": 2, "index": 1}, prompts=("one",)),
            "picture 2 of a batch whose noise was one draw",
        ),
        (
            chain({"loras": [["a.safetensors", 1.0, 0.5]]}, prompts=("one",)),
            "1 on the transformer and 0.5 on",
        ),
    ],
    ids=["turns", "latent", "batch", "lora"],
)
def test_like_refuses_a_nodes_picture_that_one_command_cannot_make(tmp_path, capsys, made, words):
    path = tmp_path / "node.png"
    record.save_with_record(path, torch.zeros(1, 3, 16, 16), made)
    assert main(["edit", str(path), "--like", str(path), "--output", str(tmp_path / "out.png")]) == 2
    assert words in capsys.readouterr().err
