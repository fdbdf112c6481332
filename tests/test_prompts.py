"""Presets obey the guides' own rules, quoting keeps what is written, hints fire where they should."""

from __future__ import annotations

from pathlib import Path

import pytest

from kontext_core import prompts
from kontext_core.models.tokenizers import ClipTokenizer, T5Tokenizer

ASSETS = Path(prompts.__file__).parent / "assets" / "kontext-tiny"


@pytest.mark.parametrize("name", prompts.PRESETS)
def test_every_preset_gives_an_instruction_without_a_hint(name):
    instruction = prompts.build(name)
    assert prompts.check(instruction) == []
    assert "{" not in instruction and "while keeping" in instruction
    assert len(instruction.split()) < 60


@pytest.mark.parametrize("name", prompts.PRESETS)
def test_every_preset_and_blank_has_a_label_in_every_language(name):
    preset = prompts.PRESETS[name]
    for labels in (preset.labels, *(slot.labels for slot in preset.slots)):
        assert len(labels) == len(prompts.LANGUAGES) and all(labels)
    assert preset.label("zh") == preset.labels[1]
    assert preset.label("fr") == preset.labels[0]


def test_blanks_are_filled_and_empty_ones_keep_their_default():
    made = prompts.build("relight", light="neon light from behind.", subject=" ")
    assert "to neon light from behind, with matching shadows" in made
    assert "while keeping the main subject" in made


def test_drawn_words_keep_their_case_and_are_put_in_marks_they_do_not_hold():
    assert "Replace 'joy' with 'BFL'" in prompts.build("replace_text", old="joy", new="BFL")
    assert prompts.quote("DON'T panic") == '"DON\'T panic"'
    assert prompts.quote("the 5\" DON'T") == "“the 5\" DON'T”"
    assert {prompts.quote(w) for w in ("'already'", "「already」", " already ")} == {"'already'"}
    assert prompts.quote("{braces} stay") == "'{braces} stay'"
    assert "'{braces}'" in prompts.build("add_text", new="{braces}")


def test_a_keeping_clause_is_added_once():
    once = prompts.keeping("Change the car to red.", "the background")
    assert once == "Change the car to red, while keeping the background exactly the same"
    assert prompts.keeping(once, "the sky") == once
    assert prompts.keeping("Add the text 'KEEP OUT'", "the wall").endswith(
        "keeping the wall exactly the same"
    )
    assert prompts.keeping("Change the car to red.", "") == "Change the car to red."


@pytest.mark.parametrize(
    ("prompt", "codes"),
    [
        ("Change the car to red", []),
        ("Transform the person into a Viking", ["vague", "keep"]),
        ("Turn the old house into a castle", ["vague"]),
        ("Change the background to a beach", ["keep"]),
        ("Change the background to a beach while keeping the person in place", []),
        ("Make her hair red", ["pronoun"]),
        ("Replace the text on the sign with hello", ["quote"]),
        ("Replace the text 'it reads her style' with 'don't'", []),
        ("Add a hat, don't change anything else", ["negation"]),
        ("Change the car to (red:1.4)", ["weights"]),
        ("Add a hat, remove the dog, change the car to red and paint the wall green", ["many"]),
        ("把汽车变成红色", ["language"]),
        ("", []),
    ],
)
def test_hints_name_what_kontext_misreads(prompt, codes):
    assert [hint.code for hint in prompts.check(prompt)] == codes


def test_a_hint_reads_as_a_sentence_with_the_place():
    hint = prompts.check("Make her hair red")[0]
    assert str(hint).startswith("“her”: name what is meant")


def test_much_longer_lettering_is_pointed_out():
    assert prompts.check_replacement("JOY", "BFL") == []
    assert prompts.check_replacement("JOY", "A MUCH LONGER SIGN")[0].code == "length"


def test_the_token_hint_counts_cuts_and_unknown_words():
    t5 = T5Tokenizer.from_path(ASSETS / "tokenizer_2")
    clip = ClipTokenizer.from_path(ASSETS / "tokenizer")
    short = prompts.token_hint("make the circle red", t5, clip)
    used = int(short.split()[1])
    assert short.startswith(f"T5 {used} of {t5.max_length} tokens; CLIP ") and 5 <= used <= 12
    assert "cut off: “" in prompts.token_hint("red circle " * 60, t5, clip)
    assert "not known: 赤" in prompts.token_hint("make it 赤", t5, clip)


def test_unknown_presets_and_blanks_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match="relight, remove_background"):
        prompts.build("levitate")
    with pytest.raises(ValueError, match="has no colour; it has color, subject"):
        prompts.build("remove_background", colour="red")
