"""Many prompts in a row through the API: none fails, memory stays where it was, a seed's bytes stay the same.

And a cancel in each phase of a graph, after which the next prompt gives what it would have given.
"""

from __future__ import annotations

import hashlib

import numpy as np
import psutil
import pytest
from PIL import Image

from kontext_core.presets import KONTEXT_TINY

SEEDS = 5  # taken in turn, so that no prompt is answered from the host's cache of the last one
WARM_UP = 10  # prompts until allocators and caches have what they keep
SIDE, BATCH = 256, 2
# What a prompt at these sizes makes, in bytes of float32: pictures, their latents, and 512 tokens of 192 numbers.
MADE = {
    "pictures": BATCH * SIDE * SIDE * 3 * 4,
    "latents": BATCH * 16 * (SIDE // 8) ** 2 * 4,
    "conditioning": 512 * KONTEXT_TINY.t5.d_model * 4,
}
SLACK = 12 * 2**20  # what allocators give and take from run to run was measured below 10 MB


@pytest.fixture(scope="module")
def picture(host) -> str:
    pixels = np.random.default_rng(8).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    return host.upload(Image.fromarray(pixels), "soak.png")


def soak(host, edit_workflow, picture: str, count: int) -> None:
    process = psutil.Process(host.server.process.pid)
    seen: dict[int, str] = {}
    memory = []
    for number in range(count):
        seed = number % SEEDS
        workflow = edit_workflow(
            picture, seed=1000 + seed, width=SIDE, height=SIDE, batch_size=BATCH, bfl_parity=True, steps=1
        )
        results = host.pictures(host.run(workflow))
        assert len(results) == BATCH
        digest = hashlib.sha256(b"".join(result.tobytes() for result in results)).hexdigest()
        assert seen.setdefault(seed, digest) == digest, f"prompt {number}: seed {seed} gave another picture"
        memory.append(process.memory_info().rss)
    assert len(set(seen.values())) == SEEDS
    growth = min(memory[-SEEDS:]) - min(memory[WARM_UP : WARM_UP + SEEDS])
    print(f"{count} prompts: grown by {growth / 2**20:.1f} MB")
    assert growth < SLACK, f"{count} prompts: grown by {growth / 2**20:.0f} MB"
    assert host.client.get("/queue") == {"queue_running": [], "queue_pending": []}


def test_two_hundred_prompts_are_enough_to_see_one_leaked_tensor_a_prompt():
    """Of each kind: what 200 - WARM_UP - SEEDS prompts would leak is more than the slack, the smallest kind too."""
    assert min(MADE.values()) * (200 - WARM_UP - SEEDS) > 1.9 * SLACK


def test_twenty_prompts_in_a_row(host, edit_workflow, picture):
    soak(host, edit_workflow, picture, 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_prompts_in_a_row(host, edit_workflow, picture):
    soak(host, edit_workflow, picture, 200)


def phases(loader_nodes: dict, picture: str, seed: int, steps: int = 3) -> dict:
    """Loading, words, reference, sampling, decoding and saving as nodes of their own, in this order."""
    return {
        **loader_nodes,
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "prompt": {"class_type": "KontextPrompt", "inputs": {
            "clip": ["clip", 0], "text": f"make it red {seed}", "guidance": 2.5, "text_length": 0,
        }},
        "reference": {"class_type": "KontextReference", "inputs": {
            "conditioning": ["prompt", 0], "vae": ["vae", 0], "image": ["load", 0], "fit": "stretch",
            "padding": "mirror", "convention": "offset", "width": 0, "height": 0,
        }},
        "sample": {"class_type": "KSampler", "inputs": {
            "model": ["model", 0], "seed": seed, "steps": steps, "cfg": 1.0, "sampler_name": "euler",
            "scheduler": "simple", "positive": ["reference", 0], "negative": ["prompt", 0],
            "latent_image": ["reference", 1], "denoise": 1.0,
        }},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["vae", 0]}},
        "restore": {"class_type": "KontextRestore", "inputs": {
            "image": ["decode", 0], "geometry": ["reference", 2], "original": ["load", 0],
        }},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["restore", 0], "filename_prefix": "soak"}},
    }  # fmt: skip


def forget(host, picture: str) -> None:
    """Have the server drop its cached results, so that every node runs anew.

    It looks at such a request between prompts only, and takes a waiting prompt first: hence one in between.
    """
    host.client.post("/free", {"unload_models": True, "free_memory": True})
    host.run({
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["load", 0]}},
    })  # fmt: skip


@pytest.mark.parametrize("phase", ["model", "clip", "vae", "prompt", "reference", "sample", "decode"])
def test_a_cancel_in_any_phase_leaves_the_server_well(host, loader_nodes, picture, phase):
    def cancel(kind: str, data: dict) -> None:
        if kind == "executing" and data.get("node") == phase:
            host.client.interrupt()

    expected = host.pictures(host.run(phases(loader_nodes, picture, seed=7)))[0]
    forget(host, picture)
    with pytest.raises(Exception, match="interrupted in node"):
        host.run(phases(loader_nodes, picture, seed=8, steps=50), cancel)
    assert host.client.get("/queue") == {"queue_running": [], "queue_pending": []}
    again = host.pictures(host.run(phases(loader_nodes, picture, seed=7)))[0]
    assert again.tobytes() == expected.tobytes()


@pytest.mark.parametrize("phase", ["restore", "save"])
def test_a_cancel_while_the_result_is_finished_leaves_the_server_well(host, loader_nodes, picture, phase):
    """These phases take milliseconds: a cancel may come when they are over, and the prompt then ends as it would."""
    asked = []

    def cancel(kind: str, data: dict) -> None:
        if kind == "executing" and data.get("node") == phase:
            host.client.interrupt()
            asked.append(phase)

    expected = host.pictures(host.run(phases(loader_nodes, picture, seed=7)))[0]
    forget(host, picture)
    try:
        host.run(phases(loader_nodes, picture, seed=9), cancel)
    except Exception as error:
        assert "interrupted in node" in str(error)
    assert asked == [phase]
    assert host.client.get("/queue") == {"queue_running": [], "queue_pending": []}
    again = host.pictures(host.run(phases(loader_nodes, picture, seed=7)))[0]
    assert again.tobytes() == expected.tobytes()
