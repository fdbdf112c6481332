"""`kontext distill`: a student of 1, 2 and 4 steps by latent adversarial diffusion distillation."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from . import common, interrupts


def add(commands: argparse._SubParsersAction) -> None:
    """The parser of the command and of its stages."""
    parser = commands.add_parser(
        "distill",
        help="distil a model into one of 1, 2 and 4 steps",
        description="Latent adversarial diffusion distillation, in stages: `synthesize` lets the teacher make the "
        "training data, `train` trains the student, `compare` puts it beside its controls.",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE", parser_class=type(parser))
    synthesize = stages.add_parser("synthesize", help="let the teacher make latents for prompts and pictures")
    source = synthesize.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help='JSON lines: {"prompt": …}, "image" for an edit, "size"'
    )
    source.add_argument("--shards", type=Path, metavar="FOLDER", help="source shards: contexts and words")
    synthesize.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="gets the shards")
    synthesize.add_argument(
        "--steps", type=common.whole(1), metavar="N", help="of the teacher (default: its own)"
    )
    synthesize.add_argument(
        "--repeats", type=common.whole(1), default=1, metavar="N", help="pictures a request"
    )
    synthesize.add_argument("--batch", type=common.whole(1), default=4, metavar="N", help="pictures at once")
    synthesize.set_defaults(run=run_synthesize)

    train = stages.add_parser("train", help="train the student on the teacher's latents; goes on if stopped")
    train.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="shards of `synthesize`")
    train.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="checkpoint, log and student"
    )
    train.add_argument(
        "--steps", type=common.whole(1), default=2000, metavar="N", help="default: %(default)s"
    )
    train.add_argument("--batch", type=common.whole(1), default=16, metavar="N", help="default: %(default)s")
    train.add_argument(
        "--accumulate", type=common.whole(1), default=1, metavar="N", help="micro-batches a step"
    )
    train.add_argument("--lr", type=float, default=1e-4, help="of the student (default: %(default)s)")
    train.add_argument(
        "--head-lr", type=float, default=1e-3, help="of the discriminator (default: %(default)s)"
    )
    train.add_argument(
        "--damping",
        type=float,
        default=0.1,
        metavar="W",
        help="of the discriminator: keeps the two sides from circling, for a third more time; 0 for none (default: "
        "%(default)s)",
    )
    train.add_argument(
        "--head-start",
        type=common.whole(0),
        default=60,
        metavar="N",
        help="steps in which the discriminator learns alone (default: %(default)s)",
    )
    train.add_argument(
        "--renoise-mean",
        type=float,
        default=1.0,
        metavar="M",
        help="what the discriminator judges is noised at LogitNormal(M, 1): 1 is for a megapixel, less for smaller "
        "pictures, by half the logarithm of the ratio of their areas (default: %(default)s)",
    )
    train.add_argument(
        "--lora", type=common.whole(0), default=0, metavar="RANK", help="train a LoRA (0: everything)"
    )
    train.add_argument(
        "--objective",
        choices=("ladd", "regression"),
        default="ladd",
        help="regression is the control (default: ladd)",
    )
    train.add_argument("--compile", action="store_true", help="torch.compile each block")
    train.add_argument("--seconds", type=float, metavar="S", help="stop after this long; run again to go on")
    train.set_defaults(run=run_train)

    compare = stages.add_parser("compare", help="student, control and teacher in 1, 2 and 4 steps")
    compare.add_argument(
        "--student", type=Path, required=True, metavar="FILE", help="the distilled transformer"
    )
    compare.add_argument("--control", type=Path, metavar="FILE", help="the regression student")
    compare.add_argument("--data", type=Path, required=True, metavar="FILE", help="a held-out shard")
    compare.add_argument("--batch", type=common.whole(1), default=4, metavar="N", help="pictures at once")
    compare.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    compare.set_defaults(run=run_compare)
    for stage in (synthesize, train, compare):
        stage.add_argument(
            "--guidance", type=float, metavar="G", help="embedded guidance (default: the model's)"
        )
        stage.add_argument("--seed", type=common.whole(0), default=0, metavar="S", help="default: 0")
        common.add_model_options(stage, loras=False)


def _teacher(args: argparse.Namespace, *, words: bool):
    """The model, its networks as a module to distil, and the guidance."""
    from ..training.flow import KontextModule

    model = common.load_model(args)
    module = KontextModule(model.transformer, *((model.t5, model.clip) if words else (None, None)))
    guidance = model.preset.default_guidance if args.guidance is None else args.guidance
    return model, module, guidance


def _shards(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no shards (*.safetensors)")
    return files


def run_synthesize(args: argparse.Namespace) -> int:
    """Make the teacher's latents, shard by shard; finished ones are kept."""
    import torch

    from ..distill.prompts import read_requests, write_request_shards
    from ..distill.synthesize import SynthesisConfig, synthesize

    requests = read_requests(args.prompts) if args.prompts else []
    model, module, guidance = _teacher(args, words=args.shards is not None)
    dtype = _compute_dtype(torch, model.transformer)
    if requests:
        sources = write_request_shards(model, requests, args.output / "sources")
    else:
        sources = _shards(args.shards)
    config = SynthesisConfig(
        num_steps=args.steps or model.preset.default_steps,
        guidance=guidance,
        batch=args.batch,
        repeats=args.repeats,
        seed=args.seed,
    )
    paths = synthesize(
        module,
        sources,
        args.output,
        config,
        dtype=dtype,
        on_shard=lambda done, total: common.say(f"shard {done}/{total}"),
    )
    common.say(f"wrote {len(paths)} shard(s) to {args.output}")
    return 0


