"""`kontext inspect`, `convert` and `quantize`: what a weights file is, and the same weights in another format."""

from __future__ import annotations

import argparse
import sys

from . import common

CONVERT_TO = ("bfl", "diffusers", "fp8_scaled", "fp8_scaled_old")
QUANTIZE_TO = (
    *("fp8_scaled", "fp8_scaled_old", "BF16", "F16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"),
    *("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
)
PARTS = ("transformer", "autoencoder", "t5", "clip")


def add(commands: argparse._SubParsersAction) -> None:
    """The parsers of the three commands."""
    inspect = commands.add_parser(
        "inspect",
        help="say what a file of weights is",
        description="Say what a file or folder of weights is: format, part, parameters, dtypes, what is missing. "
        "Only headers are read.",
    )
    inspect.add_argument("files", nargs="+", metavar="FILE", help="file, index or folder")
    inspect.add_argument("--json", action="store_true", help="print one JSON object a file")
    inspect.set_defaults(run=run_inspect)

    convert = commands.add_parser(
        "convert",
        help="write weights in another format",
        description="Write weights in another format, tensor by tensor, never the whole file in memory.",
    )
    convert.add_argument("--to", required=True, choices=CONVERT_TO, help="the format")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of plain weights")
    convert.set_defaults(run=run_convert)

    quantize = commands.add_parser(
        "quantize",
        help="write smaller weights",
        description="Write a transformer or T5 encoder as scaled float8 or as GGUF.",
    )
    quantize.add_argument("--type", required=True, choices=QUANTIZE_TO, help="what the layers are stored as")
    quantize.set_defaults(run=run_quantize)
    for parser in (convert, quantize):
        parser.add_argument(
            "source", metavar="SOURCE", help="file, index or folder of any format that is read"
        )
        parser.add_argument("output", metavar="OUTPUT", help="file to write (for diffusers, folder)")
        parser.add_argument("--part", choices=PARTS, help="which part of an all-in-one checkpoint")
        parser.add_argument("--json", action="store_true", help="print what was written as one JSON object")


def run_inspect(args: argparse.Namespace) -> int:
    """Print what each file is."""
    from ..weights.info import inspect_file

    for file in args.files:
        info = inspect_file(file)
        print(info.to_json() if args.json else info.to_text())
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Write the same weights in another format."""
    import torch

    from ..weights.convert import convert_file

    dtype = getattr(torch, args.dtype) if args.dtype else None
    options = {"dtype": dtype, "part": args.part, "on_tensor": _on_tensor()}
    return _tell(args, convert_file(args.source, args.output, to=args.to, **options))


def run_quantize(args: argparse.Namespace) -> int:
    """Write the weights smaller."""
    from ..weights.quantize import quantize_file

    return _tell(
        args, quantize_file(args.source, args.output, type=args.type, part=args.part, on_tensor=_on_tensor())
    )


def _tell(args: argparse.Namespace, written) -> int:
    from ..weights.info import inspect_file

    info = inspect_file(written)
    if args.json:
        print(info.to_json())
    else:
        common.say(info.to_text())
    return 0


def _on_tensor():
    """Progress that changes one line of a terminal, or a line for every tenth in a log."""
    live = sys.stderr.isatty()

    def on_tensor(done: int, total: int) -> None:
        if live:
            print(f"\rtensor {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif 10 * done // total > 10 * (done - 1) // total:
            common.say(f"tensor {done}/{total}")

    return on_tensor
