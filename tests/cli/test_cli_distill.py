"""`kontext distill`: from prompts to a student that loads, and its errors in a line."""

from __future__ import annotations

import json

import pytest

from kontext_core.__main__ import main
from kontext_core.weights.load import load_transformer


def write_prompts(path, lines) -> None:
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")


def test_prompts_become_latents_and_a_student(random_tiny_folder, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (64, 64), "teal").save(tmp_path / "picture.png")
    edits = [{"prompt": f"make it {i}", "image": "picture.png", "size": [64, 64]} for i in range(2)]
    write_prompts(tmp_path / "requests.jsonl", [{"prompt": "a red ball", "size": [64, 64]}, *edits])
    model = ["--model", str(random_tiny_folder)]
    data, out = tmp_path / "data", tmp_path / "out"
    command = ["distill", "synthesize", "--prompts", str(tmp_path / "requests.jsonl"), "--output", str(data)]
    assert main([*command, "--steps", "1", *model]) == 0
    shards = sorted(path.name for path in data.glob("*.safetensors"))
    assert shards == ["requests-00000-s0.safetensors", "requests-00001-s0.safetensors"]
    train = ["distill", "train", "--data", str(data), "--output", str(out), "--batch", "4"]
    train += ["--steps", "2", "--head-start", "1"]
    assert main([*train, *model]) == 0
    assert "wrote" in capsys.readouterr().err
    (student,) = out.glob("*-fewstep.safetensors")
    assert load_transformer(student).params.hidden_size == 256
    control = random_tiny_folder / "flux1-kontext-tiny.safetensors"
    compare = ["distill", "compare", "--student", str(student), "--control", str(control), *model]
    assert main([*compare, "--data", str(data / shards[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    ways = [tuple(line.split()[:2]) for line in lines[1:]]
    names = ("student", "regression", "teacher")
    assert ways == [(name, n) for n in ("1", "2", "4") for name in names] + [("teacher", "28")]
    assert main([*compare, "--data", str(data / shards[1]), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["ladd_nearer"] is None) for row in rows] == [
        name in ("student",) for name, _ in ways[:-1]
    ] + [True]
    sources = sorted((data / "sources").glob("*.safetensors"))
    assert main([*compare, "--data", str(sources[1])]) == 2
    assert "2 of 2 real latents are constant" in capsys.readouterr().err  # nothing was made for these yet
    # its own samples are the truth of that shard, so the teacher's many steps from other noise are not at distance 0
    assert all(row["distance"]["low"] <= row["distance"]["value"] and row["mse"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--data", "nowhere", "--output", "out"], "holds no shards"),
        (["synthesize", "--prompts", "requests.jsonl", "--output", "out"], "has no prompt"),
        (["compare", "--student", "a", "--data", "nowhere"], "is no file"),
    ],
)
def test_mistakes_are_one_line(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "requests.jsonl", [{"image": "a.png"}])
    assert main(["distill", *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and sentence in errors[0]


def test_a_batch_of_one_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "a.safetensors").touch()
    train = ["distill", "train", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--batch", "1"]
    assert main(train) == 2
    assert "a batch of 1 is too small" in capsys.readouterr().err


def test_a_head_start_of_all_steps_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "a.safetensors").touch()
    train = ["distill", "train", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--steps", "60"]
    assert main(train) == 2
    assert "--head-start is 60 of 60 steps" in capsys.readouterr().err
