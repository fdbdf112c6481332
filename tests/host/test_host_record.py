"""What a record says of the way of a MODEL, and nodes' pictures made again by Kontext Turns and on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kontext_core.__main__ import main
from kontext_core.models.lora import lora_patch, save_lora
from kontext_core.presets import KONTEXT_TINY
from kontext_core.record import load_record, stamp

HIDDEN = KONTEXT_TINY.transformer.hidden_size


@pytest.fixture(scope="module")
def picture(host) -> str:
    y, x = np.mgrid[0:96, 0:112]
    pixels = np.stack([x * 2, y * 2, x + y], 2).astype(np.uint8)
    return host.upload(Image.fromarray(pixels), "record.png")


@pytest.fixture(scope="module")
def loras(host) -> dict[str, Path]:
    """Two LoRAs that are seen, one of them with a layer for the text encoders."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, text in (("plain", False), ("worded", True)):
        down, up = torch.randn(4, 64, generator=generator), torch.randn(HIDDEN, 4, generator=generator)
        patches = [lora_patch("img_in", down * 0.1, up * 0.1)]
        if text:
            width = KONTEXT_TINY.clip.hidden_size
            layer = "text_model.encoder.layers.0.self_attn.q_proj"
            patches.append(lora_patch(layer, torch.ones(1, width), torch.ones(width, 1), part="clip"))
        found[name] = host.put_model("loras", f"{name}.safetensors")
        save_lora(found[name], patches)
    return found


def kept(host, workflow: dict, name: str, source: str = "edit", outputs: tuple[int, int] = (0, 3)) -> Path:
    """The picture that Kontext Save wrote, brought into the input folder under a name."""
    inputs = {"image": [source, outputs[0]], "record": [source, outputs[1]], "filename_prefix": "kept/record"}
    graph = {**workflow, "save": {"class_type": "KontextSave", "inputs": inputs}}
    (entry,) = host.run(graph).history["outputs"]["save"]["images"]
    path = host.server.base / "input" / f"{name}.png"
    shutil.copy(host.server.base / "output" / entry["subfolder"] / entry["filename"], path)
    return path


def near(one: Path, other: Path) -> int:
    first, second = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (one, other))
    return int(np.abs(first - second).max())


def through(workflow: dict, *nodes: tuple[str, str, dict]) -> dict:
    """The workflow with nodes (id, class, widgets) one after another between its model and its edit."""
    before = "model"
    for name, kind, widgets in nodes:
        workflow[name] = {"class_type": kind, "inputs": {"model": [before, 0], **widgets}}
        before = name
    workflow["edit"]["inputs"]["model"] = [before, 0]
    return workflow


