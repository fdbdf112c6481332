"""Kontext Edit in a real ComfyUI, on random weights of kontext-tiny's sizes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def picture(host) -> str:
    """A picture whose sides are no multiples of 16, in an aspect ratio of its own."""
    pixels = np.random.default_rng(0).integers(0, 255, (101, 143, 3), dtype=np.uint8)
    return host.upload(Image.fromarray(pixels), "odd.png")


def test_an_edit_comes_back_at_the_pictures_own_size(host, tiny, edit_workflow, picture):
    run = host.run(edit_workflow(picture))
    assert [image.size for image in host.pictures(run)] == [(143, 101)]


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_transparency_is_kept_at_the_pictures_own_size_and_at_one_that_is_asked_for(
    host, tiny, edit_workflow, fit
):
    pixels = np.random.default_rng(4).integers(0, 255, (64, 96, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:, :48, 3] = 0
    name = f"clear_{fit}.png"
    path = host.server.base / "input" / name
    Image.fromarray(pixels).save(path)
    sizes = {(0, 0): (96, 64), (128, 128): (128, 128)}
    for (width, height), size in sizes.items():
        graph = edit_workflow(None, width=width, height=height, fit=fit, padding="#808080")
        graph["edit"]["inputs"]["image"] = ["joined", 0]
        graph["load"] = {"class_type": "LoadImage", "inputs": {"image": name}}
        graph["joined"] = {  # the host's LoadImage gives transparency as a mask
            "class_type": "JoinImageWithAlpha",
            "inputs": {"image": ["load", 0], "alpha": ["load", 1]},
        }
        (result,) = host.pictures(host.run(graph))
        assert result.mode == "RGBA" and result.size == size
        alpha = np.asarray(result)[..., 3]
        middle = alpha[size[1] // 2]
        edge = size[0] // 2
        assert (middle[edge + 8 :] > 250).all() and (middle[: edge - 8] < 5).all()
        if (width, fit) == (128, "pad"):  # what was added around it is the model's own
            assert (alpha[:8] > 250).all() and (alpha[-8:] > 250).all()


def test_progress_and_previews_come_while_it_samples(host, tiny, edit_workflow, picture):
    run = host.run(edit_workflow(picture, steps=3, seed=2))
    steps = [event["value"] for event in run.of("progress") if event["node"] == "edit"]
    assert [step for step in steps if step <= 3][-3:] == [1, 2, 3]
    assert len(run.previews) == 3
    assert Image.open(io.BytesIO(run.previews[0])).size[0] > 0


def test_no_preview_comes_where_the_setting_says_none(host, edit_workflow, picture):
    """ComfyUI's page sends its setting with a run; where nothing is set it sends none (see the test above)."""
    queued = {"prompt": edit_workflow(picture, steps=3, seed=3), "client_id": host.client.client_id}
    host.client.connect()
    prompt_id = host.client.post("/prompt", {**queued, "extra_data": {"preview_method": "none"}})["prompt_id"]
    kinds = []
    host.client.wait(prompt_id, lambda kind, _: kinds.append(kind))
    assert "progress" in kinds and "preview" not in kinds


def test_none_as_an_option_of_the_start_is_kept_to_and_a_run_may_ask_otherwise(inside):
    unset = {"nothing": True, "default": True, "none": False, "taesd": True}
    assert inside("preview") == unset
    started = {"nothing": False, "default": False, "none": False, "taesd": True}
    assert inside("preview", options=("--preview-method", "none")) == started
    assert inside("preview", options=("--preview-method=none",)) == started
    assert inside("preview", options=("--preview-method", "auto")) == unset


def test_what_a_node_says_goes_to_the_page_that_queued_it(host, edit_workflow, picture):
    run = host.run(edit_workflow(picture, steps=1, seed=4))
    (said,) = run.of("kontext.lines")
    assert said["node"] == "edit" and said["lines"][0].startswith("143x101 to ")


def test_the_same_seed_gives_the_same_bytes(host, tiny, edit_workflow, picture):
    first = host.pictures(host.run(edit_workflow(picture, seed=5)))[0]
    host.run(edit_workflow(picture, seed=6))  # so that the next is not answered from the cache
    host.client.post("/free", {"unload_models": True, "free_memory": True})
    second = host.pictures(host.run(edit_workflow(picture, seed=5)))[0]
    assert first.tobytes() == second.tobytes()


def test_a_batch_that_counts_past_the_largest_seed_goes_on_with_seed_0(host, edit_workflow, picture):
    last = 2**64 - 1
    batch = host.pictures(host.run(edit_workflow(picture, seed=last, batch_size=2, sampler="few_step")))
    for seed, made in zip((last, 0), batch, strict=True):
        (alone,) = host.pictures(host.run(edit_workflow(picture, seed=seed, sampler="few_step")))
        difference = np.abs(np.asarray(alone).astype(int) - np.asarray(made).astype(int))
        assert difference.max() <= 1  # sums of one picture and of two are taken in another order


