"""workflows/queue.py as a person runs it: a process of its own against a real ComfyUI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

QUEUE = Path(__file__).resolve().parents[2] / "workflows" / "queue.py"


@pytest.fixture
def send(host, tmp_path):
    """Runs queue.py on a workflow, in a folder of its own."""

    def run(workflow: dict, *arguments: str, server: str = host.server.url) -> subprocess.CompletedProcess:
        path = tmp_path / "workflow.json"
        path.write_text(json.dumps(workflow), encoding="utf-8")
        command = [sys.executable, "-I", str(QUEUE), str(path), "--server", server, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)

    return run


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(path)
    return path


def test_it_sends_pictures_sets_inputs_shows_progress_and_saves_what_comes(
    host, send, edit_workflow, photo, tmp_path
):
    workflow = edit_workflow("not uploaded.png")
    workflow["edit"]["_meta"] = {"title": "My edit"}
    sets = ["--set", "My edit.seed=12", "--set", 'edit.prompt="make it blue"', "--set", "KontextEdit.steps=3"]
    result = send(workflow, "--image", str(photo), *sets, "--output", "made")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    made = tmp_path / line
    assert made.parent == tmp_path / "made" and Image.open(made).size == (56, 40)
    assert "My edit …" in result.stderr and "3 / 3" in result.stderr
    sent = json.loads(Image.open(made).text["prompt"])["edit"]["inputs"]
    assert (sent["seed"], sent["prompt"], sent["steps"]) == (12, "make it blue", 3)


def test_a_picture_goes_to_the_node_that_is_named(send, photo, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (24, 16), (9, 99, 199)).save(other)
    workflow = {}
    for name in ("first", "second"):
        workflow[name] = {"class_type": "LoadImage", "inputs": {"image": "none.png"}}
        saved = {"images": [name, 0], "filename_prefix": f"queue_{name}"}
        workflow[f"save {name}"] = {"class_type": "SaveImage", "inputs": saved}
    result = send(workflow, "--image", f"second={other}", "--image", str(photo), "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    sizes = {
        Path(line).name.split("_")[1]: Image.open(tmp_path / line).size for line in result.stdout.splitlines()
    }
    assert sizes == {"first": (56, 40), "second": (24, 16)}


def test_what_the_server_refuses_ends_with_its_words_and_one(send, edit_workflow):
    result = send(edit_workflow(), "--set", "edit.steps=0")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and "node edit (KontextEdit)" in result.stderr
    assert "steps" in result.stderr and "min" in result.stderr and "Traceback" not in result.stderr


def test_a_node_that_fails_ends_with_its_message_and_one(send, edit_workflow):
    result = send(edit_workflow(), "--set", "edit.width=24", "--set", "edit.height=32")
    assert result.returncode == 1 and result.stdout == ""
    assert "error: node edit (KontextEdit): " in result.stderr and "multiples of 16" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "edit.seed"], "--set takes node.input=value"),
        (["--set", "sampler.seed=1"], "no node 'sampler' in this workflow, which has"),
        (["--image", "nowhere.png"], "has no LoadImage node to go to"),
    ],
)
def test_what_was_typed_wrong_ends_with_one_sentence_and_one(send, edit_workflow, arguments, words):
    result = send(edit_workflow(), *arguments)
    assert result.returncode == 1 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_server_that_is_not_there_and_a_graph_in_the_other_form_end_with_one(send, edit_workflow):
    result = send(edit_workflow(), server="http://127.0.0.1:9")
    assert result.returncode == 1 and "no ComfyUI answers at http://127.0.0.1:9" in result.stderr
    result = send({"nodes": [], "links": []})
    assert result.returncode == 1 and "is in UI format; use its twin in workflows/api" in result.stderr
