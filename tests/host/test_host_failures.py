"""Bad input of every kind gives one readable sentence in the node's error; cancelling leaves the server well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def picture(host) -> str:
    pixels = np.random.default_rng(4).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return host.upload(Image.fromarray(pixels), "failures.png")


@pytest.fixture
def broken_model(host, tiny):
    """Writes a changed copy of the random transformer into the models folder; returns its name."""

    def write(name: str, change) -> str:
        source = host.server.base / "models" / "diffusion_models" / tiny["diffusion_models"]
        change(source, host.put_model("diffusion_models", name))
        return name

    return write


def with_model(workflow: dict, name: str) -> dict:
    workflow["model"]["inputs"]["model"] = name
    return workflow


def test_a_truncated_file_is_named_and_so_is_what_is_wrong(host, edit_workflow, broken_model):
    name = broken_model("truncated.safetensors", lambda old, new: new.write_bytes(old.read_bytes()[:-1000]))
    message = host.error(with_model(edit_workflow(), name))
    assert name in message and "download is incomplete" in message


def test_a_file_of_noise_is_refused(host, edit_workflow, broken_model):
    name = broken_model("noise.safetensors", lambda old, new: new.write_bytes(bytes(range(256)) * 64))
    message = host.error(with_model(edit_workflow(), name))
    assert name in message and "not a readable safetensors file" in message


def test_a_pickled_file_is_refused_with_the_reason(host, edit_workflow, broken_model):
    name = broken_model("pickled.safetensors", lambda old, new: torch.save({"a": torch.ones(2)}, new))
    message = host.error(with_model(edit_workflow(), name))
    assert "pickled" in message and "code" in message


def test_another_kind_of_model_is_named(host, edit_workflow, broken_model, tiny):
    vae = host.server.base / "models" / "vae" / tiny["vae"]
    name = broken_model("a_vae.safetensors", lambda old, new: new.write_bytes(vae.read_bytes()))
    message = host.error(with_model(edit_workflow(), name))
    assert "autoencoder" in message and "transformer is needed" in message


def drop_a_key(old, new) -> None:
    state = load_file(old)
    del state["double_blocks.1.img_attn.proj.weight"]
    save_file(state, new)


def test_a_missing_weight_is_named(host, edit_workflow, broken_model):
    message = host.error(with_model(edit_workflow(), broken_model("incomplete.safetensors", drop_a_key)))
    assert "double_blocks.1.img_attn.proj.weight" in message and "missing" in message


def put_nan(old, new) -> None:
    state = load_file(old)
    state["single_blocks.0.linear1.bias"][3] = float("nan")
    save_file(state, new)


def test_nan_weights_are_found_when_loading(host, edit_workflow, broken_model):
    message = host.error(with_model(edit_workflow(), broken_model("nan.safetensors", put_nan)))
    assert "single_blocks.0.linear1.bias" in message and "NaN" in message


def put_infinite_products(old, new) -> None:
    state = load_file(old)
    state["final_layer.linear.weight"].fill_(3e38)
    save_file(state, new)


def test_a_result_that_is_not_finite_stops_with_the_step_and_what_to_try(host, edit_workflow, broken_model):
    name = broken_model("overflow.safetensors", put_infinite_products)
    message = host.error(with_model(edit_workflow(), name))
    assert "step 1 of 2" in message and "float32" in message


def test_what_is_no_picture_is_refused(host, edit_workflow):
    path = host.server.base / "text.png"
    path.write_text("not a picture")
    name = host.client.upload(path)
    assert "Image" in host.error(edit_workflow(name)) or "image" in host.error(edit_workflow(name))


def test_a_size_that_is_no_multiple_of_16_is_refused(host, edit_workflow, picture):
    for image in (picture, None):
        message = host.error(edit_workflow(image, width=100, height=64))
        assert "100" in message and "16" in message


def test_half_a_size_is_refused(host, edit_workflow, picture):
    assert "give both" in host.error(edit_workflow(picture, width=64))


def test_few_step_without_a_distilled_model_says_so(host, edit_workflow, picture):
    message = host.error(edit_workflow(picture, few_step="4"))
    assert "distilled" in message and "few_step" in message


def test_a_colour_that_is_none_is_refused(host, edit_workflow, picture):
    assert "#808080" in host.error(edit_workflow(picture, fit="pad", padding="grey"))


def test_text_encoders_of_two_models_are_refused(host, edit_workflow, tiny):
    workflow = edit_workflow()
    workflow["clip"]["inputs"]["clip"] = "kontext-tiny (bundled)"
    assert "both" in host.error(workflow)


def test_a_latent_of_another_kind_is_refused(host, edit_workflow):
    workflow = edit_workflow()
    empty = {"width": 128, "height": 128, "batch_size": 1}
    workflow["empty"] = {"class_type": "EmptyLatentImage", "inputs": empty}
    workflow["edit"]["inputs"]["latent"] = ["empty", 0]
    message = host.error(workflow)
    assert "(1, 4, 16, 16)" in message and "(batch, 16" in message


def test_batches_that_do_not_go_together_are_refused(host, edit_workflow, picture):
    workflow = edit_workflow(picture, batch_size=3)
    both = {"image1": ["load", 0], "image2": ["load", 0]}
    workflow["both"] = {"class_type": "ImageBatch", "inputs": both}
    workflow["edit"]["inputs"]["image"] = ["both", 0]
    assert "batch_size 3" in host.error(workflow)


def test_sigmas_of_another_kind_of_model_are_refused(host, loader_nodes):
    zero = {"width": 64, "height": 64, "batch_size": 1}
    text = {"clip": ["clip", 0], "text": "", "guidance": 2.5, "text_length": 0}
    karras = {"steps": 3, "sigma_max": 14.6, "sigma_min": 0.03, "rho": 7.0}
    workflow = {
        **loader_nodes,
        "prompt": {"class_type": "KontextPrompt", "inputs": text},
        "sampler": {"class_type": "KontextSampler", "inputs": {"sampler": "euler"}},
        "sigmas": {"class_type": "KarrasScheduler", "inputs": karras},
        "empty": {"class_type": "EmptySD3LatentImage", "inputs": zero},
        "sample": {"class_type": "SamplerCustom", "inputs": {
            "model": ["model", 0], "add_noise": True, "noise_seed": 1, "cfg": 1.0, "positive": ["prompt", 0],
            "negative": ["prompt", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["empty", 0],
        }},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["vae", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "x"}},
    }  # fmt: skip
    assert "between 1 and 0" in host.error(workflow)


def test_cancelling_while_it_samples_leaves_nothing_half_done_and_the_server_well(
    host, edit_workflow, picture
):
    output = host.server.base / "output"
    before = sorted(path.name for path in output.iterdir())
    seen = []

    def cancel(kind, data) -> None:
        if kind == "progress" and data["node"] == "edit" and data["max"] == 400:
            seen.append(data["value"])
            if data["value"] == 2:
                host.client.interrupt()

    with pytest.raises(Exception, match="interrupted in node edit"):
        host.run(edit_workflow(picture, steps=400, seed=77), cancel)
    assert 2 <= max(seen) < 100
    assert sorted(path.name for path in output.iterdir()) == before
    assert host.client.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert host.pictures(host.run(edit_workflow(picture, seed=78)))


def test_an_edit_after_every_failure_is_what_it_would_have_been(host, edit_workflow, picture):
    first = host.pictures(host.run(edit_workflow(picture, seed=80)))[0]
    host.error(edit_workflow(picture, seed=80, width=64))
    host.client.post("/free", {"unload_models": True, "free_memory": True})
    again = host.pictures(host.run(edit_workflow(picture, seed=80)))[0]
    assert first.tobytes() == again.tobytes()
