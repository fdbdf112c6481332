"""What an edit will need, worked out from its widgets before it runs: size, tokens, memory, and time roughly."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import comfy.model_management
import comfy.supported_models
import torch

from ..kontext_core import geometry
from ..kontext_core.devices import fast_dtype
from ..kontext_core.presets import KONTEXT_DEV, KONTEXT_TINY
from ..kontext_core.weights.formats import AUTOENCODER, TRANSFORMER
from ..kontext_core.weights.parts import open_part
from . import host, host_estimate
from .conditioning import asked_size

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    """The widgets of an edit, as the browser sends them. Sizes are (width, height) in pixels.

    Attributes:
        pictures: size of each connected picture that is known, the one to edit first.
        model, vae: names in the loaders' lists; "" when the browser cannot tell.
        weight_dtype: of the loader, a key of `host.DTYPES`.
    """

    pictures: tuple[tuple[int, int], ...] = ()
    fit: str = "stretch"
    padding: str = "mirror"
    width: int = 0
    height: int = 0
    batch_size: int = 1
    model: str = ""
    weight_dtype: str = "default"
    vae: str = ""


def plan_edit(plan: EditPlan) -> dict:
    """JSON of what the edit will do; `problem` says why it cannot, alone where no size comes of the widgets."""
    problem, params, hidden, file_bytes, area = None, None, None, None, KONTEXT_DEV.max_area
    try:
        if plan.vae:
            area = vae_area(plan.vae)
        if plan.model:
            params, file_bytes = transformer_size(plan.model, plan.weight_dtype)
            hidden = params["hidden_size"]
    except (ValueError, OSError) as error:
        problem = str(error)
    if not plan.vae and hidden is not None:
        area = area_of(hidden)
    try:
        size = asked_size(plan.width, plan.height)
        color = geometry.parse_padding(plan.padding)
        pictures = plan.pictures or ([size] if size else [])  # words alone: only the size is looked at
        fits = [geometry.fit(p, plan.fit, size or "auto", max_area=area, pad_color=color) for p in pictures]
    except ValueError as error:
        return {"problem": str(error)}
    fits = fits[: len(plan.pictures)]
    target = size or (fits[0].size if fits else geometry.nearest_size((1, 1), area))
    small = area < KONTEXT_DEV.max_area
    text = (KONTEXT_TINY if small else KONTEXT_DEV).text_length
    context = sum(tokens_of(found.size) for found in fits)
    tokens = {"target": tokens_of(target), "context": context, "text": text}
    tokens["total"] = sum(tokens.values())
    return {
        "problem": problem,
        "size": list(target),
        "area": area,
        "tokens": tokens,
        "fits": [describe(found) for found in fits],
        "memory": memory(hidden, file_bytes, tokens, plan.batch_size) if hidden is not None else None,
        "seconds_per_step": step_seconds(params, tokens, plan.weight_dtype) if params is not None else None,
    }


def describe(found: geometry.Geometry) -> dict:
    """A geometry for the browser to draw and to say."""
    values = found.to_json()
    values |= {key: list(getattr(found, key)) for key in ("cropped", "padded")}
    values |= {key: getattr(found, key) for key in ("cropped_percent", "padded_percent", "stretched_percent")}
    return {**values, "report": found.report()}


def tokens_of(size: tuple[int, int]) -> int:
    """Tokens of a picture: one for 16 by 16 pixels."""
    return (size[0] // geometry.MULTIPLE) * (size[1] // geometry.MULTIPLE)


def area_of(hidden: int) -> int:
    """The pixels that a transformer of this width prefers."""
    small = 2 * hidden < KONTEXT_DEV.transformer.hidden_size
    return (KONTEXT_TINY if small else KONTEXT_DEV).max_area


def memory(hidden: int, file_bytes: int, tokens: dict, batch_size: int) -> dict:
    """Bytes that the sampling needs at once, beside those that the device has.

    Weights as they lie in the file; activations by the host's own estimate, which decides what it offloads.

    Source: Comfy-Org/ComfyUI comfy/model_base.py `BaseModel.memory_required`.
    """
    management = comfy.model_management
    device = management.get_torch_device()
    itemsize = 4 if management.is_device_cpu(device) else 2
    factor = comfy.supported_models.Flux.memory_usage_factor * hidden / KONTEXT_DEV.transformer.hidden_size
    cells = 4 * (tokens["target"] + tokens["context"]) * batch_size
    activations = int(cells * itemsize * 0.01 * factor * MIB)
    total = int(management.get_total_memory(device))
    needed = file_bytes + activations
    return {
        "weights": file_bytes,
        "activations": activations,
        "needed": needed,
        "total": total,
        "free": int(management.get_free_memory(device)),
        "device": str(device),
        "fits": needed <= total,
    }


def step_seconds(params: dict, tokens: dict, weight_dtype: str) -> float | None:
    """Rough least seconds of one picture's step: the blocks' arithmetic by what the device does in a matrix product.

    None while a workflow runs: its work would be measured too.
    """
    width, total = params["hidden_size"], tokens["total"]
    blocks = params["depth"] + params["depth_single_blocks"]
    weights = (4 + 2 * params["mlp_ratio"]) * width**2  # of a block, for one token: qkv, projection, MLP
    device = comfy.model_management.get_torch_device()
    dtype = fast_dtype(device, host.DTYPES[weight_dtype] or torch.bfloat16)
    key = (width, dtype, device)
    if key not in _speeds:
        if _is_running():
            return None
        _speeds[key] = host_estimate.speed(*key)
    return blocks * (2 * weights * total + 4 * total**2 * width) / _speeds[key]


_speeds: dict[tuple[int, torch.dtype, torch.device], float] = {}  # measured once in a process


def _is_running() -> bool:
    """Whether the host works on a workflow."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    return server is not None and bool(server.prompt_queue.currently_running)


def vae_area(name: str) -> int:
    """The pixels that the model behind a VAE file prefers."""
    params = _params(str(checked("vae", name)), AUTOENCODER, *_stamp("vae", name))
    return KONTEXT_TINY.max_area if 2 * params["ch"] < KONTEXT_DEV.autoencoder.ch else KONTEXT_DEV.max_area


def transformer_size(name: str, weight_dtype: str) -> tuple[dict, int]:
    """(sizes as in TransformerParams, bytes of weights once loaded) of a transformer file."""
    path = checked("diffusion_models", name)
    params = _params(str(path), TRANSFORMER, *_stamp("diffusion_models", name))
    dtype = host.DTYPES[weight_dtype]
    file_bytes = params["numel"] * dtype.itemsize if dtype is not None else path.stat().st_size
    return params, file_bytes


def checked(kind: str, name: str) -> Path:
    """The file of a name in a loader's list.

    Raises:
        ValueError: it is not in the list.
    """
    if name not in host.list_models(kind):
        raise ValueError(
            f"there is no {name!r} in the folder {kind}: put the file there, then press R to refresh"
        )
    path = host.find_file(kind, name)
    if not path.is_file():
        raise ValueError(f"{name} is not there: the model has not been made yet; choose a file of your own")
    return path


def _stamp(kind: str, name: str) -> tuple[int, int]:
    status = os.stat(host.find_file(kind, name))
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=64)
def _params(path: str, part: str, *_stamp: int) -> dict:
    """Sizes of a part as its file's header gives them, and its number of values."""
    opened = open_part(path, part)
    numel = sum(math.prod(shape) for shape in opened.shapes.values())
    return {**asdict(opened.params), "numel": numel}
