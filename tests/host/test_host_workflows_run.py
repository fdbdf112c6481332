"""Every example workflow runs: on the bundled model when its weights are there, else on random ones of its size.

Those for files that are not in the repository are run with this pack's loaders in place of the host's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_core.weights.locate import BUNDLED

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
WEIGHTS = (BUNDLED["kontext-tiny"] / "flux1-kontext-tiny.safetensors").is_file()
HAS_FEW_STEP = any(BUNDLED["kontext-tiny"].glob("*few*.safetensors"))
TWINS = {
    "UNETLoader": "KontextLoadModel",
    "DualCLIPLoader": "KontextLoadTextEncoders",
    "VAELoader": "KontextLoadVAE",
}
FILES = {
    "KontextLoadModel": {"model": "diffusion_models"},
    "KontextLoadTextEncoders": {"t5": "t5", "clip": "clip"},
    "KontextLoadVAE": {"vae": "vae"},
}


def load(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def info(host) -> dict:
    return host.client.get("/object_info")


@pytest.mark.parametrize("name", NAMES)
def test_every_widget_value_is_legal(info, name):
    for node in load(name).values():
        known = info[node["class_type"]]["input"]
        entries = {**known.get("required", {}), **known.get("optional", {})}
        for key, value in node["inputs"].items():
            entry = entries[key]
            options = entry[1] if len(entry) > 1 else {}
            if isinstance(value, list):
                continue
            where = f"{node['class_type']}.{key} = {value!r}"
            choices = entry[0] if isinstance(entry[0], list) else options.get("options")
            real_file = node["class_type"] in TWINS and str(value).endswith(".safetensors")
            if choices is not None and not real_file:
                assert value in choices, where
            if "min" in options:
                assert options["min"] <= value <= options["max"], where


@pytest.fixture(scope="module")
def names(request, host) -> dict[str, str]:
    """What each loader takes when the bundled model has no weights: random ones, named as distilled too."""
    if WEIGHTS:
        return {}
    found = dict(request.getfixturevalue("tiny"))
    source = host.put_model("diffusion_models", found["diffusion_models"])
    target = host.put_model("diffusion_models", "random_fewstep.safetensors")
    target.write_bytes(source.read_bytes())
    return {**found, "few": target.name}


def runnable(workflow: dict, names: dict[str, str]) -> dict:
    """The workflow for the models at hand."""
    few = any(node["inputs"].get("few_step", "off") != "off" for node in workflow.values())
    result = json.loads(json.dumps(workflow))
    for node in result.values():
        if node["class_type"] in TWINS:
            node["class_type"] = TWINS[node["class_type"]]
            node["inputs"] = {key: "kontext-tiny (bundled)" for key in FILES[node["class_type"]]}
            if node["class_type"] == "KontextLoadModel":
                node["inputs"]["weight_dtype"] = "default"
        for key, kind in FILES.get(node["class_type"], {}).items() if names else ():
            node["inputs"][key] = names["few" if few and kind == "diffusion_models" else kind]
        if "steps" in node["inputs"] and names:
            node["inputs"]["steps"] = 2
    return result


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_makes_pictures(host, names, name):
    workflow = load(name)
    if WEIGHTS and name == "few_step" and not HAS_FEW_STEP:
        pytest.skip("kontext-tiny's distilled transformer is not there")
    run = host.run(runnable(workflow, names))
    pictures = host.pictures(run)
    saves = [node for node in workflow.values() if node["class_type"] in ("SaveImage", "KontextSave")]
    assert len(pictures) >= len(saves) > 0
    for picture in pictures:
        assert np.asarray(picture.convert("RGB")).std() > 1, "a flat picture"


def test_preserve_keeps_every_pixel_outside_the_mask(host, names):
    (picture,) = host.pictures(host.run(runnable(load("preserve_mask"), names)))
    before = np.asarray(Image.open(WORKFLOWS / "input" / "toy_meadow.png").convert("RGB"))
    mask = np.asarray(Image.open(WORKFLOWS / "input" / "toy_meadow_mask.png").convert("L")) > 0
    after = np.asarray(picture.convert("RGB"))
    assert np.array_equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).any()
