"""Checkpoints: a folder of safetensors and JSON, written beside and renamed, so a kill never spoils one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..weights.safetensors_file import save_tensors

_STATE = "state.json"


def save_checkpoint(folder: Path, parts: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `<part>.safetensors` for each part and state.json; the folder appears whole or not at all.

    An older checkpoint of the same name is kept until the new one is complete.
    """
    partial, old = _beside(folder, ".partial"), _beside(folder, ".old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in parts.items():
        save_tensors(partial / f"{name}.safetensors", tensors)
    (partial / _STATE).write_text(json.dumps(state, indent=1))
    if folder.exists():
        # only now may an older one go: it is the last whole checkpoint where a kill left no `folder`
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Parts and state of the newest complete checkpoint of this name, or None when there is none."""
    for candidate in (folder, _beside(folder, ".old")):
        if (candidate / _STATE).is_file():
            parts = {path.stem: load_file(path) for path in sorted(candidate.glob("*.safetensors"))}
            return parts, json.loads((candidate / _STATE).read_text())
    return None


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def save_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, written beside and renamed."""
    save_tensors(path, tensors, metadata)
