"""The training loop of every stage.

Everything random in step k comes from (seed, k, micro-batch), and data is addressed by step, so a run that
is killed at any moment and resumed goes on with bitwise the losses of an uninterrupted one. A `Task` says what is
trained; this file knows steps, gradients, averages, checkpoints, the log and the time left. Several processes (see
`parallel`) share each micro-batch and take the same steps; checkpoints are the same whatever their number.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checkpoint import load_checkpoint, save_checkpoint
from .ema import Ema
from .optim import Optimizers, warmup_cosine, warmup_stable_decay
from .parallel import ALONE, World, average_gradients, full, like

log = logging.getLogger("kontext")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast.

    Attributes:
        steps: optimizer steps in all.
        batch: samples a micro-batch, of all processes together; accumulate: micro-batches a step.
        lr: AdamW's peak; muon_lr: Muon's, 0 for AdamW alone.
        warmup: steps; schedule: "cosine" or "stable" (flat, then a linear fall over the last `decay` share).
        ema: decay of the averaged weights, 0 for none.
        clip: largest gradient norm.
        checkpoint_every, preview_every, log_every: steps.
    """

    steps: int
    batch: int
    accumulate: int = 1
    lr: float = 1e-3
    muon_lr: float = 0.0
    weight_decay: float = 0.0
    warmup: int = 100
    schedule: str = "cosine"
    decay: float = 0.25
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500
    preview_every: int = 0
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.schedule not in ("cosine", "stable"):
            raise ValueError(f"schedule is {self.schedule!r}; use 'cosine' or 'stable'")

    def factor(self, step: int) -> float:
        """The learning rate's share of its peak."""
        if self.schedule == "cosine":
            return warmup_cosine(step, self.steps, self.warmup)
        return warmup_stable_decay(step, self.steps, self.warmup, self.decay)


class Task(Protocol):
    """What is trained: a module whose trainable parameters are optimized, and its loss."""

    module: nn.Module

    def batch(self, step: int, micro: int, size: int) -> dict[str, Tensor]:
        """The samples of a micro-batch: the same for the same arguments, always."""

    def loss(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The scalar to go down, and numbers for the log."""


class Stopped(Exception):
    """Raised by a callback to end training; the loop saves a checkpoint first."""


def step_generator(seed: int, step: int, micro: int) -> torch.Generator:
    """The CPU generator of everything random in one micro-batch."""
    key = (seed * 1_000_003 + step) * 1_009 + micro * 31
    return torch.Generator("cpu").manual_seed(key & 0x7FFF_FFFF_FFFF_FFFF)


def train(
    task: Task,
    config: LoopConfig,
    folder: Path,
    *,
    preview: Callable[[int, nn.Module], None] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    stop_after_seconds: float | None = None,
    world: World = ALONE,
) -> nn.Module:
    """Train, or go on from `folder`/checkpoint; returns the module with its averaged weights.

    Args:
        folder: gets checkpoint/, log.jsonl and whatever `preview` writes.
        preview: called with the step and the module holding the averaged weights.
        on_step: called with (step, steps, loss) after each step; may raise `Stopped`.
        stop_after_seconds: end early, checkpointed, as a kill would but politely.
        world: the processes that train together; the first one alone writes.

    Raises:
        ValueError: the checkpoint is of another model or optimizer, or the processes cannot share a micro-batch.
        FloatingPointError: the gradient is not finite.
    """
    if config.batch % world.size:
        raise ValueError(f"batch is {config.batch}; {world.size} processes need a multiple of {world.size}")
    folder.mkdir(parents=True, exist_ok=True)
    module = task.module
    optimizers = Optimizers(
        module.named_parameters(),
        lr=config.lr,
        muon_lr=config.muon_lr,
        weight_decay=config.weight_decay,
        world=world,
    )
    ema = Ema(module, config.ema) if config.ema else None
    step = _resume(module, optimizers, ema, folder)
    if world.rank == 0:
        trim_log(folder / "log.jsonl", step)
    started, first, window = time.time(), step, []
    try:
        while step < config.steps:
            tick = time.time()
            optimizers.set_factor(config.factor(step))
            total, numbers = 0.0, {}
            for micro in range(config.accumulate):
                generator = step_generator(config.seed, step, micro)
                loss, numbers = task.loss(task.batch(step, micro, config.batch), generator)
                (loss / config.accumulate).backward()
                total += float(loss.detach()) / config.accumulate
            total = world.mean(total)
            average_gradients(module.parameters(), world)
            norm = optimizers.clip(config.clip)
            optimizers.step()
            optimizers.zero_grad()
            if ema is not None:
                ema.update(module)
            step += 1
            window.append(time.time() - tick)
            if world.rank == 0 and (step % config.log_every == 0 or step == config.steps):
                _write_log(folder, config, step, total, norm, numbers, window)
                window.clear()
            if config.preview_every and preview is not None and step % config.preview_every == 0:
                _preview(preview, step, module, ema)
            if on_step is not None:
                on_step(step, config.steps, total)
            late = stop_after_seconds is not None and time.time() - started > stop_after_seconds
            out_of_time = world.any(late) if stop_after_seconds is not None else False
            if step % config.checkpoint_every == 0 or step == config.steps or out_of_time:
                _save(module, optimizers, ema, step, config, folder, world)
            if out_of_time:
                log.info("stopped at step %d after %.0f s", step, time.time() - started)
                break
    except Stopped:
        if step > first:
            _save(module, optimizers, ema, step, config, folder, world)
        raise
    if ema is not None:
        for name, parameter in module.named_parameters():
            if name in ema.shadow:
                parameter.data.copy_(ema.shadow[name])
    return module


def _preview(
    preview: Callable[[int, nn.Module], None], step: int, module: nn.Module, ema: Ema | None
) -> None:
    if ema is None:
        preview(step, module)
        return
    with ema.swapped(module):
        preview(step, module)


def _write_log(
    folder: Path, config: LoopConfig, step: int, loss: float, norm: float, numbers: dict, window: list
) -> None:
    seconds = sum(window) / len(window)
    left = (config.steps - step) * seconds
    row = {
        "step": step,
        "loss": loss,
        "gradient_norm": norm,
        "lr_factor": config.factor(step - 1),
        "seconds_per_step": round(seconds, 4),
        "samples_per_second": round(config.batch * config.accumulate / seconds, 2),
        "seconds_left": round(left),
        **{key: float(value) for key, value in numbers.items()},
    }
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    log.info(
        "step %d/%d loss %.4f, %.1f samples/s, %.0f min left",
        step,
        config.steps,
        loss,
        row["samples_per_second"],
        left / 60,
    )


def steps_done(folder: Path) -> int:
    """Steps of the run in `folder` that its last checkpoint holds; 0 where there is none."""
    found = load_checkpoint(folder / "checkpoint")
    return 0 if found is None else int(found[1]["step"])


def trim_log(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, at `step`: those steps are taken again.

    The log of JSON lines at `path` is written beside and renamed; a line that a kill cut off goes too.
    """
    if not path.is_file():
        return
    lines = path.read_text().splitlines()
    kept = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line a kill cut off
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    if len(kept) < len(lines):
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)


