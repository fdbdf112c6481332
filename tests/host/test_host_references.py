"""Strength, mask, steps and place of single references in a real ComfyUI, through the host's own KSampler."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

SIZE = (96, 96)


@pytest.fixture(scope="module")
def pictures(host) -> tuple[str, str, str]:
    """Two pictures, and the first with another right half."""
    pixels = np.random.default_rng(4).integers(0, 255, (3, SIZE[1], SIZE[0], 3), dtype=np.uint8)
    mixed = pixels[0].copy()
    mixed[:, 48:] = pixels[2][:, 48:]
    arrays = {"first": pixels[0], "second": pixels[1], "mixed": mixed}
    return tuple(host.upload(Image.fromarray(array), f"ref_{name}.png") for name, array in arrays.items())


@pytest.fixture
def sample(host, loader_nodes):
    """Latent of a chain of references (picture, settings, mask) as bytes of the decoded picture."""

    def run(*references: tuple) -> bytes:
        graph = {**loader_nodes}
        graph["prompt"] = {
            "class_type": "KontextPrompt",
            "inputs": {"clip": ["clip", 0], "text": "red", "guidance": 2.5, "text_length": 0},
        }
        last = ["prompt", 0]
        for number, (name, settings, mask) in enumerate(references):
            graph[f"load{number}"] = {"class_type": "LoadImage", "inputs": {"image": name}}
            inputs = {
                "conditioning": last, "vae": ["vae", 0], "image": [f"load{number}", 0], "fit": "keep",
                "padding": "mirror", "convention": "offset", "width": 0, "height": 0, **settings,
            }  # fmt: skip
            if mask is not None:
                graph[f"mask{number}"] = {
                    "class_type": "LoadImageMask",
                    "inputs": {"image": mask, "channel": "red"},
                }
                inputs["mask"] = [f"mask{number}", 0]
            graph[f"ref{number}"] = {"class_type": "KontextReference", "inputs": inputs}
            last = [f"ref{number}", 0]
        graph["empty"] = {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": SIZE[0], "height": SIZE[1], "batch_size": 1},
        }
        graph["sample"] = {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0], "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler",
                "scheduler": "simple", "positive": last, "negative": ["prompt", 0], "latent_image": ["empty", 0],
                "denoise": 1.0,
            },
        }  # fmt: skip
        graph["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["vae", 0]}}
        graph["save"] = {
            "class_type": "SaveImage",
            "inputs": {"images": ["decode", 0], "filename_prefix": "ref"},
        }
        return host.pictures(host.run(graph))[0].tobytes()

    return run


def test_strength_works_and_none_is_as_if_it_were_not_there(sample, pictures):
    first, second, _ = pictures
    alone, both = sample((first, {}, None)), sample((first, {}, None), (second, {}, None))
    assert alone != both
    assert sample((first, {}, None), (second, {"strength": 0.0}, None)) == alone
    weak = sample((first, {}, None), (second, {"strength": 0.3}, None))
    assert weak not in (alone, both)


def test_a_reference_is_seen_in_its_part_of_the_steps_only(sample, pictures):
    first, second, _ = pictures
    both, alone = sample((first, {}, None), (second, {}, None)), sample((first, {}, None))
    early = sample((first, {}, None), (second, {"end": 0.5}, None))
    late = sample((first, {}, None), (second, {"start": 0.5}, None))
    assert len({both, alone, early, late}) == 4
    assert (
        sample((first, {}, None), (second, {"start": 0.9}, None)) == alone
    )  # after the last of two steps began


def test_what_the_mask_hides_has_no_say_beyond_the_autoencoders_reach(host, sample, pictures):
    """The hidden half differs: its tokens are not seen, and the seen half's differ only near the border."""
    first, _, mixed = pictures
    mask = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    mask[:, :16] = 255
    name = host.upload(Image.fromarray(mask), "ref_mask.png")

    def far(a: bytes, b: bytes) -> float:
        return float(np.abs(np.frombuffer(a, np.uint8).astype(int) - np.frombuffer(b, np.uint8)).mean())

    seen = far(sample((first, {}, None)), sample((mixed, {}, None)))
    hidden = far(sample((first, {}, name)), sample((mixed, {}, name)))
    assert hidden < 0.5 * seen


def test_conventions_may_be_mixed_and_settings_of_the_hook_reach_a_hidden_first_reference(sample, pictures):
    first, second, _ = pictures
    same = sample((first, {}, None), (second, {}, None))
    mixed = sample((first, {}, None), (second, {"convention": "uxo"}, None))
    both = sample((first, {"convention": "uxo"}, None), (second, {"convention": "uxo"}, None))
    assert len({same, mixed, both}) == 3
    hidden = sample((first, {"strength": 0.0}, None), (second, {}, None))
    assert hidden not in (same, sample((second, {}, None)))  # the second keeps the place that it had


def test_impossible_settings_are_said_in_a_sentence(host, sample, pictures):
    first, second, _ = pictures
    with pytest.raises(Exception, match="start must be below end"):
        sample((first, {"start": 0.6, "end": 0.4}, None))
    small = host.upload(Image.new("RGB", (32, 32), "white"), "ref_small.png")
    with pytest.raises(Exception, match="connect a mask of the picture's own size"):
        sample((first, {}, small))
    black = host.upload(Image.new("RGB", SIZE), "ref_black.png")
    with pytest.raises(Exception, match="the mask is black"):
        sample((first, {}, None), (second, {}, black))