def run_train(args: argparse.Namespace) -> int:
    """Train, or go on, and write the student."""
    import torch

    from ..distill.config import DistillConfig
    from ..distill.guards import GuardConfig, check_batch
    from ..distill.ladd import Distillation
    from ..distill.loop import distill
    from ..distill.student import make_student, save_student
    from ..distill.synthesize import shard_groups
    from ..training.data import LatentDataset
    from ..training.loop import LoopConfig

    files = _shards(args.data)
    if args.objective == "ladd":
        check_batch(args.batch, GuardConfig())
        if args.head_start >= args.steps:
            raise ValueError(
                f"--head-start is {args.head_start} of {args.steps} steps: the student would never move; give more "
                "--steps or a smaller --head-start"
            )
    model, module, guidance = _teacher(args, words=True)
    groups = shard_groups(files)
    data = LatentDataset(groups, {name: len(files) for name, files in groups.items()})
    student = make_student(module.transformer, lora_rank=args.lora, seed=args.seed)
    task = Distillation(
        module,
        student,
        data,
        DistillConfig(
            objective=args.objective,
            guidance=guidance,
            head_lr=args.head_lr,
            damping=args.damping,
            head_start=args.head_start,
            renoise_mean=args.renoise_mean,
        ),
        dtype=_compute_dtype(torch, model.transformer),
        compile_blocks=args.compile,
        seed=args.seed,
    )
    loop = LoopConfig(
        steps=args.steps,
        batch=args.batch,
        accumulate=args.accumulate,
        lr=args.lr,
        warmup=min(50, args.steps),
        schedule="stable",
        ema=0.995,
        seed=args.seed,
        checkpoint_every=200,
        log_every=10,
    )
    common.say(f"{len(data)} teacher samples in {len(data.groups)} group(s)")

    def on_step(step: int, steps: int, numbers: dict[str, float]) -> None:
        interrupts.check()
        if step % loop.log_every == 0 or step == steps:
            shown = ", ".join(
                f"{name} {numbers[name]:.3f}" for name in ("loss", "head_loss") if name in numbers
            )
            common.say(f"step {step}/{steps}, {shown}")

    distill(task, loop, args.output, stop_after_seconds=args.seconds, on_step=on_step)
    name = f"{model.name}-fewstep{'-lora' if args.lora else ''}.safetensors"
    save_student(student, args.output / name)
    common.say(f"wrote {args.output / name}")
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Sample everything on a held-out shard and print the table."""
    import torch
    from safetensors.torch import load_file

    from ..distill.compare import compare_students, table
    from ..distill.synthesize import SynthesisConfig
    from ..weights.load import load_transformer

    if not args.data.is_file():
        raise ValueError(f"--data {args.data} is no file: give one held-out shard")
    model, module, guidance = _teacher(args, words=True)
    device = next(model.transformer.parameters()).device
    students = {"student": load_transformer(args.student, device=device)}
    if args.control:
        students["regression"] = load_transformer(args.control, device=device)
    config = SynthesisConfig(
        num_steps=model.preset.default_steps, guidance=guidance, batch=args.batch, seed=args.seed
    )
    rows = compare_students(
        module, students, load_file(args.data), config=config, dtype=_compute_dtype(torch, model.transformer)
    )
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
    else:
        print(table(rows))
    return 0


def _compute_dtype(torch, transformer):
    """The weights' own type, bfloat16 where they are packed; float32 on a CPU without fast bfloat16."""
    from ..devices import fast_dtype

    parameter = next(transformer.parameters())
    dtype = parameter.dtype if parameter.dtype in (torch.float32, torch.bfloat16) else torch.bfloat16
    return fast_dtype(parameter.device, dtype)
