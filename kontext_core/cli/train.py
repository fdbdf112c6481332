"""`kontext train`: a LoRA, the whole transformer, or distilled guidance, from a folder of pairs."""

from __future__ import annotations

import argparse
import os
import sys
import time

from . import common, interrupts

_DESCRIPTION = (
    "Train on a folder of target pictures with .txt captions and a folder of control pictures with the same file "
    "names (without --control: text to image). The run lives in --output; the same command goes on where it was "
    "stopped. Several devices: torchrun --nproc-per-node N -m kontext_core train …"
)


def add(commands: argparse._SubParsersAction) -> None:
    """The parser of the command. Options that are not given leave the --config file's or the default."""
    parser = commands.add_parser(
        "train",
        help="train a LoRA or the transformer on pairs",
        description=_DESCRIPTION,
        argument_default=None,
    )
    whole = common.whole
    parser.add_argument("data", nargs="?", metavar="FOLDER", help="targets and their .txt captions")
    parser.add_argument("--config", metavar="FILE", help="JSON object of settings; options given here win")
    parser.add_argument("--output", metavar="FOLDER", help="folder of the run")
    parser.add_argument("--control", metavar="FOLDER", help="context pictures, named like the targets")
    parser.add_argument("--caption", metavar="TEXT", help="for targets without a .txt")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")

    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME|PATH", help="what is trained (default: kontext-tiny)")
    for part in ("t5", "clip", "vae"):
        group.add_argument(
            f"--{part}", metavar="PATH", help=f"{part} file or folder that is not beside the model"
        )
    for name in ("--t5-tokenizer", "--clip-tokenizer"):
        group.add_argument(
            name, metavar="PATH", help="folder or tokenizer.json that is not beside its encoder"
        )
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help="compute in this (default: bfloat16)")
    group.add_argument("--device", help="cpu, cuda … (default: cuda where there is one)")

    group = parser.add_argument_group("method")
    group.add_argument(
        "--method", choices=("lora", "full", "guidance"), help="what is trained (default: lora)"
    )
    group.add_argument("--rank", type=whole(1), help="of the LoRA (default: 16)")
    group.add_argument("--alpha", type=float, help="of the LoRA (default: its rank)")
    group.add_argument("--targets", help="attention, blocks, all, or an expression for layer names")
    group.add_argument(
        "--guidance", type=float, nargs=2, metavar=("LOW", "HIGH"), help="embedded guidance, drawn"
    )

    group = parser.add_argument_group("steps")
    group.add_argument("--steps", type=whole(1), help="optimizer steps in all (default: 1000)")
    group.add_argument("--batch", type=whole(1), help="pairs a micro-batch, of all processes (default: 1)")
    group.add_argument("--accumulate", type=whole(1), help="micro-batches a step (default: 1)")
    group.add_argument("--lr", type=float, help="AdamW's peak (default: 1e-4)")
    group.add_argument("--muon-lr", type=float, help="Muon's, for hidden matrices (default: 0, none)")
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--warmup", type=whole(0), help="steps (default: 20)")
    group.add_argument("--schedule", choices=("cosine", "stable"))
    group.add_argument("--ema", type=float, help="decay of averaged weights (default: 0, none)")
    group.add_argument("--clip-norm", type=float, help="largest gradient norm (default: 1)")
    group.add_argument("--seed", type=int)
    group.add_argument("--stop-after", type=float, metavar="SECONDS", help="stop politely, to go on later")

    group = parser.add_argument_group("examples")
    group.add_argument("--areas", type=whole(256), nargs="+", metavar="PIXELS", help="such as 262144 1048576")
    group.add_argument("--progressive", action="store_true", default=None, help="small areas first")
    group.add_argument("--fit", choices=("crop", "stretch", "pad", "keep"), help="(default: crop)")
    group.add_argument("--caption-dropout", type=float, help="(default: 0.05)")
    group.add_argument("--t-mean", type=float, help="of the logit-normal times (default: 0)")
    group.add_argument("--t-std", type=float, help="(default: 1)")
    group.add_argument(
        "--shift", type=common.shift, help="resolution, none, or a number (default: resolution)"
    )

    group = parser.add_argument_group("memory and speed")
    group.add_argument("--checkpointing", choices=("none", "selective", "full"), help="of activations")
    group.add_argument("--compile", action="store_true", default=None, help="torch.compile each block")

    group = parser.add_argument_group("what is written")
    group.add_argument("--checkpoint-every", type=whole(1), metavar="STEPS")
    group.add_argument("--log-every", type=whole(1), metavar="STEPS")
    group.add_argument("--preview-every", type=whole(1), metavar="STEPS")
    group.add_argument("--preview-prompt", metavar="TEXT")
    group.add_argument("--preview-image", metavar="FILE")
    group.add_argument("--preview-steps", type=whole(1), help="denoising steps of a preview")
    group.add_argument("--plot", action="store_true", default=None, help="draw loss.png (needs matplotlib)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train."""
    from ..training import config as settings

    values = settings.read_config(args.config) if args.config else {}
    given = {name: value for name, value in vars(args).items() if value is not None}
    known = settings.TrainConfig.__dataclass_fields__
    values |= {name: value for name, value in given.items() if name in known}
    for name in ("areas", "guidance"):
        if name in given:
            values[name] = tuple(given[name])
    if args.preview_prompt is not None:
        values["previews"] = ({"prompt": args.preview_prompt, "image": args.preview_image},)
    missing = [name for name in ("data", "output") if name not in values]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not given: name the folder of targets, and --output")
    if values.get("plot"):
        _need_matplotlib()
    config = settings.TrainConfig(**values)

    from ..training.run import run as train

    started = time.perf_counter()
    # of torchrun's processes the first one alone speaks
    speaks = os.environ.get("RANK", "0") == "0"
    result = train(config, on_step=_Steps(speaks), on_pair=_pairs)
    if not speaks:
        return 0
    if args.json:
        common.print_json(
            {
                "output": str(result.output),
                "method": config.method,
                "step": result.step,
                "steps": result.steps,
                "loss": result.loss,
                "examples": result.examples,
                "parameters": result.parameters,
                "seconds": round(time.perf_counter() - started, 2),
                "peak_rss_bytes": common.peak_rss_bytes(),
            }
        )
    else:
        common.say(f"{result.output}: {result.step} of {result.steps} steps on {result.examples} examples")
    return 0


class _Steps:
    """One line that changes on a terminal; in a log, a line whenever a tenth of the way is done.

    `speaks`: whether to print at all; interrupts are heard all the same.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self.first: tuple[int, float] | None = None
        self.live = sys.stderr.isatty()

    def __call__(self, step: int, steps: int, loss: float) -> None:
        interrupts.check()
        if not self.speaks:
            return
        now = time.perf_counter()
        first = self.first = self.first or (step, now)
        line = f"step {step}/{steps}, loss {loss:.4f}"
        if step > first[0]:
            line += f", {(now - first[1]) / (step - first[0]) * (steps - step):.0f} s left"
        if self.live:
            print(f"\r{line:<60}", end="\n" if step == steps else "", file=sys.stderr, flush=True)
        elif step == steps or 10 * step // steps > 10 * (step - 1) // steps:
            common.say(line)


def _pairs(done: int, total: int) -> None:
    if done == total or done % 20 == 0:
        common.say(f"encoded {done}/{total}")


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install flux-kontext[plot]")
