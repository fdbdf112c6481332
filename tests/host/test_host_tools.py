"""Kontext Preset, Preserve, Turns and Drift in a real ComfyUI, on random weights of kontext-tiny's sizes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from drift_words import is_report
from PIL import Image


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """A smooth picture with a box in it, of an odd size."""
    y, x = np.mgrid[0:101, 0:143]
    pixels = np.stack([x * 255 / 143, y * 255 / 101, (x + y) * 255 / 244], 2).astype(np.uint8)
    pixels[20:40, 90:120] = (250, 240, 40)
    return pixels


@pytest.fixture(scope="module")
def picture(host, pixels) -> str:
    return host.upload(Image.fromarray(pixels), "tools.png")


def load(image: str) -> dict:
    return {"class_type": "LoadImage", "inputs": {"image": image}}


def save(source: list) -> dict:
    return {"class_type": "SaveImage", "inputs": {"images": source, "filename_prefix": "tools"}}


def text_of(run, node: str) -> str:
    """What a node showed under itself."""
    return run.history["outputs"][node]["text"][0]


def preset(**inputs) -> dict:
    values = {"preset": "relight", "subject": "", "change": "", "detail": "", "old_text": "", "new_text": ""}
    values |= {"instruction": "", "keep": "", **inputs}
    return {
        "preset": {"class_type": "KontextPreset", "inputs": values},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["preset", 0]}},
        "hints": {"class_type": "PreviewAny", "inputs": {"source": ["preset", 1]}},
    }


def test_a_preset_is_plain_text_with_the_words_in_place(host):
    run = host.run(preset(preset="replace_text", old_text="joy", new_text="BFL"))
    assert text_of(run, "show").startswith("Replace 'joy' with 'BFL', while keeping the same font")
    assert text_of(run, "hints") == ""
    run = host.run(
        preset(preset="add_text", new_text="“DON'T”", change="on the door", detail="red neon letters")
    )
    assert text_of(run, "show").startswith('Add the text "DON\'T" on the door in red neon letters')


def test_custom_instructions_are_checked_and_empty_words_refused(host):
    run = host.run(preset(preset="custom", instruction="Make her hair red.", keep="the face"))
    assert text_of(run, "show") == "Make her hair red, while keeping the face exactly the same"
    assert "“her”: name what is meant" in text_of(run, "hints")
    assert "replace_text needs new_text" in host.error(preset(preset="replace_text", old_text="joy"))


def preserve(original: str, edited: str, mask: str | None = None, **inputs) -> dict:
    values = {"feather": 4, "grow": 4, "sensitivity": 1.0, "align": True, "match_color": True}
    workflow = {
        "original": load(original),
        "edited": load(edited),
        "preserve": {
            "class_type": "KontextPreserve",
            "inputs": {"original": ["original", 0], "edited": ["edited", 0], **values, **inputs},
        },
        "save": save(["preserve", 0]),
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["preserve", 2]}},
    }
    if mask is not None:
        workflow["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": mask, "channel": "red"}}
        workflow["preserve"]["inputs"]["mask"] = ["mask", 0]
    return workflow


def test_preserve_returns_every_byte_outside_the_mask(host, picture, pixels):
    noise = np.random.default_rng(0).normal(0, 2, pixels.shape)
    edit = (pixels * 0.95 + 8 + noise).clip(0, 255)
    edit[60:85, 20:60] = (200, 30, 30)
    edited = host.upload(Image.fromarray(edit.astype(np.uint8)), "tools_edit.png")
    mask = np.zeros(pixels.shape, np.uint8)
    mask[55:90, 15:65] = 255
    given = host.upload(Image.fromarray(mask), "tools_mask.png")
    for workflow in (preserve(picture, edited, given), preserve(picture, edited)):
        run = host.run(workflow)
        result = np.asarray(host.pictures(run)[0])
        changed = (result != pixels).any(2)
        assert changed[62:83, 22:58].all()
        assert not changed[:50].any() and not changed[:, 75:].any()
        assert "gain (0.9" in text_of(run, "report")
    small = host.upload(Image.fromarray(pixels[:64, :64]), "tools_small.png")
    assert "bring the edit back to the original's size" in host.error(preserve(picture, small))


@pytest.fixture
def turns(edit_workflow, picture):
    """A workflow of Kontext Turns over the session's random weights."""

    def make(instructions: str, **inputs) -> dict:
        loaders = {name: node for name, node in edit_workflow().items() if name in ("model", "clip", "vae")}
        values = {"seed": 3, "steps": 2, "guidance": 2.5, "few_step": "off", "chain": "latents", "turn": 0}
        values |= {"fit": "stretch", "padding": "mirror", "instructions": instructions, "image": ["load", 0]}
        return {
            **loaders,
            "load": load(picture),
            "turns": {
                "class_type": "KontextTurns",
                "inputs": {**{name: [name, 0] for name in loaders}, **values, **inputs},
            },
            "save": save(["turns", 0]),
            "chosen": save(["turns", 1]),
            "drawing": save(["turns", 3]),
            "report": {"class_type": "PreviewAny", "inputs": {"source": ["turns", 4]}},
        }

    return make


def steps_run(run) -> int:
    """Sampling steps that were computed, not answered from the cache."""
    return sum(1 for event in run.of("progress") if event.get("max") == 2)


