"""Requests from a file of JSON lines -> source shards for `synthesize`: encoded words and contexts, no targets.

A line is {"prompt": "…"} with, if wanted, "image": a picture's path (relative to the file) to edit, and "size":
[width, height] in multiples of 16. Targets are zeros until the teacher has made them; the guards refuse them so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import geometry, latents
from ..conditioning import encode_prompt
from ..edit import encode_image
from ..images import load_image
from ..training.data import write_shard
from ..weights.load import KontextModel


@dataclass(frozen=True, kw_only=True)
class Request:
    """One line of the file; `size` is of the target, (width, height) in pixels."""

    prompt: str
    image: Path | None
    size: tuple[int, int] | None


def read_requests(path: Path) -> list[Request]:
    """The lines of the file.

    Raises:
        ValueError: a line that is no request, naming it.
    """
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(
                f'{path}:{number} has no prompt: write {{"prompt": "…"}}, and "image" for an edit'
            )
        size = entry.get("size")
        if size is not None and (
            len(size) != 2 or any(not isinstance(n, int) or n < 16 or n % 16 for n in size)
        ):
            raise ValueError(f"{path}:{number}: size is {size}; give [width, height] in multiples of 16")
        image = path.parent / entry["image"] if entry.get("image") else None
        if image is not None and not image.is_file():
            raise ValueError(f"{path}:{number}: there is no picture {image}")
        requests.append(Request(prompt=entry["prompt"], image=image, size=tuple(size) if size else None))
    if not requests:
        raise ValueError(f"{path} holds no requests: one JSON object a line is needed")
    return requests


def write_request_shards(
    model: KontextModel, requests: list[Request], folder: Path, *, shard: int = 100
) -> list[Path]:
    """Encode requests with the model into source shards of up to `shard` rows of one size each."""
    paths = []
    for number, part in enumerate(_parts(requests, model.preset.max_area, shard)):
        path = folder / f"requests-{number:05d}.safetensors"
        if not path.exists():
            write_shard(path, _encode(model, part))
        paths.append(path)
    return paths


def _parts(
    requests: list[Request], max_area: int, shard: int
) -> Iterator[list[tuple[Request, geometry.Geometry | None, tuple[int, int]]]]:
    """Requests of one target size and one context size, `shard` at most."""
    groups: dict[tuple, list] = {}
    for request in requests:
        plan, size = None, request.size or geometry.nearest_size((1, 1), max_area)
        if request.image is not None:
            height, width = load_image(request.image).image.shape[-2:]
            plan = geometry.fit((width, height), "stretch", request.size or "auto", max_area=max_area)
            size = plan.size
        groups.setdefault((size, plan is not None), []).append((request, plan, size))
    for rows in groups.values():
        for start in range(0, len(rows), shard):
            yield rows[start : start + shard]


def _encode(
    model: KontextModel, rows: list[tuple[Request, geometry.Geometry | None, tuple[int, int]]]
) -> dict[str, Tensor]:
    width, height = rows[0][2]
    h, w = height // latents.CELL, width // latents.CELL
    words = [encode_prompt(model, [request.prompt]) for request, _, _ in rows]
    tensors = {
        "target": torch.zeros(len(rows), latents.LATENT_CHANNELS, h, w, dtype=torch.float16),
        "txt": torch.cat([word.txt for word in words]).bfloat16(),
        "vec": torch.cat([word.vec for word in words]).bfloat16(),
        "weight": torch.zeros(len(rows), h * w // latents.PATCH**2, dtype=torch.uint8),
    }
    if rows[0][1] is not None:
        pictures = [
            geometry.apply(plan, load_image(request.image).image.float()) for request, plan, _ in rows
        ]
        tensors["context"] = torch.cat([encode_image(model, picture).half().cpu() for picture in pictures])
    return tensors