def test_a_record_names_loras_strengths_accelerations_and_other_nodes(host, edit_workflow, picture, loras):
    workflow = through(
        edit_workflow(picture),
        ("ours", "KontextLoadLora", {"lora": "worded.safetensors", "strength": 0.5, "strength_clip": 0.25}),
        ("native", "LoraLoaderModelOnly", {"lora_name": "plain.safetensors", "strength_model": -0.75}),
        ("guard", "KontextGuard", {}),
        ("flow", "ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 112, "height": 96}),
        ("fast", "KontextAccelerate", {
            "reuse_context": 3, "skip_regions": 0.5, "first_block": 0.05, "warmup": 1, "compile": False,
        }),
    )  # fmt: skip
    workflow["ours"]["inputs"]["clip"] = ["clip", 0]
    workflow["edit"]["inputs"]["clip"] = ["ours", 1]
    made = load_record(kept(host, workflow, "through"))
    settings = made.settings
    assert settings["loras"] == [["worded.safetensors", 0.5, 0.25], ["plain.safetensors", -0.75]]
    numbers = [settings[name] for name in ("reuse_context", "skip_regions", "first_block", "warmup")]
    assert numbers == [3, 0.5, 0.05, 1]
    assert [node["node"] for node in settings["through"]] == ["ModelSamplingFlux"]
    assert settings["through"][0]["max_shift"] == 1.15
    stamps = {item.role: item.digest for item in made.weights}
    assert stamps["lora 1"] == stamp("", loras["worded"]).digest
    assert stamps["lora 2"] == stamp("", loras["plain"]).digest
    assert set(made.versions) >= {"kontext", "torch", "python", "comfyui"}
    plain = load_record(kept(host, edit_workflow(picture), "not_through"))
    assert plain.settings["loras"] == [] and "through" not in plain.settings
    assert plain.settings["reuse_context"] == 1 and not any("lora" in item.role for item in plain.weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"fit": "pad", "padding": "#204060", "shift": "constant", "mu": 0.7, "seed": 6, "steps": 3},
        {"width": 96, "height": 128, "shift": "none", "sampler": "heun", "seed": 7},
        {"bfl_parity": True, "fit": "pad", "sampler": "heun", "seed": 8},
        {"lora": True, "seed": 9, "steps": 4},
    ],
    ids=["pad", "size", "bfl", "lora"],
)
def test_the_command_line_makes_a_nodes_picture_again_from_its_record(
    host, tiny, edit_workflow, picture, loras, tmp_path, changes
):
    changes = dict(changes)
    with_lora = changes.pop("lora", False)
    workflow = edit_workflow(picture, **changes)
    if with_lora:
        fast = {"reuse_context": 2, "skip_regions": 0.0, "first_block": 0.0, "warmup": 1, "compile": False}
        lora = {"lora": "plain.safetensors", "strength": 0.5, "strength_clip": 1.0}
        through(workflow, ("ours", "KontextLoadLora", lora), ("fast", "KontextAccelerate", fast))
    node = kept(host, workflow, "like")
    places = {"--model": "diffusion_models", "--t5": "t5", "--clip": "clip", "--vae": "vae"}
    out = tmp_path / "again.png"
    command = ["edit", host.server.base / "input" / picture, "--like", node, "--output", out]
    for option, kind in places.items():
        folder = "text_encoders" if kind in ("t5", "clip") else kind
        command += [option, host.put_model(folder, tiny[kind])]
    assert main([str(part) for part in command]) == 0
    assert near(out, node) <= 1  # rounding of another order of sums
    size = {name: changes[name] for name in ("width", "height") if name in changes}
    assert near(node, kept(host, edit_workflow(picture, **size), "plain")) > 2


def test_edits_chained_by_hand_become_turns_again_with_their_lines_steps_and_guidance(
    host, edit_workflow, picture
):
    """Instructions of several lines are one turn each, in which a line break is read as a space."""
    workflow = edit_workflow(picture, prompt="make it red\n\nkeep the rest", seed=3, steps=2, fit="keep")
    second = {
        **workflow["edit"]["inputs"], "prompt": "add a star\nand a moon", "seed": 40, "steps": 3, "guidance": 3.5,
        "latent": ["edit", 1], "record": ["edit", 3],
    }  # fmt: skip
    workflow["second"] = {"class_type": "KontextEdit", "inputs": second}
    del workflow["save"]
    first = kept(host, workflow, "chained", source="second")
    links = {name: [name, 0] for name in ("model", "clip", "vae")}
    again = {name: workflow[name] for name in (*links, "load")}
    again["read"] = {"class_type": "KontextLoadRecord", "inputs": {"picture": "chained.png"}}
    outputs = {
        "instructions": 1,
        "seed": 2,
        "steps": 3,
        "guidance": 4,
        "few_step": 6,
        "fit": 7,
        "padding": 8,
        "chain": 17,
    }
    values = {**links, "image": ["load", 0], "turn": 0, **{name: ["read", n] for name, n in outputs.items()}}
    again["turns"] = {"class_type": "KontextTurns", "inputs": values}
    made = kept(host, again, "chained_again", source="turns", outputs=(1, 5))
    assert Image.open(made).tobytes() == Image.open(first).tobytes()
    assert load_record(made).prompts == ("make it red keep the rest", "add a star and a moon")


def test_a_chain_that_turns_cannot_make_again_says_so(host, edit_workflow, picture):
    workflow = edit_workflow(picture, sampler="heun")
    second = {**workflow["edit"]["inputs"], "latent": ["edit", 1], "record": ["edit", 3], "sampler": "euler"}
    workflow["second"] = {"class_type": "KontextEdit", "inputs": second}
    del workflow["save"]
    kept(host, workflow, "mixed", source="second")
    read = {
        "read": {"class_type": "KontextLoadRecord", "inputs": {"picture": "mixed.png"}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["read", 0]}},
    }
    (said,) = host.run(read).history["outputs"]["read"]["text"]
    assert said.startswith("Kontext Turns cannot make this again as it was: turn 1 has sampler heun")
    assert "turn 1 has sampler heun" in host.log()
    assert json.loads(Image.open(host.server.base / "input" / "mixed.png").text["kontext"])["format"] == 1
