"""Our nodes and the host's in one graph: prompts, references, the way back, sizes, batches, latents, masks."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


def link(node: str, output: int = 0) -> list:
    return [node, output]


@pytest.fixture(scope="module")
def picture(host) -> str:
    pixels = np.random.default_rng(2).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    return host.upload(Image.fromarray(pixels), "graph.png")


@pytest.fixture
def graph(loader_nodes, picture):
    """Kontext Prompt, Reference and Restore around the host's KSampler."""

    def build(fit: str = "stretch", **reference) -> dict:
        settings = {"fit": fit, "padding": "mirror", "convention": "offset", "width": 0, "height": 0}
        return {
            **loader_nodes,
            "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
            "prompt": {"class_type": "KontextPrompt", "inputs": {
                "clip": link("clip"), "text": "make it red", "guidance": 2.5, "text_length": 0,
            }},
            "reference": {"class_type": "KontextReference", "inputs": {
                "conditioning": link("prompt"), "vae": link("vae"), "image": link("load"), **settings, **reference,
            }},
            "sample": {"class_type": "KSampler", "inputs": {
                "model": link("model"), "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler",
                "scheduler": "simple", "positive": link("reference"), "negative": link("prompt"),
                "latent_image": link("reference", 1), "denoise": 1.0,
            }},
            "decode": {"class_type": "VAEDecode", "inputs": {"samples": link("sample"), "vae": link("vae")}},
            "restore": {"class_type": "KontextRestore", "inputs": {
                "image": link("decode"), "geometry": link("reference", 2), "original": link("load"),
            }},
            "save": {"class_type": "SaveImage", "inputs": {"images": link("restore"), "filename_prefix": "graph"}},
        }  # fmt: skip

    return build


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad", "keep"])
def test_every_fit_comes_back_at_the_pictures_size(host, graph, fit):
    (image,) = host.pictures(host.run(graph(fit)))
    assert image.size == (150, 90)


def test_a_reference_is_fitted_to_the_size_that_is_asked_for(host, graph):
    nodes = graph("pad", padding="#ff0000", width=160, height=64)
    nodes["save"]["inputs"]["images"] = link("reference", 3)
    (image,) = host.pictures(host.run(nodes))
    assert image.size == (160, 64)
    assert image.getpixel((0, 30)) == (255, 0, 0)


def test_references_chain_and_their_convention_matters(host, graph, picture):
    results = []
    for convention in ("offset", "index", "uxo"):
        nodes = graph()
        nodes["second"] = {"class_type": "KontextReference", "inputs": {
            **nodes["reference"]["inputs"], "conditioning": link("reference"), "convention": convention,
        }}  # fmt: skip
        nodes["sample"]["inputs"]["positive"] = link("second")
        results.append(host.pictures(host.run(nodes))[0].tobytes())
    assert len(set(results)) == 3


def test_edit_gives_what_the_separate_nodes_give(host, graph, edit_workflow, picture):
    nodes = graph()
    nodes["sigmas"] = {"class_type": "KontextSchedule", "inputs": {
        "steps": 2, "shift": "resolution", "mu": 1.15, "denoise": 1.0, "width": 16, "height": 16,
        "latent": link("reference", 1),
    }}  # fmt: skip
    nodes["sampler"] = {"class_type": "KontextSampler", "inputs": {"sampler": "euler"}}
    nodes["sample"] = {"class_type": "SamplerCustom", "inputs": {
        "model": link("model"), "add_noise": True, "noise_seed": 9, "cfg": 1.0, "positive": link("reference"),
        "negative": link("prompt"), "sampler": link("sampler"), "sigmas": link("sigmas"),
        "latent_image": link("reference", 1),
    }}  # fmt: skip
    apart = host.pictures(host.run(nodes))[0]
    together = host.pictures(host.run(edit_workflow(picture, seed=9)))[0]
    # 8-bit levels: the two start from zeros and from the picture's latent times zero.
    assert np.abs(np.asarray(apart, int) - np.asarray(together, int)).max() <= 1


def test_words_alone_make_a_picture_of_the_models_size_or_the_one_asked_for(host, edit_workflow):
    (image,) = host.pictures(host.run(edit_workflow()))
    assert image.size == (128, 128)
    (image,) = host.pictures(host.run(edit_workflow(width=96, height=160)))
    assert image.size == (96, 160)


def test_picture_i_of_a_batch_is_what_seed_plus_i_gives_alone(host, edit_workflow, picture):
    batch = host.pictures(host.run(edit_workflow(picture, seed=20, batch_size=3)))
    assert len(batch) == 3
    alone = host.pictures(host.run(edit_workflow(picture, seed=22)))[0]
    # A batch is computed by other kernels than a single picture: rounding, below one 8-bit level.
    assert np.abs(np.asarray(batch[2], int) - np.asarray(alone, int)).max() <= 1


