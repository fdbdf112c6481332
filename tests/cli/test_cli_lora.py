"""`edit --lora`: what matched is said, the picture changes with it, and what cannot be meant is refused."""

from __future__ import annotations

import json

import pytest
import torch

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
