"""A user's run, from folder to file: load, encode, train, save. What the `train` command calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..images import load_image
from ..models.attention import attention
from ..weights.formats import TRANSFORMER
from ..weights.load import build, load_model
from ..weights.parts import open_part
from . import activation, mixed, parallel
from .checkpoint import save_weights
from .config import TrainConfig
from .flow import FlowConfig, FlowTask, KontextModule
from .guidance import GuidanceTask, student_of
from .loop import LoopConfig, train
from .lora import LoraLinear, add_lora, save_trained_lora
from .pairs import empty_prompt, find_pairs, load_pairs
from .preview import plot_loss, preview_writer, read_log

if TYPE_CHECKING:
    from ..models.transformer import Flux
    from ..weights.load import KontextModel

log = logging.getLogger("kontext")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run left: the file, steps done of steps asked for, the last loss logged, examples, parameters trained."""

    output: Path
    step: int
    steps: int
    loss: float | None
    examples: int
    parameters: int


def run(
    config: TrainConfig,
    *,
    on_step: Callable[[int, int, float], None] | None = None,
    on_pair: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Train as the configuration says, or go on with the run in its folder.

    Under torchrun all processes call this alike; the first one encodes and writes.

    Args:
        on_step: called with (step, steps, loss); on_pair: with (done, total) while pictures are encoded.

    Raises:
        ValueError: a setting, picture or model that does not fit, named.
    """
    loop, flow = _loop_config(config), _flow_config(config)
    pairs = find_pairs(config.data, config.control, default_caption=config.caption)
    dtype = getattr(torch, config.dtype)
    world = parallel.start()
    try:
        if config.previews and world.size > 1:
            raise ValueError("previews are made by a single process: leave them out under torchrun")
        folder = Path(config.output)
        device = config.device or (
            f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else None
        )
        places = {
            name: getattr(config, name) for name in ("t5", "clip", "vae", "t5_tokenizer", "clip_tokenizer")
        }
        model = load_model(config.model, **places, dtype=dtype, device=device)

        def load():
            span = config.steps // max(1, len(set(config.areas)))
            return load_pairs(
                model,
                pairs,
                folder / "data",
                areas=config.areas or (model.preset.max_area,),
                fit=config.fit,
                phase_steps=span if config.progressive else None,
                on_pair=on_pair,
            )

        if world.rank:
            world.wait()  # the first process encodes, the others then find everything done
        data = load()
        if not world.rank:
            world.wait()
        empty = empty_prompt(model)
        preview = None
        if config.preview_every:
            preview = preview_writer(
                model, folder / "previews", _edits(config), num_steps=config.preview_steps, seed=config.seed
            )
        module, layers, teacher = _modules(config, model, device, world)
        if preview is None:
            model = None  # gives the encoders' memory back
        options = {
            "empty": empty,
            "dtype": dtype,
            "compile_blocks": config.compile,
            "attend": attention,
            "checkpointing": activation.hooks(config.checkpointing),
            "world": world,
        }
        if teacher is None:
            task = FlowTask(module, data, flow, **options)
        else:
            task = GuidanceTask(module, data, flow, teacher=teacher, **options)
        train(
            task,
            loop,
            folder,
            preview=preview,
            on_step=on_step,
            stop_after_seconds=config.stop_after,
            world=world,
        )
        output = _save(config, module, layers, folder, world)
        rows = read_log(folder / "log.jsonl") if world.rank == 0 and (folder / "log.jsonl").is_file() else []
        if config.plot and rows:
            plot_loss(folder / "log.jsonl", folder / "loss.png")
        return TrainResult(
            output=output,
            step=rows[-1]["step"] if rows else 0,
            steps=config.steps,
            loss=rows[-1]["loss"] if rows else None,
            examples=len(data),
            parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        )
    finally:
        parallel.stop(world)


def master_weights(model: KontextModel, device) -> Flux:
    """The model's transformer with float32 weights of its own memory, computing in the dtype it is given."""
    part = open_part(model.files[TRANSFORMER], TRANSFORMER)
    transformer = build(part, dtype=torch.float32, device=device, operations=mixed)
    for parameter in transformer.parameters():
        # a float32 file's weights are views of the file
        parameter.data = parameter.data.clone()
    return transformer.requires_grad_(True).train()


def _modules(
    config: TrainConfig, model: KontextModel, device, world: parallel.World
) -> tuple[KontextModule, dict[str, LoraLinear], KontextModule | None]:
    """(what is trained, its LoRA layers, the teacher), sharded."""
    layers: dict[str, LoraLinear] = {}
    teacher = None
    if config.method == "lora":
        # FSDP wants one dtype a unit; alone, the base stays as it is stored
        transformer = model.transformer if world.size == 1 else master_weights(model, device)
        layers = add_lora(
            transformer, rank=config.rank, alpha=config.alpha, targets=config.targets, seed=config.seed
        )
    elif config.method == "full":
        transformer = master_weights(model, device)
    else:
        transformer = student_of(master_weights(model, device)).requires_grad_(True)
        teacher = KontextModule(model.transformer)
    module = KontextModule(transformer)
    parallel.shard(module, world, getattr(torch, config.dtype))
    return module, layers, teacher


def _save(
    config: TrainConfig, module: nn.Module, layers: dict[str, LoraLinear], folder: Path, world: parallel.World
) -> Path:
    """Write lora.safetensors or transformer.safetensors; every process gathers, the first one writes."""
    metadata = {
        "format": "pt",
        "method": config.method,
        "base": Path(config.model).name,
        "steps": str(config.steps),
    }
    if config.method == "lora":
        output = folder / "lora.safetensors"
        for layer in layers.values():
            for name in ("down", "up"):
                value = parallel.full(getattr(layer, name)).detach()
                setattr(layer, name, nn.Parameter(value))
        if world.rank == 0:
            metadata |= {"rank": str(config.rank), "targets": config.targets}
            save_trained_lora(output, layers, metadata=metadata)
        return output
    output = folder / "transformer.safetensors"
    weights: dict[str, Tensor] = {}
    for name, parameter in module.transformer.named_parameters():
        weights[name] = parallel.full(parameter).detach().to("cpu", getattr(torch, config.dtype))
    if world.rank == 0:
        save_weights(output, weights, metadata)
    return output


def _edits(config: TrainConfig) -> list[tuple[Tensor | None, str]]:
    edits = []
    for preview in config.previews:
        image = preview.get("image")
        edits.append((None if image is None else load_image(image).image, str(preview["prompt"])))
    return edits


def _loop_config(config: TrainConfig) -> LoopConfig:
    names = LoopConfig.__dataclass_fields__.keys() & asdict(config).keys() - {"clip"}
    return LoopConfig(clip=config.clip_norm, **{name: getattr(config, name) for name in names})


def _flow_config(config: TrainConfig) -> FlowConfig:
    """Pairs have no weights by token; guidance is 1 in training but for a student, who learns a range."""
    usual = (1.0, 5.0) if config.method == "guidance" else (1.0, 1.0)
    return FlowConfig(
        t_mean=config.t_mean,
        t_std=config.t_std,
        shift=config.shift,
        changed_weight=0.0,
        caption_dropout=config.caption_dropout,
        guidance=config.guidance or usual,
    )
