"""The reproducibility record in the host: which files the graph loaded, and pictures written with it and read back.

The files are found in the graph itself, upstream of a node, so that models of other packs' loaders are recorded too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfyui_version
import folder_paths
from torch import Tensor

from ..kontext_core import images
from ..kontext_core.record import (
    KEY,
    LORA_ROLE,
    Record,
    Stamp,
    current_versions,
    pixel_digest,
    stamp,
    stamp_picture,
)  # fmt: skip
from . import host
from .host_origin import UsedLora, accelerations, came_through, links_of, lora_settings

BUNDLED_MARK = " (bundled)"  # at the end of a name that is no file of the host's folders
# Input name of a loader -> the host's folder that its value names a file of.
FOLDERS = {
    "unet_name": "diffusion_models",
    "ckpt_name": "checkpoints",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "vae_name": "vae",
    "lora_name": "loras",
    "lora": "loras",
    "model": "diffusion_models",
    "t5": "text_encoders",
    "clip": "text_encoders",
    "vae": "vae",
}


def make(
    hidden: Any,
    model: Any,
    clip: Any,
    action: str,
    prompt: str,
    settings: Mapping[str, Any],
    pictures: Sequence[Tensor | None],
    earlier: str = "",
) -> str:
    """JSON of a record of one node's run.

    Args:
        hidden: the node's hidden values: prompt and unique_id.
        model: MODEL; what it came through is written down: LoRAs, accelerations and other nodes.
        clip: CLIP, whose LoRAs are.
        settings: the node's widgets.
        pictures: IMAGEs that went in, None where none is connected.
        earlier: JSON of the record of the edit that this one goes on from: its instructions come first, its
            settings are kept under "earlier", and its pictures before those that are new here.

    Raises:
        ValueError: `earlier` is no record.
    """
    before = Record.from_json(earlier) if earlier.strip() else None
    graph, node = hidden.prompt or {}, str(hidden.unique_id or "").split(".")[0]
    loras, through = came_through(graph, node, model, clip)
    settings = {**settings, **accelerations(model), "loras": lora_settings(loras)}
    settings |= {"through": through} if through else {}
    few_step = getattr(getattr(model.model, "kontext", None), "few_step", None)
    distilled = [stamp("diffusion_models", few_step)] if few_step and settings["few_step"] != "off" else []
    prompts, inputs, turn = (prompt,), [], ""
    if before is not None:
        first = list(before.settings.get("earlier", ()))
        own = {key: value for key, value in before.settings.items() if key not in ("earlier", "index")}
        settings["earlier"] = [*first, own]
        prompts, inputs = (*before.prompts, prompt), list(before.inputs)
        turn = f"turn {len(prompts)} "
    known = {item.digest for item in inputs}
    for number, picture in enumerate(pictures, start=1):
        for index, single in enumerate(() if picture is None else images.from_comfy(picture)[0]):
            item = stamp_picture(f"{turn}image {number}", f"{number}.{index}", single[None])
            if before is None or item.digest not in known:
                inputs.append(item)
    return Record(
        action=action,
        prompts=prompts,
        settings=settings,
        inputs=tuple(inputs),
        weights=(*stamp_files(graph, node, loras), *distilled),
        versions={
            **current_versions(model.load_device, model.model.manual_cast_dtype or model.model.get_dtype()),
            "comfyui": comfyui_version.__version__,
        },
    ).to_json()


def stamp_files(prompt: Mapping[str, Any], node_id: str, loras: Sequence[UsedLora]) -> tuple[Stamp, ...]:
    """Fingerprints of the model files that the graph loads for a node, each once, then its LoRAs in their order."""
    waiting, seen, found = [node_id], set(), {}
    while waiting:
        current = waiting.pop()
        if current in seen or current not in prompt:
            continue
        seen.add(current)
        waiting += [source for source, _ in links_of(prompt, current)]
        for name, value in prompt[current]["inputs"].items():
            if isinstance(value, str) and name in FOLDERS:
                for path in _files(FOLDERS[name], value):
                    found[str(path)] = stamp(FOLDERS[name], path)
    used = [stamp(LORA_ROLE.format(number), lora.path) for number, lora in enumerate(loras, 1)]
    known = {str(lora.path) for lora in loras}
    return (*(found[path] for path in sorted(found) if path not in known), *used)


def _files(kind: str, name: str) -> list[Path]:
    """The file that a loader's value names; of the bundled text encoders both."""
    if name.endswith(BUNDLED_MARK):
        path = host.find_file(kind, name)
        both = [
            host.BUNDLED_FOLDER / part / "model.safetensors" for part in ("text_encoder", "text_encoder_2")
        ]
        return [file for file in (both if kind == "text_encoders" else [path]) if file.is_file()]
    path = folder_paths.get_full_path(kind, name)
    return [] if path is None else [Path(path)]


def save(image: Tensor, record: str, prefix: str, prompt: Any, extra: Mapping[str, Any] | None) -> list[dict]:
    """Write IMAGE as PNGs into the output folder, each with graph and record; how the host's /view names them.

    Raises:
        ValueError: the text is no record.
    """
    base = Record.from_json(record) if record.strip() else None
    pixels, alpha = images.from_comfy(image)
    height, width = pixels.shape[-2:]
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    written = []
    for index, picture in enumerate(pixels):
        text = {key: json.dumps(value) for key, value in (extra or {}).items()}
        if prompt is not None:
            text["prompt"] = json.dumps(prompt)
        if base is not None:
            settings = {**base.settings, "index": index}
            text[KEY] = replace(base, settings=settings, pixels=pixel_digest(picture[None])).to_json()
        file = f"{name}_{counter + index:05}_.png"
        single = None if alpha is None else alpha[index : index + 1]
        images.save_image(Path(folder) / file, picture[None], single, text=text)
        written.append({"filename": file, "subfolder": subfolder, "type": "output"})
    return written


def list_pictures() -> list[str]:
    """Files of the host's input folder."""
    folder = Path(folder_paths.get_input_directory())
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return sorted(folder_paths.filter_files_content_types(names, ["image"]))


def picture_path(name: str) -> Path:
    """Where the host keeps an uploaded picture."""
    return Path(folder_paths.get_annotated_filepath(name))
