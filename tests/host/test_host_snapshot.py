"""Every released node and input is frozen: saved workflows store widgets by position and nodes by id.

To add: append an input or a node, then write the snapshot anew with KONTEXT_WRITE_SNAPSHOT=1. What is there may get a
new tooltip or further choices at the end of a list; it may not move, go, or change its type or its default.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
SNAPSHOT = TESTS / "snapshots" / "nodes.json"
SAVED = sorted((TESTS / "saved").glob("*/*.json"))
FILES = {
    "model",
    "t5",
    "clip",
    "vae",
    "lora",
    "picture",
    "embedder",
    "detector",
}  # lists of files: whatever lies in the folders


def shape(node: dict) -> dict:
    """What saved workflows depend on."""
    inputs = []
    for kind in ("required", "optional"):
        for name, entry in node["input"].get(kind, {}).items():
            options = entry[1] if len(entry) > 1 else {}
            choices = entry[0] if isinstance(entry[0], list) else options.get("options")
            found = {"name": name, "kind": kind, "type": "COMBO" if isinstance(entry[0], list) else entry[0]}
            if "default" in options:
                found["default"] = options["default"]
            if choices is not None and name not in FILES:
                found["options"] = choices
            if options.get("control_after_generate"):
                found["control_after_generate"] = True
            inputs.append(found)
    outputs = [list(pair) for pair in zip(node["output_name"], node["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs}


@pytest.fixture(scope="module")
def nodes(host) -> dict:
    found = host.client.get("/object_info")
    return {name: shape(node) for name, node in sorted(found.items()) if name.startswith("Kontext")}


def broken(old: dict, new: dict) -> list[str]:
    """What of a node's old shape its new one no longer has."""
    problems = []
    known_names = {item["name"] for item in old["inputs"]}
    for item in new["inputs"]:  # saved graphs do not give it, and as a widget it moves all optional ones
        if item["kind"] == "required" and item["name"] not in known_names:
            problems.append(f"input {item['name']} is new and required: append it as an optional one")
    for kind in ("required", "optional"):
        before = [item for item in old["inputs"] if item["kind"] == kind]
        after = [item for item in new["inputs"] if item["kind"] == kind]
        for index, item in enumerate(before):
            now = after[index] if index < len(after) else {}
            known = {**item}
            choices = known.pop("options", None)
            if {key: now.get(key) for key in known} != known:
                problems.append(f"input {item['name']} was {item} and is {now}")
            elif choices is not None and now.get("options", [])[: len(choices)] != choices:
                problems.append(f"choices of {item['name']} were {choices} and are {now.get('options')}")
    if new["outputs"][: len(old["outputs"])] != old["outputs"]:
        problems.append(f"outputs were {old['outputs']} and are {new['outputs']}")
    return problems


def test_no_node_input_or_output_of_a_release_has_changed(nodes):
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    problems = [f"{name} is gone" for name in snapshot if name not in nodes]
    for name, old in snapshot.items():
        problems += [f"{name}: {problem}" for problem in broken(old, nodes.get(name, old))]
    assert not problems, "\n".join(problems)
    if os.environ.get("KONTEXT_WRITE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(nodes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_the_snapshot_has_every_node_input_and_output(nodes):
    """What is not in it is not guarded: after an addition it is written anew with KONTEXT_WRITE_SNAPSHOT=1."""
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert sorted(set(nodes) - set(snapshot)) == []
    for name, node in nodes.items():
        kept = snapshot[name]
        assert [item["name"] for item in kept["inputs"]] == [item["name"] for item in node["inputs"]], name
        assert kept["outputs"] == node["outputs"], name


def test_what_the_snapshot_guards_against_is_found(nodes):
    old = nodes["KontextEdit"]
    swapped = {**old, "inputs": [old["inputs"][1], old["inputs"][0], *old["inputs"][2:]]}
    assert broken(old, swapped) and broken(old, {**old, "inputs": old["inputs"][:-1]})
    more = {"name": "more", "kind": "optional", "type": "INT", "default": 1}
    assert not broken(old, {**old, "inputs": [*old["inputs"], more]})
    # Between the required and the optional widgets it would take the place of the first optional one.
    schedule = nodes["KontextSchedule"]
    assert any(item["kind"] == "optional" and item["type"] == "COMBO" for item in schedule["inputs"])
    for node in (old, schedule):
        assert broken(node, {**node, "inputs": [*node["inputs"], {**more, "kind": "required"}]})
    first = [item for item in schedule["inputs"] if item["kind"] == "required"]
    rest = [item for item in schedule["inputs"] if item["kind"] == "optional"]
    assert broken(schedule, {**schedule, "inputs": [*first, more, *rest]})


@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_saved_workflow_still_fits_the_nodes(nodes, path):
    """Nodes, sockets and the number of stored widget values; test_host_workflows_run runs the same graphs."""
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        if not node["type"].startswith("Kontext"):
            continue
        now = nodes[node["type"]]
        names = {item["name"] for item in now["inputs"]}
        assert {slot["name"] for slot in node["inputs"]} <= names, node["type"]
        outputs = [[slot["name"], slot["type"]] for slot in node["outputs"]]
        assert now["outputs"][: len(outputs)] == outputs, node["type"]
