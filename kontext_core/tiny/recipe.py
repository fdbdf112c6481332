"""The recipe of kontext-tiny: one command a stage, `python -m kontext_core.tiny.recipe STAGE`.

Stages, in order: `autoencoder`, `encode` (latents of the world on disk), `read` (the text encoders, from words alone),
`flow` (transformer and text encoders), `guidance` (two passes into one), `distill` (the few-step students), `export`.
Each goes on where it was stopped; work lands in runs/tiny by default. With `--warm` `autoencoder`, `read`, `flow`,
`guidance` and `distill` start from the bundled weights, and `encode` and `export` take the bundled autoencoder. See
docs/training.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ..training import parallel
from ..training.checkpoint import load_checkpoint, save_weights
from ..training.data import LatentDataset
from ..training.flow import FlowConfig, FlowTask, KontextModule
from ..training.guidance import GuidanceTask
from ..training.loop import LoopConfig, train
from .autoencode import train_autoencoder, train_half
from .configs import write_text_configs
from .distill import LADD, LOOP, SYNTHESIS, distill_tiny
from .encode import encode_world, shard_jobs
from .parts import ASSETS, DTYPE, build_module, load_bundled
from .reading import train_reading

log = logging.getLogger("kontext")

MIX = {
    "local": 0.22,
    "several": 0.20,
    "global": 0.11,
    "text": 0.15,
    "style": 0.11,
    "character": 0.13,
    "generate": 0.08,
}
"""Shares of what the flow sees: local edits have the most kinds."""


def load_data(
    folder: Path, *, square: bool, categories: Sequence[str] = (), alone: Sequence[str] = ()
) -> LatentDataset:
    """Every finished shard of the training split, grouped by kind and size, drawn in proportion to their numbers.

    Args:
        square: only the pictures of 128×128, the first and longest part of the training.
        categories: only these of the world's; all when empty.
        alone: of these, whether they are among `categories` or not, each shard once more without its contexts.
    """
    groups: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*-train-*.safetensors")):
        group, rest = file.name.split("-train-")
        category = rest.split("-")[0]
        if square and not group.endswith("128x128"):
            continue
        if not categories or category in categories:
            groups.setdefault(group, []).append(file)
        if category in alone:
            groups.setdefault(f"alone-{group}", []).append(file)
    weights = {name: len(files) for name, files in groups.items()}
    return LatentDataset(groups, weights, alone=[name for name in groups if name.startswith("alone-")])


def train_flow(
    folder: Path,
    latents: Path,
    config: LoopConfig,
    flow: FlowConfig,
    *,
    compile_blocks: bool,
    square: bool,
    categories: Sequence[str],
    seconds: float | None,
    warm: bool = False,
    reading: Path | None = None,
    alone: Sequence[str] = (),
) -> None:
    """Train transformer and text encoders together on the encoded world; processes of torchrun share each step.

    `reading`: the folder of the stage before; where it was run, its encoders are what this one begins with.
    """
    world = parallel.start()
    module, empty = build_module()
    if warm:
        load_bundled(module)
    found = load_checkpoint(reading / "checkpoint") if reading is not None else None
    if found is not None:
        weights = found[0].get("ema") or found[0]["weights"]
        for name, encoder in (("t5.", module.t5), ("clip.", module.clip)):
            encoder.load_state_dict({k[len(name) :]: v for k, v in weights.items() if k.startswith(name)})
    data = load_data(latents, square=square, categories=categories, alone=alone)
    log.info("%d examples in %d groups", len(data), len(data.groups))
    task = FlowTask(module, data, flow, empty=empty, dtype=DTYPE, compile_blocks=compile_blocks, world=world)
    train(task, config, folder, stop_after_seconds=seconds, world=world)
    parallel.stop(world)


def last_stage(runs: Path) -> Path:
    """The folder of the guidance stage where there is one, else of the flow's.

    Raises:
        ValueError: the guidance stage was begun and not finished.
    """
    found = load_checkpoint(runs / "guidance" / "checkpoint")
    if found is None:
        return runs / "flow"
    step, steps = found[1]["step"], found[1]["config"]["steps"]
    if step < steps:
        raise ValueError(
            f"{runs / 'guidance'} stands at step {step} of {steps}: run the guidance stage to its end, or move it away "
            "to go on with the flow's weights"
        )
    return runs / "guidance"


def trained(runs: Path, *, warm: bool) -> tuple[KontextModule, tuple[Tensor, Tensor]]:
    """The teacher of the later stages: the bundled weights if `warm`, else the averages of the flow stage; and the
    empty prompt's ids. A guidance stage comes before the flow's.

    Raises:
        ValueError: no such stage was run, or the guidance stage was begun and not finished.
    """
    module, empty = build_module()
    if warm:
        load_bundled(module)
        return module, empty
    found = load_checkpoint(last_stage(runs) / "checkpoint")
    if found is None:
        raise ValueError(
            f"no checkpoint in {runs}: run the flow stage first, or start from the bundled --warm"
        )
    parts, _ = found
    module.load_state_dict(parts.get("ema") or parts["weights"])
    return module, empty


def train_guidance(
    runs: Path,
    config: LoopConfig,
    *,
    above: float,
    gain: float,
    compile_blocks: bool,
    square: bool,
    seconds: float | None,
    warm: bool,
) -> None:
    """Distil classifier-free guidance of the flow's model into its guidance embedding; work in `runs`/guidance.

    Processes of torchrun share each step. `above`, `gain`: see `training.guidance`.
    """
    world = parallel.start()
    teacher, empty = build_module()
    if warm:
        load_bundled(teacher)
    else:
        found = load_checkpoint(runs / "flow" / "checkpoint")
        if found is None:
            raise ValueError(f"no checkpoint in {runs / 'flow'}: run the flow stage first, or give --warm")
        teacher.load_state_dict(found[0].get("ema") or found[0]["weights"])
    module = copy.deepcopy(teacher)
    task = GuidanceTask(
        module,
        load_data(runs / "latents", square=square),
        FlowConfig(guidance=(1.0, 4.0)),
        empty=empty,
        dtype=DTYPE,
        compile_blocks=compile_blocks,
        teacher=teacher,
        above=above,
        gain=gain,
        world=world,
    )
    train(task, config, runs / "guidance", stop_after_seconds=seconds, world=world)
    parallel.stop(world)


def autoencoder_of(runs: Path, *, warm: bool) -> Path:
    """The file of the autoencoder stage; the bundled one if `warm`.

    Raises:
        ValueError: the stage was not run.
    """
    file = ASSETS / "ae.safetensors" if warm else runs / "autoencoder" / "ae.safetensors"
    if not file.exists():
        raise ValueError(f"no {file}: run the autoencoder stage first, or take the bundled one with --warm")
    return file


def export(destination: Path, *, flow: Path, autoencoder: Path) -> None:
    """Write the averaged weights of the last checkpoint as the bundled model folder, bfloat16."""
    found = load_checkpoint(flow / "checkpoint")
    if found is None:
        raise ValueError(f"no checkpoint in {flow}: run the flow stage first")
    parts, state = found
    weights = {name: value.bfloat16() for name, value in (parts.get("ema") or parts["weights"]).items()}

    def of(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}

    metadata = {"format": "pt", "model": "kontext-tiny", "steps": str(state["step"])}
    save_weights(destination / "flux1-kontext-tiny.safetensors", of("transformer."), metadata)
    save_weights(destination / "text_encoder" / "model.safetensors", of("clip."), {"format": "pt"})
    save_weights(destination / "text_encoder_2" / "model.safetensors", of("t5."), {"format": "pt"})
    halves = {name: value.bfloat16() for name, value in load_file(autoencoder).items()}
    save_weights(destination / "ae.safetensors", halves, {"format": "pt"})
    module, _ = build_module()
    write_text_configs(destination, module.t5.params, module.clip.params)


def _mix(text: str) -> dict[str, float]:
    """Shares that add up to 1, of text such as local=0.5,text=0.5; see `encode.shard_jobs` for names of kinds."""
    parts = [part.partition("=") for part in text.split(",")]
    unknown = [name for name, _, _ in parts if name.partition(":")[0] not in MIX]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no category; use {', '.join(MIX)}")
    try:
        shares = {name: float(value) for name, _, value in parts}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; use local=0.5,text=0.5") from error
    if min(shares.values()) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: every share is more than 0")
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "stage", choices=("autoencoder", "encode", "read", "flow", "guidance", "distill", "export")
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="working folder")
    parser.add_argument(
        "--steps", type=int, default=None, help="steps of the stage (the recipe's by default)"
    )
    parser.add_argument("--examples", type=int, default=40_000, help="encode, read: how many")
    parser.add_argument(
        "--first", type=int, default=0, help="encode, read: number of the first scene of each category"
    )
    parser.add_argument("--shard", type=int, default=500, help="encode: examples a file")
    parser.add_argument(
        "--mix",
        type=_mix,
        default=MIX,
        help="encode: shares, as local=0.5,local:replace+smaller=0.2,text=0.3",
    )
    parser.add_argument("--habit", action="store_true", help="encode: open layouts are the usual ones")
    parser.add_argument("--workers", type=int, default=2, help="encode, read: processes")
    parser.add_argument("--batch", type=int, default=64, help="flow, guidance: examples a step")
    parser.add_argument("--compile", action="store_true", help="flow: torch.compile each block")
    parser.add_argument(
        "--lr",
        type=float,
        default=None,
        help="read, flow, autoencoder --only: AdamW's, Muon's is twice it; guidance, distill: the student's",
    )
    parser.add_argument("--t-mean", type=float, default=FlowConfig.t_mean, help="flow: of the logit-normal t")
    parser.add_argument(
        "--target-tokens", type=int, default=0, help="flow: tokens of a picture that are trained on (all)"
    )
    parser.add_argument("--text-tokens", type=int, default=0, help="flow: tokens of a prompt (all)")
    parser.add_argument(
        "--supervision",
        type=float,
        default=FlowConfig.supervision,
        help="flow: weight of what each token is asked",
    )
    parser.add_argument(
        "--context-supervision",
        type=float,
        default=FlowConfig.context_supervision,
        help="flow: the same of the context's tokens",
    )
    parser.add_argument(
        "--decay",
        type=float,
        default=LoopConfig.decay,
        help="flow: share of the steps in which the rates fall",
    )
    parser.add_argument(
        "--ema", type=float, help="flow, guidance: decay of the averaged weights (0.998, 0.99)"
    )
    parser.add_argument("--above", type=float, default=0.0, help="guidance: t from which on there is any")
    parser.add_argument("--gain", type=float, default=1.0, help="guidance: scale s asks for 1 + gain*(s - 1)")
    parser.add_argument("--all-sizes", action="store_true", help="flow: not the square pictures alone")
    parser.add_argument("--categories", default="", help="flow: only these, comma-separated")
    parser.add_argument(
        "--alone", default="", help="flow: of these categories, shards once more without their contexts"
    )
    parser.add_argument("--warm", action="store_true", help="start from the bundled weights")
    parser.add_argument(
        "--only",
        choices=("encoder", "decoder"),
        help="autoencoder: one half of the bundled one on whole pictures",
    )
    parser.add_argument(
        "--head-start", type=int, default=LADD.head_start, help="distill: steps of the heads alone"
    )
    parser.add_argument("--damping", type=float, default=LADD.damping, help="distill: of the heads")
    parser.add_argument("--teacher-steps", type=int, default=SYNTHESIS.num_steps, help="distill: of a sample")
    parser.add_argument("--lora", type=int, default=0, help="distill: rank of a LoRA student beside (none)")
    parser.add_argument("--no-control", action="store_true", help="distill: no regression student")
    parser.add_argument("--to", type=Path, default=ASSETS, help="export: the model folder to write")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this long, resumable")
    args = parser.parse_args()
    if args.stage not in ("flow", "guidance") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error(
            f"{args.stage} runs in one process: start it without torchrun, which serves flow and guidance alone"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.stage == "autoencoder":
        folder = args.runs / "autoencoder"
        if args.only:
            train_half(
                folder,
                args.only,
                steps=args.steps or 700,
                pool=6000,
                batch=32,
                lr=args.lr or 3e-4,
                seconds=args.seconds,
            )
            return
        train_autoencoder(
            folder,
            steps=args.steps or 1400,
            finish_steps=150,
            pool=3000,
            batch=16,
            seconds=args.seconds,
            warm=args.warm,
        )
    elif args.stage == "encode":
        jobs = [
            replace(job, start=args.first + job.start)
            for job in shard_jobs(
                "train", args.examples, weights=args.mix, shard=args.shard, habit=args.habit
            )
        ]
        encode_world(
            jobs, autoencoder_of(args.runs, warm=args.warm), ASSETS, args.runs / "latents", args.workers
        )
    elif args.stage == "read":
        module, _ = build_module()
        if args.warm:
            load_bundled(module)
        train_reading(
            module,
            args.runs / "reading",
            tokenizers=ASSETS,
            steps=args.steps or 1300,
            examples=args.examples,
            first=args.first,
            workers=args.workers,
            lr=args.lr or 6e-4,
            seconds=args.seconds,
        )
    elif args.stage == "flow":
        lr = args.lr or (5e-4 if args.warm else 1e-3)
        config = LoopConfig(
            steps=args.steps or 4000,
            batch=args.batch,
            lr=lr,
            muon_lr=2 * lr,
            warmup=20 if args.warm else 100,
            schedule="stable",
            decay=args.decay,
            ema=0.998 if args.ema is None else args.ema,
            checkpoint_every=200,
        )
        train_flow(
            args.runs / "flow",
            args.runs / "latents",
            config,
            FlowConfig(
                t_mean=args.t_mean,
                supervision=args.supervision,
                context_supervision=args.context_supervision,
                target_tokens=args.target_tokens,
                text_tokens=args.text_tokens,
            ),
            compile_blocks=args.compile,
            square=not args.all_sizes,
            categories=args.categories.split(",") if args.categories else (),
            seconds=args.seconds,
            warm=args.warm,
            reading=args.runs / "reading",
            alone=args.alone.split(",") if args.alone else (),
        )
    elif args.stage == "guidance":
        config = LoopConfig(
            steps=args.steps or 600,
            batch=args.batch,
            lr=args.lr or 1e-4,
            warmup=20,
            schedule="stable",
            ema=0.99 if args.ema is None else args.ema,
            checkpoint_every=100,
        )
        train_guidance(
            args.runs,
            config,
            above=args.above,
            gain=args.gain,
            compile_blocks=args.compile,
            square=not args.all_sizes,
            seconds=args.seconds,
            warm=args.warm,
        )
    elif args.stage == "distill":
        teacher, _ = trained(args.runs, warm=args.warm)
        students = distill_tiny(
            args.runs,
            teacher,
            examples=min(args.examples, 7_000),
            loop=replace(
                LOOP,
                steps=args.steps or LOOP.steps,
                batch=min(args.batch, LOOP.batch),
                lr=args.lr or LOOP.lr,
            ),
            config=replace(LADD, head_start=args.head_start, damping=args.damping),
            synthesis=replace(SYNTHESIS, num_steps=args.teacher_steps),
            control=not args.no_control,
            lora_rank=args.lora,
            compile_blocks=args.compile,
            seconds=args.seconds,
            dtype=DTYPE,
        )
        log.info("finished: %s" if students.finished else "to be gone on with: %s", students.ladd)
    else:
        export(args.to, flow=last_stage(args.runs), autoencoder=autoencoder_of(args.runs, warm=args.warm))
        student = args.runs / "distill" / "ladd.safetensors"
        if student.exists():
            weights = load_file(student)
            save_weights(args.to / "flux1-kontext-tiny-fewstep.safetensors", weights, {"format": "pt"})


if __name__ == "__main__":
    main()
