"""LoRA files from disk, over the memory map."""

from __future__ import annotations

import os
from pathlib import Path

from ..models.lora import LoraFile, read_lora
from .files import open_weights


def load_lora(path: str | os.PathLike) -> LoraFile:
    """Open a LoRA in any of the formats that `models.lora` reads; its tensors stay in the memory map.

    A PEFT folder's adapter_config.json, beside an adapter_model.safetensors, is read with it.

    Raises:
        ValueError: the file cannot be read, is no safetensors file, or holds nothing for FLUX.
    """
    path = Path(path)
    file = open_weights(path)
    if not file.container.startswith("safetensors"):
        raise ValueError(f"{path}: LoRAs are read from safetensors files; this is a {file.container} file.")
    metadata = dict(file.metadata)
    settings = file.path.parent / "adapter_config.json"
    if file.path.name.startswith("adapter_model") and settings.is_file():
        metadata.setdefault("lora_adapter_metadata", settings.read_text(encoding="utf-8"))
    return read_lora({key: file.read(key) for key in file.tensors}, metadata, name=path.name)
