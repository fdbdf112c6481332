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
    message = host.error(workflow)
    assert "picture 1 is black" in message and "the VAE's decode, or in the model before it" in message
    assert "connect the latent too" in message and "--fp32-vae" in message
    workflow["guard"]["inputs"] = {}
    assert "nothing is connected" in host.error(workflow)


def test_a_picture_that_the_vae_spoils_is_laid_at_its_decode(host, tiny, edit_workflow, picture):
    """A finite latent and a bad picture: no block of the model is to blame."""
    state = load_file(host.put_model("vae", tiny["vae"]))
    zero = {
        key: torch.zeros_like(value) for key, value in state.items() if key.startswith("decoder.conv_out.")
    }
    zero["decoder.conv_out.bias"] = zero["decoder.conv_out.bias"] - 1  # black
    save_file({**state, **zero}, host.put_model("vae", "black.safetensors"))
    workflow = guard(edit_workflow(picture), latent=["edit", 1], image=["edit", 0])
    workflow["vae"]["inputs"]["vae"] = "black.safetensors"
    workflow["save"]["inputs"]["images"] = ["guard", 2]
    message = host.error(workflow)
    assert "picture 1 is black" in message
    assert "its latent is finite, so it began in the VAE's decode" in message and "--fp32-vae" in message


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


EDIT_OUTPUTS = {  # Kontext Load Record's outputs that are Kontext Edit's widgets
    "prompt": 1, "seed": 2, "steps": 3, "guidance": 4, "few_step": 6, "fit": 7, "padding": 8, "convention": 9,
    "width": 10, "height": 11, "sampler": 12, "shift": 13, "mu": 14, "batch_size": 15, "bfl_parity": 16,
}  # fmt: skip


def saved_with_record(host, workflow: dict, name: str) -> list[Image.Image]:
    """The pictures that Kontext Save wrote; each goes into the input folder as <name>_<i>.png."""
    found = []
    for index, entry in enumerate(host.run(workflow).history["outputs"]["save"]["images"]):
        path = host.server.base / "output" / entry["subfolder"] / entry["filename"]
        shutil.copy(path, host.server.base / "input" / f"{name}_{index}.png")
        found.append(Image.open(path))
    return found


def with_save(workflow: dict, source: str = "edit", record: int = 3, image: int = 0) -> dict:
    inputs = {"image": [source, image], "record": [source, record], "filename_prefix": "kept/again"}
    return {**workflow, "save": {"class_type": "KontextSave", "inputs": inputs}}


def edited_again(host, edit_workflow, picture: str | None, recorded: str, name: str) -> list[Image.Image]:
    """What an edit makes whose every widget is connected to a loaded record."""
    again = with_save(edit_workflow(picture))
    again["read"] = {"class_type": "KontextLoadRecord", "inputs": {"picture": recorded}}
    again["edit"]["inputs"] |= {key: ["read", output] for key, output in EDIT_OUTPUTS.items()}
    return saved_with_record(host, again, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"few_step": "2", "seed": 5},
        {"fit": "pad", "padding": "#204060", "sampler": "heun", "shift": "constant", "mu": 0.7, "seed": 6},
        {"width": 96, "height": 128, "shift": "none", "bfl_parity": True, "seed": 7},
    ],
    ids=["few_step", "pad", "bfl"],
)
def test_a_loaded_record_makes_the_same_picture_whatever_was_set(host, tiny, edit_workflow, picture, changes):
    source = host.put_model("diffusion_models", tiny["diffusion_models"])
    host.put_model("diffusion_models", "random_few_step.safetensors").write_bytes(source.read_bytes())

    def edit(image=None, **inputs):
        workflow = edit_workflow(image, **inputs)
        workflow["model"]["inputs"]["model"] = "random_few_step.safetensors"
        return workflow

    name = "again_" + "_".join(changes)
    (first,) = saved_with_record(host, with_save(edit(picture, **changes)), name)
    (second,) = edited_again(host, edit, picture, f"{name}_0.png", f"{name}_second")
    assert second.size == first.size and second.tobytes() == first.tobytes()
    (plain,) = saved_with_record(host, with_save(edit(picture)), f"{name}_plain")
    assert plain.tobytes() != first.tobytes()


