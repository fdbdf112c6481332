"""`edit --lora`: what matched is said, the picture changes with it, and what cannot be meant is refused."""

from __future__ import annotations

import json

import pytest
import torch

from kontext_core import record
from kontext_core.__main__ import main
from kontext_core.models.lora import lora_patch, save_lora
from kontext_core.presets import KONTEXT_TINY

HIDDEN = KONTEXT_TINY.transformer.hidden_size


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "strong.safetensors"
    torch.manual_seed(0)
    save_lora(path, [lora_patch("img_in", torch.randn(4, 64), torch.randn(HIDDEN, 4))])
    return path


def edited(tmp_path, name: str, *arguments: object) -> bytes:
    out = tmp_path / f"{name}.png"
    command = [
        "generate",
        "--prompt",
        "a red ball",
        "--output",
        out,
        "--steps",
        1,
        "--size",
        "64x64",
        *arguments,
    ]
    assert main([str(argument) for argument in command]) == 0
    return out.read_bytes()


def test_a_lora_changes_the_picture_by_its_strength_and_says_what_matched(lora, tmp_path, capsys):
    plain = edited(tmp_path, "plain")
    full = edited(tmp_path, "full", "--lora", lora)
    assert "kohya LoRA, 1 of 1 layers matched" in capsys.readouterr().err
    assert full != plain
    halves = edited(tmp_path, "halves", "--lora", f"{lora}=0.25", "--lora", f"{lora}=0.75")
    assert halves != plain and halves != edited(tmp_path, "quarter", "--lora", f"{lora}=0.25")


def test_a_budget_too_small_says_what_is_the_least(tmp_path, capsys):
    command = ["generate", "--prompt", "a", "--output", str(tmp_path / "a.png"), "--budget", "0.000001"]
    assert main(command) != 0
    assert "is too small for this transformer" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["a.safetensors=much", "a.safetensors=nan"])
def test_a_strength_that_is_no_number_is_refused(value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "a", "--output", str(tmp_path / "a.png"), "--lora", value])
    assert "strength" in capsys.readouterr().err


def test_a_file_that_is_no_lora_is_one_line(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    path.write_bytes(json.dumps({}).encode())
    command = ["generate", "--prompt", "a", "--output", str(tmp_path / "a.png"), "--lora", str(path)]
    assert main(command) != 0
    assert str(path) in capsys.readouterr().err


def test_like_finds_the_records_loras_again_and_gives_the_same_bytes(lora, tmp_path, capsys):
    other = tmp_path / "weak.safetensors"
    save_lora(other, [lora_patch("txt_in", torch.ones(1, 192), torch.ones(HIDDEN, 1))])
    first = edited(tmp_path, "first", "--lora", f"{lora}=0.5", "--lora", f"{other}=-0.01")
    made = record.load_record(tmp_path / "first.png")
    assert made.settings["loras"] == [["strong.safetensors", 0.5], ["weak.safetensors", -0.01]]
    stamps = {stamp.role: stamp.digest for stamp in made.weights}
    assert stamps["lora 1"] == record.stamp("", lora).digest and "lora 2" in stamps
    like = ["--like", tmp_path / "first.png"]
    assert edited(tmp_path, "again", *like) == first
    assert record.load_record(tmp_path / "again.png") == made
    without = edited(tmp_path, "without", *like, "--no-loras")
    assert without == edited(tmp_path, "plain")
    assert edited(tmp_path, "replaced", *like, "--lora", f"{lora}=0.5") not in (first, without)


def test_like_refuses_a_lora_that_is_gone_or_another_and_says_what_to_do(lora, tmp_path, capsys):
    edited(tmp_path, "first", "--lora", f"{lora}=0.5")
    command = ["generate", "--like", tmp_path / "first.png", "--output", tmp_path / "b.png"]
    save_lora(lora, [lora_patch("img_in", torch.ones(4, 64), torch.ones(HIDDEN, 4))])
    assert main([str(argument) for argument in command]) == 2
    said = capsys.readouterr().err
    assert f"{lora} is not the LoRA that" in said and "give --lora FILE=0.5, or --no-loras" in said
    lora.unlink()
    assert main([str(argument) for argument in command]) == 2
    assert "was made with the LoRA strong.safetensors, which is not in" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    "listed", ["x", [["../a.safetensors", 1]], [["a", "1"]], [["a", float("inf")]], [1], None]
)
def test_a_record_whose_loras_are_no_list_is_one_line(listed, tmp_path, capsys):
    made = record.Record(action="generate", prompts=("a",), settings={"loras": listed})
    record.save_with_record(tmp_path / "a.png", torch.zeros(1, 3, 16, 16), made)
    command = ["generate", "--like", str(tmp_path / "a.png"), "--output", str(tmp_path / "b.png")]
    assert main(command) == 2
    assert "LoRAs are no list of names and strengths" in capsys.readouterr().err


def test_a_record_from_before_loras_were_kept_is_read(tmp_path):
    made = record.Record(action="generate", prompts=("a red ball",), settings={"seed": 3})
    record.save_with_record(tmp_path / "old.png", torch.zeros(1, 3, 16, 16), made)
    assert edited(tmp_path, "new", "--like", tmp_path / "old.png", "--seed", 0) == edited(tmp_path, "plain")
