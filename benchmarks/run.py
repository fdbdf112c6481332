"""Speed in one run: `python benchmarks/run.py [NAME …] [--json] [--quick]`; all of it without a name.

block    one block of the published width beside diffusers, ComfyUI, the reference and its own limit
host     our MODEL in a real ComfyUI beside a native MODEL of the same weights
context  what each accelerated mode saves and what it costs in edits done and kept, with kontext-tiny
many     batches of prompts over one reference and of references over one prompt, per picture
growth   time, memory and operations against pixels, references, steps and batch, and a plot of them
start    imports, the command line, the pack, the first and the second edit

Peers take part where they are: diffusers if installed, ComfyUI from COMFYUI_PATH or as dev.py prepares it, and
FLUX_REFERENCE=/path/to/flux for black-forest-labs' own code. All rivals run in turn over the same weights; what is
quoted is the median over the rounds of the ratios within a round. `--json` prints one object: the report of the one
name given, or {name: report}.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NAMES = ("block", "host", "context", "many", "growth", "start")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: does it run?")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="picture tokens of a block (default: 2048 8192)"
    )
    parser.add_argument("--text", type=int, help="text tokens (default: 512)")
    parser.add_argument("--rounds", type=int, help="rounds of all rivals in turn (default: 3)")
    parser.add_argument("--count", type=int, help="edits a category that are scored (default: 100)")
    parser.add_argument("--modes", nargs="+", help="of context, by their names in its table (default: all)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: what is fast here"
    )
    parser.add_argument("--plot", type=Path, help="where growth draws (default: output/growth.png)")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; choose from {', '.join(NAMES)}")
    names = args.names or list(NAMES)
    reports = {}
    for name in names:
        report = RUNNERS[name](args)
        reports[name] = report
        if not args.json:
            print(importlib.import_module(MODULES[name]).as_text(report), end="\n\n", flush=True)
    if args.json:
        print(json.dumps(reports[names[0]] if len(args.names) == 1 else reports))


MODULES = {name: {"host": "host_step"}.get(name, name) for name in NAMES}


def _place(args: argparse.Namespace):
    """(device, dtype): as asked, else the fastest device and what it is fast at."""
    import torch

    from kontext_core.devices import fast_dtype

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, getattr(torch, args.dtype) if args.dtype else fast_dtype(device, torch.bfloat16)


def run_block(args: argparse.Namespace) -> dict:
    import block

    quick = args.quick
    return block.measure(
        args.tokens or ([256] if quick else [2048, 8192]),
        args.text or (64 if quick else 512),
        args.rounds or (1 if quick else 3),
        *_place(args),
    )


def run_context(args: argparse.Namespace) -> dict:
    import context

    quick = args.quick
    tokens = (args.tokens or [256 if quick else 1024])[0]
    count = args.count or (4 if quick else 100)
    rounds = 1 if quick else args.rounds or 3
    modes = args.modes or tuple(context.MODES)
    return context.measure(count, 16, tokens, args.text or tokens // 8, rounds, *_place(args), modes)


def run_host(args: argparse.Namespace) -> dict:
    import host_step

    quick = args.quick
    tokens = (args.tokens or [64 if quick else 1024])[0]
    side = 2 * round(tokens**0.5)
    hidden = 512 if quick else 3072
    text = args.text or max(tokens // 8, 8)
    return host_step.measure(
        side, text, 2 if quick else 4, args.rounds or (1 if quick else 3), *_place(args), hidden
    )


def run_many(args: argparse.Namespace) -> dict:
    import many

    counts = [1, 2] if args.quick else [1, 2, 4, 8, 16]
    return many.measure(counts, 1 if args.quick else args.rounds or 5, *_place(args))


def run_growth(args: argparse.Namespace) -> dict:
    import growth

    plot = args.plot or ROOT / "output" / "growth.png"
    return growth.measure(args.rounds or (1 if args.quick else 3), args.quick, plot, *_place(args))


def run_start(args: argparse.Namespace) -> dict:
    import start

    return start.measure(args.rounds or (1 if args.quick else 3))


RUNNERS = {
    "block": run_block,
    "host": run_host,
    "context": run_context,
    "many": run_many,
    "growth": run_growth,
    "start": run_start,
}


if __name__ == "__main__":
    main()
