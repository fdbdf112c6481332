"""Kontext Edit in a real ComfyUI, on random weights of kontext-tiny's sizes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def picture(host) -> str:
    """A picture whose sides are no multiples of 16, in an aspect ratio of its own."""
    pixels = np.random.default_rng(0).integers(0, 255, (101, 143, 3), dtype=np.uint8)
    return host.upload(Image.fromarray(pixels), "odd.png")


def test_an_edit_comes_back_at_the_pictures_own_size(host, tiny, edit_workflow, picture):
    run = host.run(edit_workflow(picture))
    assert [image.size for image in host.pictures(run)] == [(143, 101)]


def test_progress_and_previews_come_while_it_samples(host, tiny, edit_workflow, picture):
    run = host.run(edit_workflow(picture, steps=3, seed=2))
    steps = [event["value"] for event in run.of("progress") if event["node"] == "edit"]
    assert [step for step in steps if step <= 3][-3:] == [1, 2, 3]
    assert len(run.previews) == 3
    assert Image.open(io.BytesIO(run.previews[0])).size[0] > 0


def test_the_same_seed_gives_the_same_bytes(host, tiny, edit_workflow, picture):
    first = host.pictures(host.run(edit_workflow(picture, seed=5)))[0]
    host.run(edit_workflow(picture, seed=6))  # so that the next is not answered from the cache
    host.client.post("/free", {"unload_models": True, "free_memory": True})
    second = host.pictures(host.run(edit_workflow(picture, seed=5)))[0]
    assert first.tobytes() == second.tobytes()