def test_a_picture_of_a_batch_is_made_again_alone_from_its_own_seed(host, edit_workflow, picture):
    batch = saved_with_record(host, with_save(edit_workflow(picture, seed=40, batch_size=3)), "of_batch")
    assert len({one.tobytes() for one in batch}) == 3
    (again,) = edited_again(host, edit_workflow, picture, "of_batch_2.png", "of_batch_again")
    difference = np.abs(np.asarray(again).astype(int) - np.asarray(batch[2]).astype(int))
    assert difference.max() <= 1  # sums of one picture and of three are taken in another order


def test_a_picture_of_a_bfl_batch_is_the_same_one_of_the_batch_made_again(host, edit_workflow, picture):
    workflow = with_save(edit_workflow(picture, seed=41, batch_size=2, bfl_parity=True))
    batch = saved_with_record(host, workflow, "of_bfl_batch")
    again = edited_again(host, edit_workflow, picture, "of_bfl_batch_1.png", "of_bfl_batch_again")
    assert [one.tobytes() for one in again] == [one.tobytes() for one in batch]
    read = {
        "read": {"class_type": "KontextLoadRecord", "inputs": {"picture": "of_bfl_batch_1.png"}},
        "index": {"class_type": "PreviewAny", "inputs": {"source": ["read", 18]}},
    }
    assert host.run(read).history["outputs"]["index"]["text"] == ["1"]


@pytest.mark.parametrize("chain", ["latents", "pictures"])
def test_turns_are_made_again_from_the_record_of_one_of_them(host, edit_workflow, picture, chain):
    loaders = {name: node for name, node in edit_workflow().items() if name in ("model", "clip", "vae")}
    values = {
        "seed": 3, "steps": 2, "guidance": 3.0, "few_step": "off", "chain": chain, "turn": 3, "fit": "keep",
        "padding": "mirror", "image": ["load", 0],
        "instructions": "make it red\nadd a star [seed 90]\nfrom 1: add a moon [seed 7]",
    }  # fmt: skip
    links = {name: [name, 0] for name in loaders}
    workflow = {
        **loaders,
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "turns": {"class_type": "KontextTurns", "inputs": {**links, **values}},
    }
    (first,) = saved_with_record(host, with_save(workflow, "turns", 5, 1), f"turns_{chain}")
    record = json.loads(first.text["kontext"])
    assert record["prompts"] == ["make it red", "add a moon"]
    assert [record["settings"]["earlier"][0]["seed"], record["settings"]["seed"]] == [3, 7]

    again = json.loads(json.dumps(workflow))
    again["read"] = {"class_type": "KontextLoadRecord", "inputs": {"picture": f"turns_{chain}_0.png"}}
    outputs = {"instructions": 1, "seed": 2, "steps": 3, "guidance": 4, "few_step": 6, "fit": 7, "chain": 17}
    again["turns"]["inputs"] |= {key: ["read", output] for key, output in outputs.items()} | {"turn": 0}
    (second,) = saved_with_record(host, with_save(again, "turns", 5, 1), f"turns_{chain}_again")
    assert second.tobytes() == first.tobytes()


def test_bfl_parity_overrides_its_widgets(host, edit_workflow, picture):
    first = host.pictures(host.run(edit_workflow(picture, bfl_parity=True)))[0].tobytes()
    other = edit_workflow(picture, bfl_parity=True, fit="pad", shift="none", sampler="heun")
    assert host.pictures(host.run(other))[0].tobytes() == first
    assert host.pictures(host.run(edit_workflow(picture)))[0].tobytes() != first
