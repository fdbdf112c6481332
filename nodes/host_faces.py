"""The user's ONNX networks for faces, in ComfyUI's models/insightface."""

from __future__ import annotations

import os

import folder_paths

FOLDER = "insightface"
MISSING = "put an .onnx file into models/insightface"

if FOLDER not in folder_paths.folder_names_and_paths:
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def list_networks() -> list[str]:
    """Names of the ONNX files; where there is none, a name that says what to do."""
    names = [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(".onnx")]
    return names or [MISSING]
