"""LoRA training in the graph: a folder of pairs, a process of its own, progress, cancel, resume, and a LoRA that loads.

On random weights of kontext-tiny's sizes and pairs of 32×32 pixels: what is learned is tested with the workflow.
"""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from PIL import Image

SIDE = 32


@pytest.fixture(scope="module")
def pairs(host) -> str:
    """A folder of three pairs in the server's input folder."""
    for kind in ("targets", "controls"):
        folder = host.server.base / "input" / "pairs" / kind
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            if kind == "targets":
                (folder / f"{number}.txt").write_text("make it red")
    return "pairs"


@pytest.fixture
def training(tiny, loader_nodes, pairs):
    """A workflow that trains ("train") on the pairs ("data") and hands its LoRA on to a model."""

    def workflow(name: str, **changes) -> dict:
        data = {
            "targets": f"{pairs}/targets", "controls": f"{pairs}/controls", "caption": "", "fit": "crop", "side": SIDE,
        }  # fmt: skip
        train = {
            "dataset": ["data", 0], "model": tiny["diffusion_models"], "t5": tiny["t5"], "clip": tiny["clip"],
            "vae": tiny["vae"], "name": name, "steps": 4, "batch": 1, "rank": 2, "learning_rate": 0.01,
            "sample_every": 0, "sample_prompt": "", "sample_steps": 1, "seed": 0, "resume": True,
            "targets": "attention", "caption_dropout": 0.0, "checkpointing": "none",
            "precision": "default", "checkpoint_every": 100,
        }  # fmt: skip
        return {
            **loader_nodes,
            "data": {"class_type": "KontextDataset", "inputs": data},
            "train": {"class_type": "KontextTrainLora", "inputs": {**train, **changes}},
        }

    return workflow


def run_of(host, name: str):
    return host.server.base / "output" / "kontext_training" / name


def test_a_lora_is_trained_shown_and_loads_at_once_while_the_server_answers(
    host, training, edit_workflow, pairs
):
    workflow = training("first", sample_every=2, apply_to=["model", 0])
    edit = edit_workflow()
    workflow["edit"] = {**edit["edit"], "inputs": {**edit["edit"]["inputs"], "model": ["train", 0]}}
    workflow["save"] = edit["save"]
    slowest = 0.0

    def ask(kind, data) -> None:
        nonlocal slowest
        if kind == "kontext.training":
            started = time.monotonic()
            assert host.client.get("/queue")["queue_running"]
            slowest = max(slowest, time.monotonic() - started)

    run = host.run(workflow, ask)
    (trained,) = host.pictures(run)
    steps = run.of("kontext.training")
    assert [event["step"] for event in steps] == [1, 2, 3, 4]
    assert all(event["node"] == "train" and event["steps"] == 4 and event["loss"] > 0 for event in steps)
    assert 0 < slowest < 5, "the server did not answer while it trained"
    samples = [event["sample"] for event in steps]
    assert [sample is not None for sample in samples] == [False, True, False, True]
    assert samples[1] == {
        "filename": "0000002-0.png", "subfolder": "kontext_training/first/previews", "type": "output"
    }  # fmt: skip
    query = "&".join(f"{key}={value}" for key, value in samples[1].items())
    assert host.client.request(f"/view?{query}").startswith(b"\x89PNG")
    assert any(event["node"] == "train" and event["value"] == 4 for event in run.of("progress"))
    assert len(run.previews) >= 2

    # the file is listed, and loaded by its name it gives the same picture
    listed = host.client.get("/object_info/KontextLoadLora")["KontextLoadLora"]["input"]["required"]["lora"]
    assert "first.safetensors" in (listed[0] if isinstance(listed[0], list) else listed[1]["options"])
    loaded = edit_workflow()
    inputs = {"model": ["model", 0], "lora": "first.safetensors", "strength": 1.0, "strength_clip": 1.0}
    loaded["lora"] = {"class_type": "KontextLoadLora", "inputs": inputs}
    loaded["edit"]["inputs"]["model"] = ["lora", 0]
    (again,) = host.pictures(host.run(loaded))
    assert again.tobytes() == trained.tobytes()
    (without,) = host.pictures(host.run(edit_workflow()))
    assert without.tobytes() != trained.tobytes()


def test_cancel_keeps_a_checkpoint_that_the_next_run_goes_on_from(host, training):
    def cancel(kind, data) -> None:
        if kind == "kontext.training" and data["step"] == 2:
            host.client.interrupt()

    with pytest.raises(Exception, match="interrupted in node train"):
        host.run(training("cancelled", steps=500), cancel)
    state = json.loads((run_of(host, "cancelled") / "checkpoint" / "state.json").read_text())
    assert 2 <= state["step"] < 100
    assert host.client.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert not (host.server.base / "models" / "loras" / "cancelled.safetensors").exists()

    run = host.run(training("cancelled", steps=state["step"] + 2))
    first, last = state["step"] + 1, state["step"] + 2
    assert [event["step"] for event in run.of("kontext.training")] == [first, last]
    assert (host.server.base / "models" / "loras" / "cancelled.safetensors").is_file()
    rows = [json.loads(line) for line in (run_of(host, "cancelled") / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, last + 1))

    # begun again it forgets them, and another rank is no error then
    run = host.run(training("cancelled", steps=1, rank=3, resume=False))
    assert [event["step"] for event in run.of("kontext.training")] == [1]
    assert "another model" in host.error(training("cancelled", steps=2, rank=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "nowhere"}, "there is no folder"),
        ({"targets": "../models"}, "name a folder inside"),
        ({"targets": "/etc"}, "name a folder inside"),
        ({"targets": "pairs/controls"}, "have no caption"),
        ({"controls": "."}, "no picture of the same name"),
    ],
)
def test_a_folder_that_does_not_do_is_named(host, training, changes, message):
    workflow = training("refused")
    workflow["data"]["inputs"].update(changes)
    assert message in host.error(workflow)
    assert not run_of(host, "refused").exists()


def test_other_mistakes_are_named(host, training):
    assert "use letters" in host.error(training("../escape"))
    workflow = training("refused")
    workflow["text"] = {"class_type": "PrimitiveString", "inputs": {"value": '{"data": "/etc"}'}}
    workflow["train"]["inputs"]["dataset"] = ["text", 0]
    assert "Kontext Dataset" in host.error(workflow)
