"""`train` from a folder of pairs to files that load: LoRA, full, guidance; resuming, previews, the plot, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kontext_core.__main__ import main
from kontext_core.cli import train
from kontext_core.models.lora import read_lora
from kontext_core.training.config import TrainConfig, read_config
from kontext_core.training.preview import read_log
from kontext_core.weights.load import load_transformer

KEYS = ["output", "method", "step", "steps", "loss", "examples", "parameters", "seconds", "peak_rss_bytes"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("pairs")
    for folder in ("targets", "controls"):
        (base / folder).mkdir()
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / folder / f"{number}.png")
            if folder == "targets":
                (base / folder / f"{number}.txt").write_text("make it red")
    return base / "targets", base / "controls"


@pytest.fixture
def arguments(folders, tmp_path, random_tiny_folder) -> list[str]:
    return [
        "train", str(folders[0]), "--control", str(folders[1]), "--model", str(random_tiny_folder),
        "--output", str(tmp_path / "run"), "--areas", "1024", "--steps", "3", "--batch", "2", "--lr", "1e-2",
        "--warmup", "0", "--log-every", "1", "--dtype", "float32", "--json",
    ]  # fmt: skip


def test_a_lora_is_trained_previewed_plotted_and_gone_on_with(arguments, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    run = tmp_path / "run"
    options = [
        "--rank",
        "2",
        "--preview-every",
        "2",
        "--preview-prompt",
        "x",
        "--preview-steps",
        "1",
        "--plot",
    ]
    assert main([*arguments, *options]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert list(answer) == KEYS and answer["output"] == str(run / "lora.safetensors")
    assert (answer["method"], answer["step"], answer["examples"]) == ("lora", 3, 3)
    assert "step 3/3, loss" in captured.err and "encoded 3/3" in captured.err
    assert Image.open(run / "previews" / "0000002-0.png").size == (128, 128)
    assert (run / "loss.png").stat().st_size > 5_000
    assert [row["step"] for row in read_log(run / "log.jsonl")] == [1, 2, 3]
    lora = read_lora(load_file(run / "lora.safetensors"))
    assert not lora.unmatched and {patch.rank for patch in lora.patches} == {2}
    assert answer["parameters"] == sum(t.numel() for p in lora.patches for t in p.tensors.values())
    # more steps in the same folder go on, and encode nothing again
    more = ["5" if value == "3" else value for value in arguments]
    assert main([*more, "--rank", "2"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["step"] == 5 and "encoded" not in captured.err
    assert [row["step"] for row in read_log(run / "log.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("method", ["full", "guidance"])
def test_a_transformer_is_trained_and_loads(arguments, tmp_path, random_tiny_folder, capsys, method):
    assert main([*arguments, "--method", method, "--ema", "0.5", "--checkpointing", "selective"]) == 0
    answer = json.loads(capsys.readouterr().out)
    trained = load_transformer(answer["output"]).state_dict()
    before = load_transformer(random_tiny_folder / "flux1-kontext-tiny.safetensors").state_dict()
    assert answer["parameters"] == sum(value.numel() for value in before.values())
    changed = [name for name in before if not torch.equal(trained[name], before[name])]
    assert len(changed) > 0.9 * len(before)


def test_small_pictures_come_first_and_clipping_and_micro_batches_are_passed_on(arguments, tmp_path, capsys):
    at = arguments.index("1024")
    sizes = [*arguments[: at + 1], "4096", *arguments[at + 1 :], "--progressive", "--rank", "2"]
    assert main([*sizes, "--steps", "4", "--accumulate", "2", "--clip-norm", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 6
    assert {path.name.split("-")[0] for path in (tmp_path / "run" / "data").iterdir()} == {"1024", "4096"}
    state = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())
    assert (state["config"]["accumulate"], state["config"]["clip"]) == (2, 0.5)


def test_the_time_left_is_that_of_the_steps_so_far(capsys, monkeypatch):
    times = iter([10.0, 12.0, 20.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(times))
    steps = train._Steps()
    for step in (1, 2, 10):
        steps(step, 20, 0.5)
    lines = capsys.readouterr().err.splitlines()
    # the first step is not counted: it compiles and warms up; 1 step took 2 s, then 9 took 10 s
    assert lines == ["step 2/20, loss 0.5000, 36 s left", "step 10/20, loss 0.5000, 11 s left"]


@pytest.mark.slow  # three starts of Python, two of them with torch.distributed
@pytest.mark.parametrize("method", ["lora", "full"])
def test_torchrun_s_two_processes_have_one_s_losses_and_one_answer(arguments, tmp_path, method):
    pytest.importorskip("torch.distributed.fsdp", reason="FSDP2 needs a newer torch").fully_shard  # noqa: B018
    found = {}
    for number in (1, 2):
        command = [sys.executable, "-m"]
        if number > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m"]
        run = subprocess.run(
            [
                *command,
                "kontext_core",
                *arguments,
                "--method",
                method,
                "--output",
                str(tmp_path / str(number)),
            ],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        answer = json.loads(run.stdout)  # one object, whatever the number of processes
        losses = [row["loss"] for row in read_log(tmp_path / str(number) / "log.jsonl")]
        found[number] = losses, load_file(answer["output"])
    (losses, weights), (shared, gathered) = found[1], found[2]
    # the same rows in another order of sums, and a rate so high that the loss of "full" grows eightfold in three steps
    assert shared == pytest.approx(losses, rel=1e-4)
    assert weights.keys() == gathered.keys()
    assert all(gathered[name].shape == value.shape for name, value in weights.items())


def test_settings_come_from_a_file_and_options_win(arguments, tmp_path, capsys):
    config = tmp_path / "train.json"
    config.write_text(
        json.dumps({"rank": 3, "targets": "attention", "steps": 7, "areas": [4096], "alpha": 1})
    )
    assert main([*arguments, "--config", str(config)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] == 3
    tensors = load_file(answer["output"])
    assert {value.item() for key, value in tensors.items() if key.endswith("alpha")} == {1.0}
    assert not any("mlp" in key for key in tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnak": 3}, "no setting is called rnak; there are data, output"),
        ({"rank": "3"}, "rank is '3'; int is needed"),
        ({"progressive": 1}, "progressive is 1; bool is needed"),
        ([1], "holds a list"),
    ],
)
def test_a_settings_file_with_a_mistake_says_which(tmp_path, settings, message):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        read_config(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dora"}, "method is 'dora'; use one of lora, full, guidance"),
        ({"lr": 0.0}, "lr is 0"),
        ({"guidance": (3.0, 1.0)}, "the lower and the upper end"),
        ({"preview_every": 5}, "no previews"),
        ({"previews": ({"image": "x"},)}, "previews must be of the form"),
    ],
)
def test_settings_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data="a", output="b", **options)


def test_mistakes_are_one_line(arguments, folders, capsys):
    assert main(["train", str(folders[0])]) == 2
    assert capsys.readouterr().err == "error: output not given: name the folder of targets, and --output\n"
    assert main([*arguments, "--targets", "to_q"]) == 2
    assert "error: no layer matches ['to_q']" in capsys.readouterr().err
