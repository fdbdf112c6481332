"""What a user's training run is: one frozen dataclass, from options or a JSON file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

METHODS = ("lora", "full", "guidance")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run of the `train` command.

    Attributes:
        data: folder of targets with .txt captions; control: folder of context pictures of the same names, None for
            text to image; caption: for targets without a .txt.
        output: folder of the run, which gets the trained file, checkpoint, log, encoded data and previews.
        model: a bundled model, a folder, or a transformer file; t5, clip, vae: parts that are not beside it;
            t5_tokenizer, clip_tokenizer: likewise.
        method: "lora", "full" (every weight of the transformer), or "guidance" (distil guidance into it).
        rank, alpha, targets: of a LoRA, see `lora.add_lora`.
        areas: pixels of the pictures (the model's own when empty), such as 262144 and 1048576.
        progressive: begin with the smallest area and let the others join in equal spans.
        fit: how pictures meet their bucket: "crop", "stretch", "pad" or "keep".
        t_mean, t_std, shift: of the training times, see `schedules.training_times`.
        guidance: (low, high) of the embedded guidance; the scales that a distilled student learns.
        previews: [{"prompt": …, "image": path or None}], made every preview_every steps.
        stop_after: seconds until a polite stop that the same command goes on from.

    The rest is as in `loop.LoopConfig`, `flow.FlowConfig` and `activation`.
    """

    data: str
    output: str
    control: str | None = None
    caption: str | None = None
    model: str = "kontext-tiny"
    t5: str | None = None
    clip: str | None = None
    vae: str | None = None
    t5_tokenizer: str | None = None
    clip_tokenizer: str | None = None
    method: str = "lora"
    rank: int = 16
    alpha: float | None = None
    targets: str = "blocks"
    steps: int = 1000
    batch: int = 1
    accumulate: int = 1
    lr: float = 1e-4
    muon_lr: float = 0.0
    weight_decay: float = 0.0
    warmup: int = 20
    schedule: str = "cosine"
    ema: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    areas: tuple[int, ...] = ()
    progressive: bool = False
    fit: str = "crop"
    caption_dropout: float = 0.05
    t_mean: float = 0.0
    t_std: float = 1.0
    shift: str | float = "resolution"
    guidance: tuple[float, float] | None = None
    checkpointing: str = "none"
    compile: bool = False
    dtype: str = "bfloat16"
    device: str | None = None
    checkpoint_every: int = 250
    log_every: int = 10
    preview_every: int = 0
    preview_steps: int | None = None
    previews: tuple[dict[str, str | None], ...] = ()
    plot: bool = False
    stop_after: float | None = None

    def __post_init__(self) -> None:
        allowed = {
            "method": METHODS,
            "checkpointing": ("none", "selective", "full"),
            "dtype": ("bfloat16", "float32"),
        }
        allowed["fit"] = ("crop", "stretch", "pad", "keep")
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(values)}")
        for name in ("lr", "t_std"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is {self.caption_dropout}; it must be in 0..1")
        if self.guidance is not None and not 0 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance is {self.guidance}; give the lower and the upper end, 0 or more")
        if self.preview_every and not self.previews:
            raise ValueError(
                "preview_every is given, but no previews: name a prompt, and a picture for an edit"
            )
        if any("prompt" not in preview or preview.keys() - {"prompt", "image"} for preview in self.previews):
            raise ValueError(
                'previews must be of the form {"prompt": "…", "image": "path"}; image may be left out'
            )


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file, names and types checked; combine them with others and make a `TrainConfig`.

    Raises:
        ValueError: not a JSON object, an unknown name (all are listed), or a value of the wrong type.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; an object of settings is needed")
    known = {field.name: str(field.type) for field in fields(TrainConfig)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(f"{path}: no setting is called {', '.join(unknown)}; there are {', '.join(known)}")
    for name, value in values.items():
        kind = known[name]
        if isinstance(value, list) and kind.startswith("tuple"):
            values[name] = tuple(value)
        elif not _fits(value, kind):
            raise ValueError(f"{path}: {name} is {value!r}; {kind} is needed")
    return values


def _fits(value: Any, kind: str) -> bool:
    names = {option.strip() for option in kind.split("|")}
    if value is None:
        return "None" in names
    if isinstance(value, bool):
        return "bool" in names
    if isinstance(value, int):
        return bool({"int", "float"} & names)
    return type(value).__name__ in names