def test_an_odd_latent_alone_comes_back_at_its_own_size_and_is_restored(host, edit_workflow, picture):
    graph = edit_workflow(None, latent=["cut", 0])
    size = {"width": 104, "height": 72, "x": 0, "y": 0}  # 13 by 9 cells
    graph |= {
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "encoded": {"class_type": "VAEEncode", "inputs": {"pixels": ["load", 0], "vae": ["vae", 0]}},
        "cut": {"class_type": "LatentCrop", "inputs": {"samples": ["encoded", 0], **size}},
        "restore": {
            "class_type": "KontextRestore",
            "inputs": {"image": ["edit", 0], "geometry": ["edit", 2]},
        },
        "restored": {
            "class_type": "SaveImage",
            "inputs": {"images": ["restore", 0], "filename_prefix": "odd"},
        },
    }
    made = host.pictures(host.run(graph))
    assert [image.size for image in made] == [(104, 72)] * 2
    edited, restored = (np.asarray(image).astype(int) for image in made)
    assert edited.std() > 1 and np.abs(restored - edited).max() <= 1  # rounding there and back


def test_a_noise_mask_has_the_latents_size_or_the_pictures(host, edit_workflow, picture):
    """One of the picture's own size is fitted as the picture is: with pad it lands where the picture lands."""

    def masked(mask: Image.Image, name: str, **changes) -> dict:
        graph = edit_workflow(picture, latent=["masked", 0], steps=1, fit="pad", **changes)
        reference = {
            "conditioning": ["prompt", 0], "vae": ["vae", 0], "image": ["load", 0], "fit": "pad", "padding": "mirror",
            "convention": "offset", "width": 0, "height": 0,
        }  # fmt: skip
        words = {"clip": ["clip", 0], "text": "", "guidance": 2.5, "text_length": 0}
        uploaded = host.upload(mask.convert("RGB"), name)
        return graph | {
            "prompt": {"class_type": "KontextPrompt", "inputs": words},
            "reference": {"class_type": "KontextReference", "inputs": reference},
            "mask": {"class_type": "LoadImageMask", "inputs": {"image": uploaded, "channel": "red"}},
            "masked": {
                "class_type": "SetLatentNoiseMask",
                "inputs": {"samples": ["reference", 1], "mask": ["mask", 0]},
            },
            "before": {
                "class_type": "SaveLatent",
                "inputs": {"samples": ["reference", 1], "filename_prefix": "mask_before"},
            },
            "after": {
                "class_type": "SaveLatent",
                "inputs": {"samples": ["edit", 1], "filename_prefix": "mask_after"},
            },
        }

    half = Image.new("L", (143, 101))
    half.paste(255, (72, 0, 143, 101))
    outputs = host.run(masked(half, "mask_own.png")).history["outputs"]
    before, after = (
        load_file(host.server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
        for file in (outputs[key]["latents"][0] for key in ("before", "after"))
    )
    change, middle = (after - before).abs().mean((0, 1, 2)), before.shape[-1] // 2
    assert change[: middle - 1].max() < 1e-5 * before.std()
    assert change[middle + 1 :].min() > 0.01 * before.std()
    wrong = masked(Image.new("L", (64, 64), 255), "mask_wrong.png")
    assert "noise mask is 64×64: make it at the latent's own size" in host.error(wrong)
    assert "or the picture's 143×101" in host.error(wrong)
    size = (before.shape[-1] * 8, before.shape[-2] * 8)
    sized = masked(Image.new("L", size, 255), "mask_sized.png", width=256, height=256)
    del sized["edit"]["inputs"][
        "image"
    ]  # with one the latent would have to be of the size that it is fitted to
    assert "leave width and height at 0" in host.error(sized)


def test_a_latent_mask_keeps_the_latent_outside_it_and_changes_it_inside(host, tiny, edit_workflow):
    """Inpainting by latent mask: where the mask is black the result's latent is the picture's own."""
    pixels = np.random.default_rng(3).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    name = host.upload(Image.fromarray(pixels), "inpaint.png")
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[:, 64:] = 255
    mask_name = host.upload(Image.fromarray(mask), "inpaint_mask.png")
    graph = edit_workflow(name, latent=["masked", 0], seed=11, steps=3)
    reference = {
        "conditioning": ["prompt", 0], "vae": ["vae", 0], "image": ["load", 0], "fit": "stretch", "padding": "mirror",
        "convention": "offset", "width": 0, "height": 0,
    }  # fmt: skip
    words = {"clip": ["clip", 0], "text": "", "guidance": 2.5, "text_length": 0}
    graph |= {
        "prompt": {"class_type": "KontextPrompt", "inputs": words},
        "reference": {"class_type": "KontextReference", "inputs": reference},
        "mask": {"class_type": "LoadImageMask", "inputs": {"image": mask_name, "channel": "red"}},
        "masked": {
            "class_type": "SetLatentNoiseMask",
            "inputs": {"samples": ["reference", 1], "mask": ["mask", 0]},
        },
        "before": {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["reference", 1], "filename_prefix": "before"},
        },
        "after": {"class_type": "SaveLatent", "inputs": {"samples": ["edit", 1], "filename_prefix": "after"}},
    }
    outputs = host.run(graph).history["outputs"]
    before, after = (
        load_file(host.server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
        for file in (outputs[key]["latents"][0] for key in ("before", "after"))
    )
    assert before.shape == after.shape == (1, 16, 16, 16)
    change = (after - before).abs().mean((0, 1))
    # kept up to the scaling in and out of the model, in float32
    assert change[:, :8].max() < 1e-5 * before.std()
    assert change[:, 8:].min() > 0.01 * before.std()