def _save(
    module: nn.Module,
    optimizers: Optimizers,
    ema: Ema | None,
    step: int,
    config: LoopConfig,
    folder: Path,
    world: World,
) -> None:
    # every process gathers, the first one writes
    trained = {name: full(p) for name, p in module.named_parameters() if p.requires_grad}
    parts: dict[str, dict[str, Tensor]] = {"weights": trained, "optimizer": optimizers.state_tensors()}
    state: dict[str, Any] = {"step": step, "config": asdict(config), "ema_updates": 0}
    if ema is not None:
        parts["ema"] = ema.state_tensors()
        state["ema_updates"] = ema.updates
    if world.rank == 0:
        save_checkpoint(folder / "checkpoint", parts, state)
    world.wait()


def _resume(module: nn.Module, optimizers: Optimizers, ema: Ema | None, folder: Path) -> int:
    found = load_checkpoint(folder / "checkpoint")
    if found is None:
        return 0
    parts, state = found
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if weights.keys() != parts["weights"].keys():
        different = sorted(weights.keys() ^ parts["weights"].keys())[:3]
        raise ValueError(f"{folder / 'checkpoint'} is of another model: {', '.join(different)} …")
    for name, parameter in weights.items():
        if parameter.shape != parts["weights"][name].shape:
            raise ValueError(
                f"{folder / 'checkpoint'} is of another model: {name} is {tuple(parts['weights'][name].shape)} there "
                f"and {tuple(parameter.shape)} here; begin in a new folder"
            )
        parameter.data.copy_(like(parts["weights"][name], parameter))
    optimizers.load_state_tensors(parts["optimizer"])
    if ema is not None:
        if "ema" not in parts:
            raise ValueError(
                f"{folder / 'checkpoint'} holds no averaged weights: go on with ema 0, as it began"
            )
        ema.load_state_tensors(parts["ema"])
        ema.updates = state["ema_updates"]
    log.info("resumed at step %d from %s", state["step"], folder / "checkpoint")
    return state["step"]
