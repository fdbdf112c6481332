"""Set-up of the scripts in this folder: ComfyUI on the path as if started with --cpu, and the pack imported.

Diffusion models compute in float32, as the tolerances of the tests ask for; without a word ours computes in bfloat16 on
a CPU that is fast at it.

A script is called with the ComfyUI's folder, the file for its JSON answer, its own arguments, "--" and further
options of ComfyUI's command line.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

split = sys.argv.index("--")
COMFYUI, ANSWER, *ARGUMENTS = sys.argv[1:split]
sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention", "--fp32-unet", *sys.argv[split + 1 :]]
sys.path.insert(0, COMFYUI)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()


def load_pack():
    """The pack as the host imports it: a package under a name of the host's making."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_kontext", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def answer(value: dict) -> None:
    """Hand the result back to the test."""
    Path(ANSWER).write_text(json.dumps(value))
