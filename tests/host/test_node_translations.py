"""Chinese and Japanese names and tooltips of every node, input and output, as the host's front end reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"


@pytest.fixture(scope="module")
def nodes(host) -> dict:
    found = host.client.get("/object_info")
    return {name: node for name, node in found.items() if name.startswith("Kontext")}


@pytest.fixture(scope="module", params=["zh", "ja"])
def translated(request) -> dict:
    return json.loads((LOCALES / request.param / "nodeDefs.json").read_text(encoding="utf-8"))


def foreign(text: str) -> bool:
    """Whether there is a Chinese or Japanese character in it."""
    return any("\u3040" <= letter <= "\u30ff" or "\u4e00" <= letter <= "\u9fff" for letter in text)


def test_every_node_input_and_output_is_translated_and_nothing_else(nodes, translated):
    assert set(translated) == set(nodes)
    for name, node in nodes.items():
        words = translated[name]
        assert foreign(words["description"]) and words["display_name"].startswith("Kontext "), name
        inputs = {key for kind in ("required", "optional") for key in node["input"].get(kind, {})}
        assert set(words["inputs"]) == inputs, name
        assert set(words.get("outputs", {})) == {str(index) for index in range(len(node["output"]))}, name
        for key, entry in [*words["inputs"].items(), *words.get("outputs", {}).items()]:
            assert entry["name"] and foreign(entry["tooltip"]), f"{name}.{key}"


def test_the_host_serves_the_translations(host, translated):
    served = host.client.get("/i18n")
    assert any(
        language.get("nodeDefs", {}).get("KontextEdit") == translated["KontextEdit"]
        for language in served.values()
    )
