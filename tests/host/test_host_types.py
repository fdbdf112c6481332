"""Native types in: what our nodes take beside widgets is what ComfyUI's own nodes give, and the geometry."""

from __future__ import annotations

import pytest

NATIVE = {"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "SIGMAS", "SAMPLER", "IMAGE", "MASK"}
NATIVE |= {"CLIP_VISION"}  # of another kind of network, which Kontext Turns can measure with
WIDGETS = {"STRING", "INT", "FLOAT", "BOOLEAN", "COMBO"}
OWN = "KONTEXT_GEOMETRY"


@pytest.fixture(scope="module")
def known(host) -> dict[str, dict]:
    return host.client.get("/object_info")


def types_of(node: dict) -> dict[str, str]:
    """Input -> its type; a list of choices is a combo."""
    entries = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    return {name: "COMBO" if isinstance(entry[0], list) else entry[0] for name, entry in entries.items()}


def test_only_native_types_and_the_geometry_go_in(known):
    ours = {name: node for name, node in known.items() if name.startswith("Kontext")}
    assert len(ours) > 20
    for name, node in ours.items():
        for key, kind in types_of(node).items():
            assert set(kind.split(",")) <= NATIVE | WIDGETS | {OWN}, f"{name}.{key} is {kind}"


def test_the_native_types_are_ones_that_the_hosts_own_nodes_give(known):
    given = {
        kind for name, node in known.items() if not name.startswith("Kontext") for kind in node["output"]
    }
    assert given >= NATIVE


def test_the_geometry_comes_from_our_own_nodes_alone(known):
    givers = {name for name, node in known.items() if OWN in node["output"]}
    takers = {name for name, node in known.items() if OWN in types_of(node).values()}
    assert givers and takers and all(name.startswith("Kontext") for name in givers | takers)
