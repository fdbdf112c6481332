"""The command that puts the few-step student beside its controls: from files to one table, category by category."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kontext_core.models.lora import lora_patch, save_lora
from kontext_core.tiny.compare import load_student, main
from kontext_core.weights.load import load_model

NAMES = [(name, n) for name in ("teacher", "ladd", "regression") for n in (4, 2, 1)]


@pytest.fixture
def runs(random_few_step_folder, tmp_path):
    """A distill stage's two students, which are the few-step file and the teacher itself."""
    folder = tmp_path / "runs" / "distill"
    folder.mkdir(parents=True)
    for name, file in (("ladd", "flux1-kontext-tiny-fewstep"), ("regression", "flux1-kontext-tiny")):
        shutil.copy(random_few_step_folder / f"{file}.safetensors", folder / f"{name}.safetensors")
    return tmp_path / "runs"


@pytest.fixture
def exported(random_few_step_folder, tmp_path):
    """A model folder as the recipe's export leaves it: no tokenizers."""
    without = shutil.ignore_patterns("tokenizer*", "*fewstep*")
    return shutil.copytree(random_few_step_folder, tmp_path / "model", ignore=without, copy_function=os.link)


def test_one_command_prints_one_table_and_goes_on_where_it_was(runs, exported, capsys):
    command = ["--model", str(exported), "--runs", str(runs), "--count", "2", "--steps", "3"]
    main([*command, "--categories", "local"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    found = [(line.split()[1], int(line.split()[2])) for line in lines[1:12]]
    assert found == [("teacher", 3), *NAMES, ("autoencoder", 0)]
    assert any("teacher, 3 steps: 0.90 done and kept" in line and line.endswith("no") for line in lines[12:])
    main([*command, "--categories", "local,generate", "--json"])
    captured = capsys.readouterr()
    # what was done is not done again
    assert "local" not in captured.err and "generate regression 1" in captured.err
    answer = json.loads(captured.out)
    assert answer["settings"]["steps"] == 3 and list(answer["categories"]) == ["local", "generate"]
    rows = {(row["name"], row["num_steps"]): row for row in answer["categories"]["generate"]}
    for way in NAMES:
        lead = rows[way]["first_nearer"]
        assert (lead is None) == (way[0] == "ladd")
        assert lead is None or lead["low"] <= lead["value"] <= lead["high"]
    assert {goal["category"] for goal in answer["goals"]} == {"local", "generate"}
    with pytest.raises(SystemExit):
        main([*command, "--categories", "local", "--seed", "1"])
    assert "compares something else (seed)" in capsys.readouterr().err


def test_students_that_are_not_there_or_of_other_sizes_are_named(runs, random_few_step_folder, capsys):
    command = ["--model", str(random_few_step_folder), "--runs", str(runs), "--count", "2"]

    def said(*more: str) -> str:
        with pytest.raises(SystemExit):
            main([*command, *more])
        return capsys.readouterr().err

    (runs / "distill" / "regression.safetensors").unlink()
    assert "regression.safetensors). `recipe distill` without --no-control makes" in said()
    assert "give NAME=FILE" in said("--no-regression", "--student", "teacher=a.safetensors")
    assert "use some of local" in said("--categories", "remix")
    weights = load_file(runs / "distill" / "ladd.safetensors")
    small = {name: value for name, value in weights.items() if not name.startswith("single_blocks.5.")}
    save_file(small, runs / "distill" / "ladd.safetensors")
    assert "other sizes than the teacher" in said("--no-regression", "--categories", "local")


def test_a_lora_is_a_student_too_and_leaves_the_teacher_alone(random_tiny_folder, tmp_path):
    model = load_model(random_tiny_folder)
    before = model.transformer.img_in.weight.clone()
    down, up = torch.randn(2, 64), torch.randn(before.shape[0], 2)
    save_lora(tmp_path / "lora.safetensors", [lora_patch("img_in", down, up, 2.0)], dtype=torch.float32)
    student = load_student(model, tmp_path / "lora.safetensors")
    torch.testing.assert_close(student.img_in.weight, before + up @ down, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.transformer.img_in.weight, before)
