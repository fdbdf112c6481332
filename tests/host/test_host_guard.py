"""Kontext Guard, Estimate, Save and Load Record in a real ComfyUI."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def picture(host) -> str:
    y, x = np.mgrid[0:96, 0:112]
    pixels = np.stack([x * 2, y * 2, x + y], 2).astype(np.uint8)
    return host.upload(Image.fromarray(pixels), "guard.png")


def guard(workflow: dict, **links) -> dict:
    workflow["guard"] = {"class_type": "KontextGuard", "inputs": links}
    return workflow


def test_a_guarded_edit_is_the_same_to_the_bit(host, edit_workflow, picture):
    plain = host.pictures(host.run(edit_workflow(picture)))[0]
    workflow = guard(edit_workflow(picture), model=["model", 0])
    workflow["edit"]["inputs"]["model"] = ["guard", 0]
    workflow["check"] = {
        "class_type": "KontextGuard",
        "inputs": {"image": ["edit", 0], "latent": ["edit", 1]},
    }
    workflow["save"]["inputs"]["images"] = ["check", 2]
    assert host.pictures(host.run(workflow))[0].tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "single_blocks.1.linear2.weight",
            1e38,
            ("single_blocks.1 gives", "float32", "what went in was finite"),
        ),
        (
            "double_blocks.1.img_mlp.0.weight",
            1e38,
            ("double_blocks.1 gives", "float32", "what went in was finite"),
        ),
    ],
)
def test_the_first_bad_block_is_named_with_its_dtype_and_what_to_try(
    host, tiny, edit_workflow, picture, key, value, words
):
    state = load_file(host.put_model("diffusion_models", tiny["diffusion_models"]))
    state[key] = torch.full_like(state[key], value)
    save_file(state, host.put_model("diffusion_models", "bad.safetensors"))
    workflow = guard(edit_workflow(picture), model=["model", 0])
    workflow["model"]["inputs"]["model"] = "bad.safetensors"
    workflow["edit"]["inputs"]["model"] = ["guard", 0]
    message = host.error(workflow)
    assert all(word in message for word in words), message


def test_black_pictures_and_empty_guards_are_stopped(host):
    black = host.upload(Image.new("RGB", (32, 32)), "black.png")
    workflow = {
        "load": {"class_type": "LoadImage", "inputs": {"image": black}},
        "guard": {"class_type": "KontextGuard", "inputs": {"image": ["load", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["guard", 2], "filename_prefix": "no"}},
    }
    assert "picture 1 is black" in host.error(workflow)
    workflow["guard"]["inputs"] = {}
    assert "nothing is connected" in host.error(workflow)


def test_an_estimate_counts_every_token(host, loader_nodes, picture):
    graph = {
        **loader_nodes,
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "prompt": {
            "class_type": "KontextPrompt",
            "inputs": {"clip": ["clip", 0], "text": "red", "guidance": 2.5, "text_length": 0},
        },
        "reference": {
            "class_type": "KontextReference",
            "inputs": {
                "conditioning": ["prompt", 0], "vae": ["vae", 0], "image": ["load", 0], "fit": "keep",
                "padding": "mirror", "convention": "offset", "width": 0, "height": 0,
            },
        },
        "estimate": {
            "class_type": "KontextEstimate",
            "inputs": {"model": ["model", 0], "conditioning": ["reference", 0], "latent": ["reference", 1], "steps": 4},
        },
    }  # fmt: skip
    run = host.run(graph)
    (report,) = run.history["outputs"]["estimate"]["text"]
    assert report.startswith("132 tokens: 42 target + 42 reference + 48 text\n")
    assert "s for 4 steps" in report and report.splitlines()[1].endswith("fits")


def test_a_record_goes_into_the_picture_and_comes_back(host, tiny, edit_workflow, picture):
    workflow = edit_workflow(picture, seed=77, guidance=3.5)
    workflow["save"] = {
        "class_type": "KontextSave",
        "inputs": {"image": ["edit", 0], "record": ["edit", 3], "filename_prefix": "kept/one"},
    }
    run = host.run(workflow)
    (entry,) = run.history["outputs"]["save"]["images"]
    path = host.server.base / "output" / entry["subfolder"] / entry["filename"]
    text = Image.open(path).text
    record = json.loads(text["kontext"])
    assert json.loads(text["prompt"])["edit"]["class_type"] == "KontextEdit"
    assert record["settings"]["seed"] == 77 and record["prompts"] == ["make it red"]
    assert {item["name"] for item in record["weights"]} == {
        tiny[k] for k in ("diffusion_models", "t5", "clip", "vae")
    }
    assert all(item["digest"].startswith("sha256:") for item in record["weights"])

    shutil.copy(path, host.server.base / "input" / "recorded.png")
    back = {
        "read": {"class_type": "KontextLoadRecord", "inputs": {"picture": "recorded.png"}},
        "prompt": {"class_type": "PreviewAny", "inputs": {"source": ["read", 1]}},
        "seed": {"class_type": "PreviewAny", "inputs": {"source": ["read", 2]}},
        "guidance": {"class_type": "PreviewAny", "inputs": {"source": ["read", 4]}},
    }
    outputs = host.run(back).history["outputs"]
    found = [outputs[node]["text"][0] for node in ("prompt", "seed", "guidance")]
    assert found == ["make it red", "77", "3.5"]

    again = edit_workflow(picture)
    again["read"] = back["read"]
    again["edit"]["inputs"] |= {"prompt": ["read", 1], "seed": ["read", 2], "guidance": ["read", 4]}
    again["save"] = workflow["save"]
    (entry,) = host.run(again).history["outputs"]["save"]["images"]
    second = host.server.base / "output" / entry["subfolder"] / entry["filename"]
    assert second != path and Image.open(second).tobytes() == Image.open(path).tobytes()

    changed = np.asarray(Image.open(path)).copy()
    changed[0, 0] ^= 1
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("kontext", text["kontext"])
    Image.fromarray(changed).save(host.server.base / "input" / "recorded2.png", pnginfo=info)
    back["read"]["inputs"]["picture"] = "recorded2.png"
    assert "was changed after its record was written" in host.error(back)


def test_bfl_parity_overrides_its_widgets(host, edit_workflow, picture):
    first = host.pictures(host.run(edit_workflow(picture, bfl_parity=True)))[0].tobytes()
    other = edit_workflow(picture, bfl_parity=True, fit="pad", shift="none", sampler="heun")
    assert host.pictures(host.run(other))[0].tobytes() == first
    assert host.pictures(host.run(edit_workflow(picture)))[0].tobytes() != first
