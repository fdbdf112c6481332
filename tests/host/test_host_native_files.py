"""Our nodes on files that ComfyUI's own loaders loaded: UNETLoader, DualCLIPLoader and VAELoader in the real host.

The model is FLUX.1's own width with few blocks, the autoencoder the published one's size, the text encoders small;
weights are random, so what is tested is that everything runs, and that a native MODEL gives what ours gives.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drift_words import is_report
from PIL import Image

from kontext_core.models.lora import lora_patch, save_lora

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
SIZE = (32, 48)


@pytest.fixture(scope="module")
def picture(host) -> str:
    pixels = np.random.default_rng(6).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return host.upload(Image.fromarray(pixels), "native.png")


@pytest.fixture
def native_edit(edit_workflow, native_loaders, picture):
    """Kontext Edit on the host's own loaders; the picture is kept at its own size, which is small."""

    def make(**changes) -> dict:
        return {**edit_workflow(picture, **{"fit": "keep", **changes}), **native_loaders}

    return make


def one(host, workflow: dict) -> np.ndarray:
    (result,) = host.pictures(host.run(workflow))
    return np.asarray(result.convert("RGB")).astype(int)


def test_an_edit_of_native_files_has_the_pictures_size_and_follows_its_words_and_seed(host, native_edit):
    plain = one(host, native_edit())
    assert plain.shape == (SIZE[1], SIZE[0], 3) and plain.std() > 1
    assert np.abs(one(host, native_edit(prompt="make it green")) - plain).max() > 2
    assert np.abs(one(host, native_edit(seed=2)) - plain).mean() > 2


def test_an_edit_on_a_native_model_is_the_edit_on_ours(host, wide, native_edit):
    """The same file through UNETLoader and through Kontext Load Model; float32 on a CPU, within rounding of 8 bits."""
    native = native_edit(seed=4)
    ours = native_edit(seed=4)
    ours["model"] = {
        "class_type": "KontextLoadModel",
        "inputs": {"model": wide["model"], "weight_dtype": "default"},
    }
    assert np.abs(one(host, native) - one(host, ours)).max() <= 1


@pytest.mark.parametrize(
    "changes",
    [{"few_step": "2"}, {"sampler": "dpmpp_2m", "steps": 3}, {"bfl_parity": True, "width": 32, "height": 32}],
    ids=["few_step", "dpmpp_2m", "bfl"],
)
def test_every_way_to_sample_runs_on_a_native_model(host, native_edit, changes):
    assert one(host, native_edit(**changes)).std() > 1


def test_a_guarded_and_accelerated_native_model_with_a_lora_edits_and_is_estimated(host, native_edit):
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=generator) * 0.05 for shape in ((4, 3072), (9216, 4)))
    patch = lora_patch("double_blocks.0.img_attn.qkv", down, up, alpha=4.0)
    save_lora(host.put_model("loras", "wide.safetensors"), [patch])
    plain = native_edit(steps=3)
    workflow = native_edit(steps=3)
    lora = {"model": ["model", 0], "lora": "wide.safetensors", "strength": 1.0, "strength_clip": 1.0}
    workflow["lora"] = {"class_type": "KontextLoadLora", "inputs": lora}
    workflow["guard"] = {"class_type": "KontextGuard", "inputs": {"model": ["lora", 0]}}
    workflow["edit"]["inputs"]["model"] = ["guard", 0]
    words = {"clip": ["clip", 0], "text": "red", "guidance": 2.5, "text_length": 0}
    workflow["prompt"] = {"class_type": "KontextPrompt", "inputs": words}
    reference = {
        "conditioning": ["prompt", 0], "vae": ["vae", 0], "image": ["load", 0], "fit": "keep", "padding": "mirror",
        "convention": "offset", "width": 0, "height": 0,
    }  # fmt: skip
    workflow["reference"] = {"class_type": "KontextReference", "inputs": reference}
    estimate = {
        "model": ["model", 0],
        "conditioning": ["reference", 0],
        "latent": ["reference", 1],
        "steps": 4,
    }
    workflow["estimate"] = {"class_type": "KontextEstimate", "inputs": estimate}
    run = host.run(workflow)
    result = np.asarray(host.pictures(run)[0].convert("RGB")).astype(int)
    assert np.abs(result - one(host, plain)).max() > 1
    (report,) = run.history["outputs"]["estimate"]["text"]
    assert "6 target + 6 reference" in report and "s for 4 steps" in report


def test_turns_run_on_native_files(host, native_loaders, picture):
    inputs = {name: [name, 0] for name in native_loaders}
    inputs |= {
        "image": ["load", 0], "instructions": "make it red\nadd a star", "seed": 3, "steps": 1, "guidance": 2.5,
        "few_step": "off", "chain": "latents", "turn": 0, "fit": "keep", "padding": "mirror",
    }  # fmt: skip
    graph = {
        **native_loaders,
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "turns": {"class_type": "KontextTurns", "inputs": inputs},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["turns", 0], "filename_prefix": "native"}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["turns", 4]}},
    }
    run = host.run(graph)
    pictures = host.pictures(run)
    assert [one.size for one in pictures] == [SIZE] * 2 and pictures[0].tobytes() != pictures[1].tobytes()
    report = run.history["outputs"]["report"]["text"][0]
    assert is_report(report, "make it red", "add a star"), report


def test_the_workflow_of_native_loaders_runs_as_it_is_shipped_but_for_the_files_names(
    host, native_loaders, picture
):
    workflow = json.loads((WORKFLOWS / "mixed_native_loader.json").read_text(encoding="utf-8"))
    of_class = {node["class_type"]: node["inputs"] for node in workflow.values()}
    for node in native_loaders.values():
        assert set(of_class[node["class_type"]]) == set(node["inputs"])
        of_class[node["class_type"]].update(node["inputs"])
    of_class["LoadImage"]["image"] = picture
    of_class["KontextReference"]["fit"] = "keep"
    of_class["KontextSchedule"]["steps"] = 2
    (result,) = host.pictures(host.run(workflow))
    assert result.size == SIZE and np.asarray(result).std() > 1
