"""What the commands share: options of the model, sizes, progress on standard error, memory at the peak."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import interrupts

if TYPE_CHECKING:
    from ..samplers import StepInfo
    from ..weights.load import KontextModel

DEFAULT_MODEL = "kontext-tiny"
MAX_SEED = 2**64 - 1
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def add_model_options(parser: argparse.ArgumentParser, *, loras: bool = True) -> None:
    """--model and its parts, dtype, device, memory, and LoRAs on it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|PATH",
        help="a bundled model, a folder with all parts, or a transformer file (default: %(default)s)",
    )
    group.add_argument(
        "--t5", metavar="PATH", help="T5 encoder file or folder, where it is not beside the model"
    )
    group.add_argument("--clip", metavar="PATH", help="CLIP text encoder file or folder, likewise")
    group.add_argument("--vae", metavar="PATH", help="autoencoder file or folder, likewise")
    for name, part in (("--t5-tokenizer", "T5 encoder"), ("--clip-tokenizer", "CLIP text encoder")):
        group.add_argument(
            name,
            metavar="PATH",
            help=f"tokenizer of the {part}: a folder or a tokenizer.json (default: beside its weights, else that of "
            "the ComfyUI which COMFYUI_PATH names)",
        )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="compute in this type (default: that of the files)",
    )
    group.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps … (default: cuda where there is one, else cpu)"
    )
    group.add_argument(
        "--budget",
        type=gigabytes,
        metavar="GB",
        help="memory that the transformer's weights may take; the rest is brought when used (default: what is free)",
    )
    if not loras:
        return
    group.add_argument(
        "--lora",
        dest="loras",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[=STRENGTH]",
        help="put a LoRA of any format on the model (strength 1 unless given); may be given several times",
    )


def load_model(args: argparse.Namespace, text_length: int | None = None) -> KontextModel:
    """The model that the options name; `text_length` is the T5 tokens of a prompt, its own when None."""
    import torch

    from ..weights.load import load_model

    device = args.device or ("cuda" if torch.cuda.is_available() else None)
    if device is not None:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            # torch was built without this device, or there is none of that number.
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {device} cannot be used: {reason}") from error
    dtype = getattr(torch, args.dtype) if args.dtype else None
    places = {name: getattr(args, name) for name in ("t5", "clip", "vae", "t5_tokenizer", "clip_tokenizer")}
    model = load_model(
        args.model, **places, dtype=dtype, device=device, budget=args.budget, text_length=text_length
    )
    if getattr(args, "loras", None):
        _apply_loras(model, args.loras)
    return model


def _apply_loras(model: KontextModel, asked: list[tuple[str, float]]) -> None:
    """Put LoRAs onto every network of the model and say what matched."""
    from ..models.lora_apply import apply
    from ..weights.lora_file import load_lora

    loras = [(load_lora(path), strength) for path, strength in asked]
    modules = {"transformer": model.transformer, "t5": model.t5, "clip": model.clip}
    # A model that does not fit stays in its memory map: no patched copies beside it.
    merge = not model.plans
    for report in apply(modules, loras, merge=merge):
        say(str(report))
    if model.few_step is not None:
        for_transformer = [item for item in loras if "transformer" in item[0].parts]
        apply({"transformer": model.few_step}, for_transformer, merge=merge)


def lora(text: str) -> tuple[str, float]:
    """--lora: a path, or a path and a strength."""
    path, equals, strength = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        value = float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{strength!r} is no strength; give FILE=0.8, or FILE alone"
        ) from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"the strength {strength} is not finite")
    return path, value


def gigabytes(text: str) -> int:
    """--budget: a number of gigabytes, as bytes."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes") from None
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give gigabytes, such as 8")
    return int(value * 1e9)


def size(text: str) -> str | tuple[int, int]:
    """--size: "auto" or WIDTHxHEIGHT in multiples of 16."""
    if text == "auto":
        return text
    try:
        width, height = (int(part) for part in text.lower().replace("×", "x").split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give WIDTHxHEIGHT or auto") from None
    if min(width, height) < 16 or width % 16 or height % 16:
        near = "x".join(str(max(16, 16 * round(n / 16))) for n in (width, height))
        raise argparse.ArgumentTypeError(f"{text} is not in multiples of 16; try {near}")
    return width, height


def shift(text: str) -> str | float:
    """A schedule's shift as `schedules.timesteps` takes it."""
    if text in ("resolution", "none"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shift; use resolution, none or a number") from None


def whole(low: int, high: int | None = None):
    """A whole number of at least `low`, and at most `high` where that is given."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is below {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{value} is above {high}")
        return value

    return number


def check_output(path: str, *, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """Refuse an output that could not be written, before any work is done."""
    target = Path(path)
    if target.suffix.lower() not in suffixes:
        raise ValueError(f"--output {path}: the suffix must be one of {', '.join(suffixes)}")
    if not target.parent.is_dir():
        raise ValueError(f"--output {path}: the folder {target.parent} does not exist; make it first")
    if target.is_dir():
        raise ValueError(f"--output {path} is a folder; give a file name")
    return target


class Progress:
    """Steps with the time that is left, on standard error: one line that changes, or lines in a log."""

    def __init__(self, label: str = "step") -> None:
        self.label = label
        self.started = time.perf_counter()
        self.live = sys.stderr.isatty()

    def __call__(self, info: StepInfo) -> None:
        interrupts.check()
        done, total = info.index + 1, info.num_steps
        left = (time.perf_counter() - self.started) / done * (total - done)
        line = f"{self.label} {done}/{total}, {left:.0f} s left"
        if self.live:
            print(f"\r{line:<60}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line for a person, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, ensure_ascii=False))


def peak_rss_bytes() -> int:
    """The most memory this process has had in RAM, in bytes."""
    if sys.platform == "win32":
        import ctypes
        from ctypes import wintypes

        class Counters(ctypes.Structure):
            _fields_ = [
                ("cb", wintypes.DWORD),
                ("PageFaultCount", wintypes.DWORD),
                *[(name, ctypes.c_size_t) for name in ("PeakWorkingSetSize", "WorkingSetSize")],
                *[(f"unused{i}", ctypes.c_size_t) for i in range(6)],
            ]

        counters = Counters(cb=ctypes.sizeof(Counters))
        kernel = ctypes.WinDLL("kernel32")
        kernel.GetCurrentProcess.restype = wintypes.HANDLE
        read = kernel.K32GetProcessMemoryInfo
        read.argtypes = [wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD]
        read(kernel.GetCurrentProcess(), ctypes.byref(counters), counters.cb)
        return counters.PeakWorkingSetSize
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux a child starts with its parent's.
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