def test_turns_give_every_picture_the_chosen_one_and_the_drift(host, turns):
    text = "make it red\nadd a star\nfrom 1: add a moon\nredo 2 [seed 77]"
    run = host.run(turns(text, turn=2))
    pictures = host.pictures(run)
    drawing = next(p for p in pictures if p.size[0] == 960)
    images = [p for p in pictures if p.size == (143, 101)]
    assert len(images) == 5 and drawing.size[1] > 400
    report = text_of(run, "report")
    assert is_report(report, "make it red", "add a star", "add a moon", "add a star"), report
    distinct = {p.tobytes() for p in images}
    assert len(distinct) == 4


def test_a_line_may_have_steps_and_guidance_of_its_own(host, turns):
    run = host.run(turns("one\ntwo [steps 3] [guidance 4]", seed=51))
    steps = {event["max"] for event in run.of("progress") if event["node"].startswith("turns.")}
    assert {2, 3} <= steps
    other = host.run(turns("one\ntwo [steps 3] [guidance 5]", seed=51))
    first, second = (
        {picture.tobytes() for picture in host.pictures(made) if picture.size == (143, 101)}
        for made in (run, other)
    )
    assert len(first & second) == 1 and len(first | second) == 3  # the first turn is the same


def test_only_turns_that_depend_on_a_change_are_made_again(host, turns):
    first = host.run(turns("one\ntwo\nthree", seed=11))
    again = host.run(turns("one\ntwo\nfour", seed=11))
    assert steps_run(first) == 3 * steps_run(again) > 0
    branched = host.run(turns("one\ntwo\nfour\nfrom 1: five", seed=11))
    assert steps_run(branched) == steps_run(again)


def test_latents_and_pictures_are_chained_differently(host, turns):
    text = "make it red\nadd a star"
    results = []
    for chain in ("latents", "pictures"):
        pictures = host.pictures(host.run(turns(text, chain=chain, seed=21)))
        results.append([p.tobytes() for p in pictures if p.size == (143, 101)])
    # The first turn is the same edit, the second goes on from what the first hands on.
    assert set(results[0]) & set(results[1]) and set(results[0]) != set(results[1])


def test_lines_that_make_no_session_are_refused_before_anything_runs(host, turns):
    for text, words in (("", "write one a line"), ("one\nfrom 5: two", "there is no turn 5")):
        assert words in host.error(turns(text))
    assert "turn is 3, and there are 2 instructions" in host.error(turns("one\ntwo", turn=3))


def test_drift_of_any_batch_is_measured(host, picture):
    workflow = {
        "load": load(picture),
        "batch": {"class_type": "ImageBatch", "inputs": {"image1": ["load", 0], "image2": ["load", 0]}},
        "drift": {
            "class_type": "KontextDrift",
            "inputs": {"original": ["load", 0], "turns": ["batch", 0], "instructions": ""},
        },
        "save": save(["drift", 0]),
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["drift", 1]}},
    }
    run = host.run(workflow)
    assert "2. Turn 2: PSNR inf dB, SSIM 1.000 outside the 0% edited" in text_of(run, "report")
    workflow["drift"]["inputs"]["instructions"] = "only one"
    assert "there are 1 instructions for 2 pictures" in host.error(workflow)


def drift_lines(host, graph: dict) -> list[str]:
    return text_of(host.run(graph), "report").splitlines()


def similarities(lines: list[str]) -> list[float]:
    return [float(re.search(r"similarity (-?[\d.]+)", line).group(1)) for line in lines]


def test_a_vision_model_adds_the_similarity_of_embeddings_to_drift(host, picture, pixels):
    """1 for the picture itself, less for another; of random weights, so that only the order of them means anything."""
    shifted = host.upload(Image.fromarray(np.roll(pixels, 3, 1)), "tools_shifted.png")
    noise = np.random.default_rng(5).integers(0, 255, pixels.shape, dtype=np.uint8)
    other = host.upload(Image.fromarray(noise), "tools_noise.png")
    graph = {
        "load": load(picture), "shifted": load(shifted), "other": load(other),
        "two": {"class_type": "ImageBatch", "inputs": {"image1": ["load", 0], "image2": ["shifted", 0]}},
        "three": {"class_type": "ImageBatch", "inputs": {"image1": ["two", 0], "image2": ["other", 0]}},
        "vision": {"class_type": "CLIPVisionLoader", "inputs": {"clip_name": "random_vision.safetensors"}},
        "drift": {"class_type": "KontextDrift", "inputs": {
            "original": ["load", 0], "turns": ["three", 0], "instructions": "", "clip_vision": ["vision", 0],
        }},
        "save": save(["drift", 0]),
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["drift", 1]}},
    }  # fmt: skip
    same, near, far = similarities(drift_lines(host, graph))
    assert same == 1.0 > near > far
    del graph["drift"]["inputs"]["clip_vision"]
    assert not any("similarity" in line for line in drift_lines(host, graph))


def test_turns_hand_the_vision_model_on_to_their_drift(host, turns):
    graph = turns("make it red\nadd a star", clip_vision=["vision", 0], seed=31)
    graph["vision"] = {"class_type": "CLIPVisionLoader", "inputs": {"clip_name": "random_vision.safetensors"}}
    found = similarities(drift_lines(host, graph))
    assert len(found) == 2 and all(-1 <= value < 1 for value in found)
