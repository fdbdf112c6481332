"""What a node hands to the browser for its before/after view: two pictures in the host's temp folder, and facts.

The pictures are named by what is in them, so that one that is shown again is not written again, and a browser may
keep it.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import folder_paths
import numpy as np
from PIL import Image
from torch import Tensor

from ..kontext_core import geometry, images
from ..kontext_core.evaluation.drift import measure_drift

MAX_PICTURES = 16
DRIFT_SIDE = 256  # pixels: enough to say how far a picture has drifted, and no time
MIN_DRIFT_SIDE = 48  # pixels: a smaller picture has no place that an edit leaves alone


def compare(before: Tensor | None, after: Tensor, mask: Tensor | None = None, **facts: object) -> dict:
    """The `ui` of a node with a before/after view.

    Args:
        before: IMAGE (1 or B, H, W, C); None for a picture made from words.
        after: IMAGE (B, H, W, C).
        mask: (B, H, W), white where the edit may show.
        facts: JSON values that go with every picture, such as prompt, seed and seconds.
    """
    shown = []
    for index, picture in enumerate(after[:MAX_PICTURES]):
        entry = {
            "after": _save(picture),
            "size": [picture.shape[1], picture.shape[0]],
            **facts,
            "index": index,
        }
        if before is not None:
            start = before[min(index, len(before) - 1)]
            entry["before"] = _save(start)
            entry["before_size"] = [start.shape[1], start.shape[0]]
            if start.shape[:2] == picture.shape[:2] and min(start.shape[:2]) >= MIN_DRIFT_SIDE:
                entry["drift"] = _drift(start, picture)
        if mask is not None:
            entry["mask"] = _save(mask[min(index, len(mask) - 1)][..., None].expand(-1, -1, 3))
        shown.append(entry)
    return {"kontext": shown}


def is_there(name: str) -> bool:
    """Whether a picture that was shown is still in the host's temp folder, which it empties when it starts."""
    if re.fullmatch(r"kontext_[0-9a-f]{24}\.png", name) is None:
        return False
    return (Path(folder_paths.get_temp_directory()) / name).is_file()


def _drift(start: Tensor, picture: Tensor) -> dict:
    """How far a picture (H, W, C) has moved where no edit is seen: PSNR in dB and the share that was edited."""
    scale = min(1.0, DRIFT_SIDE / max(start.shape[:2]))
    size = tuple(max(16, round(n * scale)) for n in (start.shape[1], start.shape[0]))
    small = [geometry.resample(images.from_comfy(p[None])[0], size, (-1.0, 1.0)) for p in (start, picture)]
    found = measure_drift(small[0], small[1:])[0]
    psnr = None if math.isnan(found.psnr) else round(min(found.psnr, 99.0), 1)  # nan: all of it was edited
    return {"psnr": psnr, "edited": round(found.edited, 3)}


def _save(picture: Tensor) -> dict:
    """Write (H, W, C) in 0..1 as PNG unless it is there; how the host's /view names it."""
    pixels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().numpy().astype(np.uint8)
    name = f"kontext_{hashlib.sha256(pixels.tobytes() + repr(pixels.shape).encode()).hexdigest()[:24]}.png"
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).is_file():
        partial = folder / f"{name}.partial"
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        Image.fromarray(pixels).save(partial, format="PNG", compress_level=1)
        partial.replace(folder / name)
    return {"filename": name, "subfolder": "", "type": "temp"}
