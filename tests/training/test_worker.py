"""The training process: it tells each step as a line, and stops with a checkpoint when nobody listens any more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_core.training.curve import draw_loss, running_mean
from kontext_core.training.pairs import find_pairs
from kontext_core.training.sheet import pair_sheet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path, random_tiny_folder) -> dict:
    (tmp_path / "targets").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "targets" / f"{number}.png")
    return {
        "data": str(tmp_path / "targets"), "control": str(tmp_path / "targets"), "caption": "make it red",
        "output": str(tmp_path / "run"), "model": str(random_tiny_folder), "steps": 400, "rank": 2,
        "areas": [1024], "dtype": "float32", "device": "cpu", "warmup": 0, "checkpoint_every": 1000,
    }  # fmt: skip


def start(settings: dict) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from kontext_core.training.worker import main; sys.exit(main())"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    process.stdin.write(json.dumps(settings) + "\n")
    process.stdin.flush()
    return process


@pytest.mark.parametrize("how", ["told", "alone"])
def test_a_worker_that_is_told_to_stop_or_left_alone_writes_its_checkpoint(settings, tmp_path, how):
    process = start(settings)
    events = []
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == "step" and events[-1]["step"] == 2:
            if how == "told":
                process.stdin.write("stop\n")
            process.stdin.flush()
            if how == "alone":
                process.stdin.close()
                process.stdin = None
    assert process.wait(60) == 0
    assert [event["event"] for event in events[:2]] == ["encode", "encode"]
    assert events[-1]["event"] == "stopped" and 2 <= events[-1]["step"] < 400
    state = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())
    assert state["step"] == events[-1]["step"]


def test_a_worker_says_what_is_wrong(settings):
    process = start({**settings, "lr": 0.0})
    (line,) = process.stdout.read().splitlines()
    assert "lr is 0.0" in json.loads(line)["message"] and process.wait(60) == 1


def test_the_loss_is_drawn_and_the_pairs_are_shown(settings, tmp_path):
    assert running_mean([4.0, 2.0, 0.0], share=0.7) == [4.0, 3.0, 1.0]
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 30)]
    drawn = np.asarray(draw_loss(rows))
    line = (drawn == (46, 110, 180)).all(-1)
    # the mean falls: the line is higher (a smaller row) at the left than at the right
    columns = np.flatnonzero(line.any(0))
    heights = [np.flatnonzero(line[:, column]).mean() for column in (columns[0], columns[-1])]
    assert line.sum() > 300 and heights[0] < heights[1] - 50
    assert draw_loss([]).size == draw_loss(rows[:1]).size == (640, 320)
    sheet = pair_sheet(find_pairs(settings["data"], settings["control"], default_caption="a " * 200))
    assert sheet.width > sheet.height and np.asarray(sheet).std() > 20
