"""The two-sided training loop of distillation, restartable bit for bit as `training.loop` is.

Step k draws everything from (seed, k, micro-batch); weights, both optimizers, the averages and what the guards have
seen are in the checkpoint.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from ..models.transformer import Flux
from ..training.checkpoint import load_checkpoint, save_checkpoint
from ..training.ema import Ema
from ..training.loop import LoopConfig, Stopped, step_generator, trim_log
from ..training.optim import Optimizers
from .guards import GuardConfig, Watch, check_batch
from .ladd import Distillation

log = logging.getLogger("kontext")


class _Sides:
    """Student and heads with their optimizers and averages."""

    def __init__(self, task: Distillation, config: LoopConfig) -> None:
        self.student, self.heads = task.student, task.heads
        settings = task.config
        self.optimizer = _optimizer(self.student, config.lr, config.muon_lr, config, settings.betas)
        self.head_optimizer: Optimizers | None = None
        if self.heads is not None:
            self.head_optimizer = _optimizer(self.heads, settings.head_lr, 0.0, config, settings.betas)
        self.ema = Ema(self.student, config.ema) if config.ema else None

    def parts(self) -> dict[str, dict[str, Tensor]]:
        parts: dict[str, dict[str, Tensor]] = {
            "weights": trainable(self.student),
            "optimizer": self.optimizer.state_tensors(),
        }
        if self.heads is not None:
            parts["heads"] = dict(self.heads.named_parameters())
            parts["head_optimizer"] = self.head_optimizer.state_tensors()
        if self.ema is not None:
            parts["ema"] = self.ema.shadow
        return parts

    def load(self, parts: dict[str, dict[str, Tensor]], ema_updates: int, place: Path) -> None:
        mine = self.parts()
        differ = sorted(mine.keys() ^ parts.keys())
        for name in ("weights", "heads"):
            differ += sorted(mine.get(name, {}).keys() ^ parts.get(name, {}).keys())[:3]
        if differ:
            raise ValueError(
                f"{place} is of another distillation: {', '.join(differ)} differ. Give another folder, or the "
                "settings it was begun with"
            )
        for name in ("weights", "heads"):
            for key, parameter in mine.get(name, {}).items():
                parameter.data.copy_(parts[name][key])
        self.optimizer.load_state_tensors(parts["optimizer"])
        if self.head_optimizer is not None:
            self.head_optimizer.load_state_tensors(parts["head_optimizer"])
        if self.ema is not None:
            self.ema.shadow = {name: value.clone() for name, value in parts["ema"].items()}
            self.ema.updates = ema_updates


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _optimizer(
    module: nn.Module, lr: float, muon_lr: float, config: LoopConfig, betas: tuple[float, float]
) -> Optimizers:
    made = Optimizers(module.named_parameters(), lr=lr, muon_lr=muon_lr, weight_decay=config.weight_decay)
    for part in made.parts:
        for group in part.param_groups:
            if "betas" in group:
                group["betas"] = betas
    return made


def distill(
    task: Distillation,
    config: LoopConfig,
    folder: Path,
    *,
    guards: GuardConfig | None = None,
    preview: Callable[[int, Flux], None] | None = None,
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
    stop_after_seconds: float | None = None,
) -> Flux:
    """Train the student, or go on from `folder`/checkpoint; returns it with its averaged weights.

    Args:
        config: `lr` and `muon_lr` are the student's; the heads' is in the task's own config.
        folder: gets checkpoint/ and log.jsonl.
        preview: called with the step and the student holding the averaged weights.
        on_step: called with (step, steps, numbers) after each step; may raise `Stopped`.
        stop_after_seconds: end early, checkpointed.

    Raises:
        Collapsed: a guard stopped it; the last checkpoint is from before.
    """
    guards = guards or GuardConfig()
    if task.heads is not None:
        check_batch(config.batch, guards)
    folder.mkdir(parents=True, exist_ok=True)
    sides, watch = _Sides(task, config), Watch(guards)
    step = _resume(sides, watch, folder)
    trim_log(folder / "log.jsonl", step)  # what was written after the checkpoint comes again
    started, first, window = time.time(), step, []

    def save() -> None:
        state = {
            "step": step,
            "config": asdict(config),
            "distill": asdict(task.config),
            "ema_updates": sides.ema.updates if sides.ema else 0,
            "watch": watch.state(),
        }
        save_checkpoint(folder / "checkpoint", sides.parts(), state)

    try:
        while step < config.steps:
            tick = time.time()
            numbers = _step(task, config, sides, step)
            if task.heads is not None:
                keys = ("real_score", "fake_score", "head_loss", "spread")
                watch.update(**{key: numbers[key] for key in keys if key in numbers})
            step += 1
            window.append(time.time() - tick)
            if step % config.log_every == 0 or step == config.steps:
                _write_log(folder, config, step, numbers, window)
                window = []
            if config.preview_every and preview is not None and step % config.preview_every == 0:
                _preview(preview, step, sides)
            if on_step is not None:
                on_step(step, config.steps, numbers)
            out_of_time = stop_after_seconds is not None and time.time() - started > stop_after_seconds
            if step % config.checkpoint_every == 0 or step == config.steps or out_of_time:
                save()
            if out_of_time:
                log.info("stopped at step %d after %.0f s", step, time.time() - started)
                break
    except Stopped:
        if step > first:
            save()
        raise
    if sides.ema is not None:
        for name, parameter in trainable(task.student).items():
            parameter.data.copy_(sides.ema.shadow[name])
    return task.student


def _step(task: Distillation, config: LoopConfig, sides: _Sides, step: int) -> dict[str, float]:
    """Gradients of both sides from the same micro-batches, then an update of each."""
    seen: dict[str, list[float]] = {}
    for micro in range(config.accumulate):
        generator = step_generator(config.seed, step, micro)
        batch = task.data.batch(step, micro, config.batch)
        losses = task.losses(batch, generator, step=step, steps=config.steps)
        loss = losses.student if losses.heads is None else losses.student + losses.heads
        (loss / config.accumulate).backward()
        for key, value in {"loss": float(losses.student.detach()), **losses.numbers}.items():
            seen.setdefault(key, []).append(value)
    total = {key: sum(values) / len(values) for key, values in seen.items()}
    factor = config.factor(step)
    for name, optimizer in (("", sides.optimizer), ("head_", sides.head_optimizer)):
        if optimizer is None:
            continue
        optimizer.set_factor(factor)
        total[f"{name}gradient_norm"] = optimizer.clip(config.clip)
        waiting = optimizer is sides.optimizer and sides.heads is not None and step < task.config.head_start
        if not waiting:
            optimizer.step()
        optimizer.zero_grad()
    if sides.ema is not None:
        sides.ema.update(sides.student)
    return total


def _preview(preview: Callable[[int, Flux], None], step: int, sides: _Sides) -> None:
    if sides.ema is None:
        preview(step, sides.student)
        return
    with sides.ema.swapped(sides.student):
        preview(step, sides.student)


def _write_log(folder: Path, config: LoopConfig, step: int, numbers: dict[str, float], window: list) -> None:
    seconds = sum(window) / len(window)
    row = {
        "step": step,
        **numbers,
        "seconds_per_step": round(seconds, 4),
        "samples_per_second": round(config.batch * config.accumulate / seconds, 2),
        "seconds_left": round((config.steps - step) * seconds),
    }
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    shown = ", ".join(f"{k} {numbers[k]:.3f}" for k in ("loss", "head_loss", "spread", "mse") if k in numbers)
    log.info("step %d/%d %s, %.0f min left", step, config.steps, shown, row["seconds_left"] / 60)


def _resume(sides: _Sides, watch: Watch, folder: Path) -> int:
    found = load_checkpoint(folder / "checkpoint")
    if found is None:
        return 0
    parts, state = found
    sides.load(parts, state["ema_updates"], folder / "checkpoint")
    watch.load(state["watch"])
    log.info("resumed at step %d from %s", state["step"], folder / "checkpoint")
    return state["step"]