def test_a_batch_of_pictures_gives_an_edit_of_each(host, edit_workflow, picture):
    nodes = edit_workflow(picture)
    nodes["inverted"] = {"class_type": "ImageInvert", "inputs": {"image": link("load")}}
    nodes["both"] = {
        "class_type": "ImageBatch",
        "inputs": {"image1": link("load"), "image2": link("inverted")},
    }
    nodes["edit"]["inputs"]["image"] = link("both")
    images = host.pictures(host.run(nodes))
    assert [image.size for image in images] == [(150, 90)] * 2
    assert images[0].tobytes() != images[1].tobytes()


def test_an_edits_latent_is_edited_on_without_decoding(host, edit_workflow, picture):
    nodes = edit_workflow(picture)
    nodes["again"] = {"class_type": "KontextEdit", "inputs": {
        **nodes["edit"]["inputs"], "latent": link("edit", 1), "prompt": "add a hat",
    }}  # fmt: skip
    nodes["save"]["inputs"]["images"] = link("again")
    (image,) = host.pictures(host.run(nodes))
    assert image.size == (150, 90)


def test_a_latents_noise_mask_keeps_what_it_covers(host, edit_workflow, picture):
    nodes = edit_workflow(picture)
    keep = {"class_type": "KontextReference", "inputs": {
        "conditioning": link("prompt"), "vae": link("vae"), "image": link("load"), "fit": "stretch",
        "padding": "mirror", "convention": "offset", "width": 0, "height": 0,
    }}  # fmt: skip
    nodes["prompt"] = {"class_type": "KontextPrompt", "inputs": {
        "clip": link("clip"), "text": "", "guidance": 2.5, "text_length": 0,
    }}  # fmt: skip
    nodes["encoded"] = keep
    nodes["nowhere"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 160, "height": 96}}
    nodes["masked"] = {"class_type": "SetLatentNoiseMask", "inputs": {
        "samples": link("encoded", 1), "mask": link("nowhere"),
    }}  # fmt: skip
    nodes["edit"]["inputs"]["latent"] = link("masked")
    nodes["plain"] = {
        "class_type": "VAEDecode",
        "inputs": {"samples": link("encoded", 1), "vae": link("vae")},
    }
    nodes["back"] = {"class_type": "KontextRestore", "inputs": {
        "image": link("plain"), "geometry": link("encoded", 2), "original": link("load"),
    }}  # fmt: skip
    nodes["save plain"] = {
        "class_type": "SaveImage",
        "inputs": {"images": link("back"), "filename_prefix": "plain"},
    }
    edited, plain = host.pictures(host.run(nodes))
    assert np.abs(np.asarray(edited, int) - np.asarray(plain, int)).max() <= 1


def test_transparency_survives(host, graph):
    pixels = np.random.default_rng(3).integers(0, 255, (48, 64, 4), dtype=np.uint8)
    name = host.upload(Image.fromarray(pixels), "alpha.png")
    nodes = graph()
    nodes["load"]["inputs"]["image"] = name
    # LoadImage gives colours and a mask apart; joined they are an IMAGE with four channels.
    nodes["joined"] = {
        "class_type": "JoinImageWithAlpha",
        "inputs": {"image": link("load"), "alpha": link("load", 1)},
    }
    for key, socket in (("reference", "image"), ("restore", "original")):
        nodes[key]["inputs"][socket] = link("joined")
    (image,) = host.pictures(host.run(nodes))
    assert image.mode == "RGBA" and image.size == (64, 48)
    assert np.abs(np.asarray(image, int)[..., 3] - pixels[..., 3]).max() <= 1


def test_an_empty_prompt_works(host, edit_workflow, picture):
    assert host.pictures(host.run(edit_workflow(picture, prompt="")))


def test_unknown_words_and_cut_text_are_shown_on_the_node_and_do_no_harm(host, edit_workflow, picture):
    run = host.run(edit_workflow(picture, prompt="把它变红 " + "make it red " * 40))
    (shown,) = [event["output"]["text"][0] for event in run.of("executed") if event["node"] == "edit"]
    assert "把它变红" in shown and "does not know" in shown
    assert "cut off and not read" in shown and "make it red" in shown


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "few_step"])
def test_every_sampler_runs(host, edit_workflow, picture, sampler):
    assert host.pictures(host.run(edit_workflow(picture, sampler=sampler, steps=3)))


def test_bfl_parity_runs(host, edit_workflow, picture):
    plain = host.pictures(host.run(edit_workflow(picture)))[0]
    parity = host.pictures(host.run(edit_workflow(picture, bfl_parity=True, fit="crop")))[0]
    assert parity.size == plain.size and parity.tobytes() != plain.tobytes()
