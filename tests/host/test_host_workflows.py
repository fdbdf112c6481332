"""The example workflows: both forms are the same graph, and every one runs.

The UI form is converted by what the host says of its nodes, independently of the front end: widgets take their
values by position, links theirs by number.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
DISPLAY_ONLY = {"MarkdownNote", "Note"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def is_widget(entry: list) -> bool:
    socket = len(entry) > 1 and entry[1].get("forceInput")
    return not socket and (isinstance(entry[0], list) or entry[0] in WIDGETS)


def convert(workflow: dict, info: dict) -> dict:
    """A UI-format workflow as API format."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    result = {}
    for node in workflow["nodes"]:
        if node["type"] in DISPLAY_ONLY:
            continue
        known = info[node["type"]]["input"]
        entries = {**known.get("required", {}), **known.get("optional", {})}
        values = iter(node.get("widgets_values") or [])
        inputs = {}
        for name, entry in entries.items():
            if not is_widget(entry):
                continue
            inputs[name] = next(values)
            if len(entry) > 1 and entry[1].get("control_after_generate"):
                assert next(values) in ("fixed", "randomize", "increment", "decrement")
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = sources[slot["link"]]
        result[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return result


@pytest.fixture(scope="module")
def info(host) -> dict:
    return host.client.get("/object_info")


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_graph(info, name):
    ui = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    plain = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in api.items()}
    assert convert(ui, info) == plain


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_explains_itself(name):
    """A note, titled groups and titled nodes, laid out from left to right, no two nodes over each other."""
    ui = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in ui["nodes"]}
    assert any(node["type"] in DISPLAY_ONLY for node in ui["nodes"])
    assert ui["groups"] and all(group["title"] for group in ui["groups"])
    assert all(node.get("title") for node in ui["nodes"])
    for link in ui["links"]:
        assert nodes[link[1]]["pos"][0] < nodes[link[3]]["pos"][0], link
    boxes = [(*node["pos"], *node["size"]) for node in ui["nodes"]]
    for index, (x, y, w, h) in enumerate(boxes):
        for other_x, other_y, other_w, other_h in boxes[:index]:
            apart = x >= other_x + other_w or other_x >= x + w or y >= other_y + other_h or other_y >= y + h
            assert apart, (boxes[index], (other_x, other_y))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_that_a_workflow_names_ship_with_it(name):
    api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in api.values():
        if node["class_type"] == "LoadImage":
            assert (WORKFLOWS / "input" / node["inputs"]["image"]).is_file()
        if node["class_type"] == "KontextLoadRecord":
            assert (WORKFLOWS / "input" / node["inputs"]["picture"]).is_file()


LOADERS = {
    "KontextLoadModel": ("model",),
    "KontextLoadTextEncoders": ("t5", "clip"),
    "KontextLoadVAE": ("vae",),
    "UNETLoader": ("unet_name",),
    "DualCLIPLoader": ("clip_name1", "clip_name2"),
    "VAELoader": ("vae_name",),
    "CLIPVisionLoader": ("clip_name",),
}
OF_REAL_FILES = {"mixed_native_loader", *(name for name in NAMES if name.endswith("_flux"))}


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_workflow_names_come_with_the_link_that_the_host_offers(name):
    """The front ends offer a link of a node's properties when its name is the value of one of the node's widgets."""
    ui = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    assert "models" not in ui, "these would be offered whichever model is chosen"
    chosen = set()
    for node in ui["nodes"]:
        links = {model["name"]: model for model in node["properties"].get("models", [])}
        for link in links.values():
            assert link["url"].startswith("https://huggingface.co/")
            assert link["url"].endswith("/" + link["name"]) and link["directory"]
        files = [value for value in node.get("widgets_values") or [] if str(value).endswith(".safetensors")]
        assert set(files) <= set(links), node["title"]
        chosen |= {node["type"] for _ in files}
        if node["type"] in LOADERS:
            assert links, node["title"]
    whole = {"KontextLoadModel", "KontextLoadTextEncoders", "KontextLoadVAE"}
    native = {"UNETLoader", "DualCLIPLoader", "VAELoader"}
    if name in OF_REAL_FILES:
        assert chosen in (whole, native)
    else:  # runs on what is bundled, and asks for nothing; a network that compares pictures is not
        assert chosen <= {"CLIPVisionLoader"}


@pytest.mark.parametrize("name", sorted(OF_REAL_FILES))
def test_a_workflow_of_real_files_is_the_graph_of_its_twin_on_the_bundled_model(name):
    """But for the loaders and what files are called; sockets of the same place are the same."""

    def plain(name: str) -> dict:
        api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
        nodes = {}
        for key, node in api.items():
            inputs = {k: v for k, v in node["inputs"].items() if k != "filename_prefix"}
            nodes[key] = "loader" if node["class_type"] in LOADERS else (node["class_type"], inputs)
        return nodes

    twin = name.removesuffix("_flux") if name.endswith("_flux") else f"{name}_tiny"
    assert twin in NAMES and plain(name) == plain(twin)


def test_every_node_of_the_pack_is_in_a_workflow(info):
    shown = set()
    for name in NAMES:
        api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
        shown |= {node["class_type"] for node in api.values()}
    ours = {name for name, node in info.items() if node.get("python_module", "").endswith("kontext")}
    ours |= {name for name in info if name.startswith("Kontext")}
    assert len(ours) > 20
    assert sorted(ours - shown) == []
