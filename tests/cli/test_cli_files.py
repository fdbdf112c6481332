"""`inspect`, `convert` and `quantize` from the outside."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from kontext_core.__main__ import main
from kontext_core.cli import files as command
from kontext_core.weights.convert import FORMATS
from kontext_core.weights.formats import PART_NAMES
from kontext_core.weights.quantize import FP8_TYPES, GGUF_TYPES

TRANSFORMER = "flux1-kontext-tiny.safetensors"


def test_inspect_says_what_a_file_and_a_folder_are(random_tiny_folder, capsys):
    assert main(["inspect", str(random_tiny_folder / TRANSFORMER), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["part"] == "transformer" and info["missing"] == [] and list(info["dtypes"]) == ["F32"]
    assert main(["inspect", str(random_tiny_folder)]) == 0
    text = capsys.readouterr().out
    assert "a model's folder" in text and f"{info['parameters']:,}" in text and "a CLIP text encoder" in text


def test_converting_there_and_back_gives_the_same_numbers(random_tiny_folder, tmp_path, capsys):
    source, back = random_tiny_folder / TRANSFORMER, tmp_path / "back.safetensors"
    assert main(["convert", str(source), str(tmp_path / "folder"), "--to", "diffusers", "--json"]) == 0
    captured = capsys.readouterr()
    assert "diffusers names" in json.loads(captured.out)["format"] and "tensor " in captured.err
    assert main(["convert", str(tmp_path / "folder"), str(back), "--to", "bfl"]) == 0
    before, after = load_file(source), load_file(back)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_quantize_writes_a_smaller_file_that_is_read_again(random_tiny_folder, tmp_path, capsys):
    out = tmp_path / "q8.gguf"
    assert (
        main(["quantize", str(random_tiny_folder / TRANSFORMER), str(out), "--type", "Q8_0", "--json"]) == 0
    )
    info = json.loads(capsys.readouterr().out)
    assert info["part"] == "transformer" and "Q8_0" in info["quantisation"]
    assert out.stat().st_size < 0.5 * (random_tiny_folder / TRANSFORMER).stat().st_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "notes.txt"], "notes.txt"),
        (["inspect", "absent.safetensors"], "absent.safetensors"),
        (["convert", "notes.txt", "out.safetensors", "--to", "bfl"], "notes.txt"),
        (["quantize", "notes.txt", "out.gguf", "--type", "Q8_0"], "notes.txt"),
        (["quantize", "notes.txt", "out.gguf", "--type", "Q9"], "Q8_0"),
    ],
)
def test_what_is_no_weights_file_is_one_line_and_code_two(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("not weights at all")
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_the_choices_offered_are_those_of_the_core():
    assert set(command.CONVERT_TO) == set(FORMATS)
    assert set(command.QUANTIZE_TO) == {*FP8_TYPES, *GGUF_TYPES}
    assert set(command.PARTS) == set(PART_NAMES)
