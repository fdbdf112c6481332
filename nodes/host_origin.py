"""What a MODEL and a CLIP came through before they reached a node: LoRAs, accelerations, other nodes.

Kontext Load LoRA and Kontext Accelerate leave what they did on the MODEL and the CLIP themselves. The host's own LoRA
loaders and all other nodes are read in the graph, by the values that are written there, not linked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ..kontext_core.weights.lora_file import load_lora
from . import host, host_accelerate, host_compile

# Nodes of ours that the MODEL itself tells of, or that change no picture.
TOLD = ("KontextLoadLora", "KontextTrainLora", "KontextAccelerate", "KontextGuard")


@dataclass(frozen=True, kw_only=True)
class UsedLora:
    """A LoRA that a MODEL came through; `on_text` is its strength on the CLIP, None where it has nothing for one."""

    path: Path
    strength: float
    on_text: float | None


def came_through(
    prompt: Mapping[str, Any], node_id: str, model: Any, clip: Any
) -> tuple[list[UsedLora], list[dict[str, Any]]]:
    """(LoRAs, other nodes) between the loaders and a node; each other node by its class and its written values."""
    on_clip = [] if clip is None else list(clip.patcher.get_attachment(host.LORAS) or ())
    loras = []
    for item in model.get_attachment(host.LORAS) or ():
        same = next((other for other in on_clip if other.path == item.path), None)
        if same is not None:
            on_clip.remove(same)
        by = 0.0 if same is None else same.strength
        loras.append(UsedLora(path=item.path, strength=item.strength, on_text=by if item.for_text else None))
    loras += [UsedLora(path=item.path, strength=0.0, on_text=item.strength) for item in on_clip]
    through = []
    for_clip = set(_nodes_between(prompt, node_id, "CLIP"))
    for name in _nodes_between(prompt, node_id, "MODEL"):
        kind, inputs = prompt[name]["class_type"], prompt[name]["inputs"]
        values = {key: value for key, value in inputs.items() if not isinstance(value, list | dict)}
        native = _native_lora(values, on_clip=name in for_clip)
        if native is not None and kind not in TOLD:
            loras.append(native)
        elif kind not in TOLD:
            through.append({"node": kind, **values})
    return loras, through


def lora_settings(loras: Sequence[UsedLora]) -> list[list[Any]]:
    """What a record says of LoRAs: (file name, strength), and that on the text encoders where it differs."""
    told = []
    for lora in loras:
        other = [lora.on_text] if lora.on_text not in (None, lora.strength) else []
        told.append([lora.path.name, lora.strength, *other])
    return told


def accelerations(model: Any) -> dict[str, Any]:
    """What a record says of Kontext Accelerate, in the words of its widgets."""
    settings = host_accelerate.settings_of(model)
    told: dict[str, Any] = {
        "reuse_context": settings.every,
        "skip_regions": settings.regions,
        "first_block": settings.first_block,
        "warmup": settings.warmup,
    }
    return {**told, "compile": True} if host_compile.is_compiled(model) else told


def links_of(prompt: Mapping[str, Any], node_id: str) -> Iterator[tuple[str, int]]:
    """(id of the node, number of its output) of every link into a node."""
    for value in prompt.get(node_id, {}).get("inputs", {}).values():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
            yield str(value[0]), value[1]


def _native_lora(values: Mapping[str, Any], *, on_clip: bool) -> UsedLora | None:
    """The LoRA of a loader with the inputs of the host's own; None for any other node."""
    path = folder_paths.get_full_path("loras", str(values.get("lora_name", "")))
    strength = values.get("strength_model")
    if path is None or not isinstance(strength, int | float):
        return None
    try:
        for_text = load_lora(path).parts != {"transformer"}
    except ValueError:  # of a format that the host alone reads, or of none
        for_text = False
    by = float(values.get("strength_clip", 0.0)) if on_clip else 0.0
    return UsedLora(path=Path(path), strength=float(strength), on_text=by if for_text else None)


def _nodes_between(prompt: Mapping[str, Any], node_id: str, kind: str) -> list[str]:
    """Ids of the nodes that a value of this type has passed on its way to a node, the first one first.

    Its loader, which nothing of the type goes into, is left out.
    """
    import nodes

    found: dict[str, list[str]] = {}  # node -> those that it was handed values of the type from
    waiting = [node_id]
    while waiting:
        current = waiting.pop(0)
        if current in found:
            continue
        found[current] = []
        for source, index in links_of(prompt, current):
            made_by = nodes.NODE_CLASS_MAPPINGS.get(prompt.get(source, {}).get("class_type"))
            types = () if made_by is None else made_by.RETURN_TYPES
            if index < len(types) and types[index] == kind:
                found[current].append(source)
                waiting.append(source)
    return [name for name in reversed(found) if found[name] and name != node_id]
