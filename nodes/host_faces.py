"""The user's ONNX files of faces, in ComfyUI's models/insightface."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

FOLDER = "insightface"
MISSING = "put an .onnx file into models/insightface"

if FOLDER not in folder_paths.folder_names_and_paths:
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def list_networks() -> list[str]:
    """Names of the ONNX files; one that says what to do where there is none."""
    names = [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(".onnx")]
    return names or [MISSING]


def file_of(name: str) -> Path:
    """The file of a name from the list.

    Raises:
        ValueError: there is no such file.
    """
    found = folder_paths.get_full_path(FOLDER, name) if name != MISSING else None
    if found is None:
        raise ValueError(
            f"there is no face network {name!r}: put an ArcFace model such as glintr100.onnx of AuraFace into "
            "models/insightface and choose it"
        )
    return Path(found)


def fingerprint(name: str) -> tuple[str, float, int]:
    """Changes with the file behind a name."""
    found = None if name == MISSING else folder_paths.get_full_path(FOLDER, name)
    if found is None:
        return name, 0.0, 0
    state = os.stat(found)
    return name, state.st_mtime, state.st_size
