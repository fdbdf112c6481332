"""What the host knows of our nodes: names, tooltips, help pages, the front end's files; and how long it takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

NODES = (
    "KontextLoadModel",
    "KontextLoadTextEncoders",
    "KontextLoadVAE",
    "KontextPrompt",
    "KontextReference",
    "KontextSchedule",
    "KontextSampler",
    "KontextEdit",
    "KontextRestore",
)


@pytest.fixture(scope="module")
def nodes(host) -> dict:
    """The host's description of every node of this pack."""
    return {
        name: node for name, node in host.client.get("/object_info").items() if name.startswith("Kontext")
    }


def test_the_host_has_every_node(nodes):
    assert set(NODES) <= set(nodes)


def test_every_input_and_output_has_a_tooltip(nodes):
    for name, node in nodes.items():
        for kind in ("required", "optional"):
            for key, entry in node["input"].get(kind, {}).items():
                assert len(entry) > 1 and entry[1].get("tooltip"), f"{name}.{key}"
        assert all(node["output_tooltips"]), name


def test_every_node_has_a_description_and_a_help_page(host, nodes):
    extension = "/extensions/flux-kontext/docs"
    for name, node in nodes.items():
        assert node["description"] and node["category"].startswith("Kontext"), name
        page = host.client.request(f"{extension}/{name}.md").decode()
        assert page.startswith(f"# {node['display_name']}\n"), name


def test_a_help_page_names_every_widget(host, nodes):
    for name, node in nodes.items():
        page = host.client.request(f"/extensions/flux-kontext/docs/{name}.md").decode()
        for kind in ("required", "optional"):
            for key in node["input"].get(kind, {}):
                numbered = key.rstrip("0123456789") != key  # image_2 … image_4 stand together
                assert key in page or numbered, f"{name}.{key}"


def test_only_native_types_and_the_geometry_go_in_and_out(nodes):
    native = {
        "MODEL",
        "CLIP",
        "VAE",
        "CONDITIONING",
        "LATENT",
        "SIGMAS",
        "SAMPLER",
        "IMAGE",
        "MASK",
        "STRING",
        "INT",
        "FLOAT",
        "BOOLEAN",
        "COMBO",
    }
    for name, node in nodes.items():
        assert set(node["output"]) <= native | {"KONTEXT_GEOMETRY"}, name


def test_the_pack_loads_in_under_half_a_second_of_work_beyond_the_host(inside):
    """Measured in processor time, in a process that has imported torch and ComfyUI, as the host has by then."""
    times = inside("load_time")
    assert times["nodes"] >= len(NODES)
    assert times["seconds"] < 0.5


def test_a_saved_picture_tells_no_path_of_its_machine(host):
    prompt = json.loads((ROOT / "workflows" / "api" / "text_to_image.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    (picture, *_) = host.pictures(host.run(prompt))
    kept = {key: value for key, value in picture.info.items() if isinstance(value, str)}
    assert "class_type" in kept["prompt"]
    for key, value in kept.items():
        assert str(ROOT) not in value and str(host.server.base) not in value, key


def test_the_comparison_names_only_nodes_that_the_host_or_this_pack_has(host, nodes):
    """Code words of the tables that look like a node's id, and every "Kontext …" of the pack's column by its title."""
    known = set(host.client.get("/object_info"))
    titles = {node["display_name"] for node in nodes.values()}
    for path in (ROOT / "README.md", ROOT / "docs" / "comparison.md"):
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) != 4 or not line.startswith("|"):
                continue
            for name in re.findall(r"`([A-Z]\w*[a-z][A-Z]\w*)`", cells[1]):
                assert name in known, f"{path.name}: this host has no {name}"
            for title in re.findall(r"Kontext [A-Z]\w+(?: [A-Z]\w+)?", cells[3]):
                assert title in titles or title.rsplit(" ", 1)[0] in titles, f"{path.name}: no node {title!r}"


def test_the_hosts_own_composite_keeps_the_originals_pixels_as_the_comparison_says(host):
    """Wired by hand, and with nothing that moves the edit back or takes its tint off."""
    for path in (ROOT / "README.md", ROOT / "docs" / "comparison.md"):
        (row,) = [
            line for line in path.read_text(encoding="utf-8").splitlines() if "pixels outside a mask" in line
        ]
        native = row.strip("|").split("|")[1]
        assert "`ImageCompositeMasked`, by wiring" in native and "alignment" in native and "tint" in native
    random = np.random.default_rng(0)
    original, edited = (random.integers(0, 256, (40, 56, 3), dtype=np.uint8) for _ in range(2))
    mask = np.zeros((40, 56, 3), np.uint8)
    mask[10:20, 10:30] = 255
    graph = {}
    for name, pixels in (("original", original), ("edited", edited)):
        uploaded = host.upload(Image.fromarray(pixels), f"composite_{name}.png")
        graph[name] = {"class_type": "LoadImage", "inputs": {"image": uploaded}}
    uploaded = host.upload(Image.fromarray(mask), "composite_mask.png")
    graph["mask"] = {"class_type": "LoadImageMask", "inputs": {"image": uploaded, "channel": "red"}}
    inputs = {
        "destination": ["original", 0], "source": ["edited", 0], "mask": ["mask", 0], "x": 0, "y": 0,
        "resize_source": False,
    }  # fmt: skip
    graph["composite"] = {"class_type": "ImageCompositeMasked", "inputs": inputs}
    saved = {"images": ["composite", 0], "filename_prefix": "composite"}
    graph["save"] = {"class_type": "SaveImage", "inputs": saved}
    (result,) = host.pictures(host.run(graph))
    inside = mask[..., :1] > 0
    assert np.array_equal(np.asarray(result), np.where(inside, edited, original))
