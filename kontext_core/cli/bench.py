"""`kontext bench`: how many edits of a benchmark a model gets right."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common
from .edit import SAMPLERS

if TYPE_CHECKING:
    from ..tiny.bench import BenchReport
    from ..tiny.chain import ChainReport
    from ..weights.load import KontextModel


def add(commands: argparse._SubParsersAction) -> None:
    """The parser of the command."""
    parser = commands.add_parser(
        "bench",
        help="score a model's edits",
        description="Score a model's edits. The suite `tiny` is the synthetic world, whose scorer knows the truth: "
        "per category the share of edits done (the asked change is there), kept (the rest is), and both.",
    )
    parser.add_argument(
        "--suite", choices=("tiny",), default="tiny", help="the benchmark (default: %(default)s)"
    )
    parser.add_argument(
        "--turns",
        type=common.whole(1),
        metavar="N",
        help="instead: N edits in a row on each of --count pictures, latents chained, and the PSNR against the "
        "first picture where no edit fell",
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="default: %(default)s"
    )
    parser.add_argument(
        "--count",
        type=common.whole(1),
        default=100,
        help="edits a category, or chains (default: %(default)s)",
    )
    parser.add_argument("--seed", type=common.whole(0), default=0, help="which edits, and their noise")
    parser.add_argument("--steps", type=common.whole(1), help="sampling steps (default: the model's own)")
    parser.add_argument(
        "--few-step", type=int, choices=(1, 2, 4), help="steps of the distilled model instead"
    )
    parser.add_argument("--guidance", type=float, help="embedded guidance (default: the model's own)")
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="without --few-step (default: few_step, by which kontext-tiny gets most right in many steps too)",
    )
    parser.add_argument(
        "--shift",
        type=common.shift,
        help="of the schedule, without --few-step: resolution, none, or a number (default: 2.5)",
    )
    parser.add_argument(
        "--batch", type=common.whole(1), default=16, help="edits at once (default: %(default)s)"
    )
    parser.add_argument(
        "--sheet",
        metavar="PNG",
        help="contact sheet (default: output/bench-tiny.png, with --turns output/bench-turns.png)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    common.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score, print the table or the JSON object, write the contact sheet."""
    from ..tiny.bench import run_bench
    from ..tiny.editor import model_editor

    model = common.load_model(args)
    if args.turns is not None:
        return _run_turns(args, model)
    editor = model_editor(
        model, num_steps=args.steps, few_step=args.few_step, seed=args.seed, **_sampling(args)
    )
    steps = args.few_step or args.steps or model.preset.default_steps

    def progress(category: str, done: int, count: int) -> None:
        print(f"{category} {done}/{count}", file=sys.stderr)

    report = run_bench(
        editor,
        args.split,
        args.count,
        args.seed,
        model=model.name,
        steps=steps,
        batch=args.batch,
        on_edit=progress,
    )
    _report(args, report, "output/bench-tiny.png")
    return 0


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What is said of sampling; the rest is the suite's own choice."""
    said = {name: getattr(args, name) for name in ("guidance", "sampler", "shift")}
    return {name: value for name, value in said.items() if value is not None}


def _run_turns(args: argparse.Namespace, model: KontextModel) -> int:
    from ..tiny.chain import run_chains

    report = run_chains(
        model,
        split=args.split,
        count=args.count,
        turns=args.turns,
        seed=args.seed,
        batch=args.batch,
        num_steps=args.steps,
        few_step=args.few_step,
        **_sampling(args),
        on_chain=lambda done, count: print(f"chain {done}/{count}", file=sys.stderr),
    )
    _report(args, report, "output/bench-turns.png")
    return 0


def _report(args: argparse.Namespace, report: BenchReport | ChainReport, place: str) -> None:
    """The contact sheet to its file; the table or the JSON object to standard output."""
    import os

    sheet = Path(args.sheet or place)
    sheet.parent.mkdir(parents=True, exist_ok=True)
    partial = sheet.with_name(sheet.name + ".partial")
    report.sheet.save(partial, format="PNG")
    os.replace(partial, sheet)
    print(json.dumps(report.summary) if args.json else f"{report.table}\n{sheet}")
