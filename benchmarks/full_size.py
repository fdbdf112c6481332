"""A 12-billion-parameter edit on a small machine: `python benchmarks/full_size.py [--quantisation fp8] [--json]`.

Makes a random model of FLUX.1 Kontext [dev]'s sizes on disk (transformer as Q4_0 GGUF or scaled float8, T5-XXL as
scaled float8, CLIP-L, autoencoder), edits a 256×256 picture in a process of its own, and reports that process's
peak memory as the operating system counts it and seconds by phase. A second process does the same edit with all
weights left in memory; its picture must be the same to the bit. The weights are random: time and memory are
those of the real model, the picture means nothing.

Disk: 12 GB for Q4_0, 17 GB for float8, in runs/full-size by default; removed at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from kontext_core.models.autoencoder import Autoencoder, AutoencoderParams  # noqa: E402
from kontext_core.models.clip import ClipParams, ClipTextEncoder  # noqa: E402
from kontext_core.models.t5 import T5Encoder, T5Params  # noqa: E402
from kontext_core.models.transformer import Flux, TransformerParams  # noqa: E402
from kontext_core.weights.fp8 import metadata_for  # noqa: E402
from kontext_core.weights.gguf_file import write_gguf  # noqa: E402
from kontext_core.weights.locate import BUNDLED  # noqa: E402
from kontext_core.weights.packed import PlainOperations  # noqa: E402
from kontext_core.weights.safetensors_file import write_safetensors  # noqa: E402

SIZE, TEXT = 256, 512  # pixels a side, text tokens
Q4_STEP = 4.61  # standard deviation of uniform nibbles 0..15
PATTERN = 2**24  # random numbers that are drawn once and repeated


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.named_parameters()}


def small_values(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Norms 1, biases near 0, other small tensors normal with the spread that keeps sizes."""
    if len(shape) == 1:
        is_norm = key.endswith(".scale") or "norm" in key
        return torch.full(shape, 1.0 if is_norm and not key.endswith("bias") else 0.01, dtype=dtype)
    fan_in = int(torch.Size(shape[1:]).numel())
    generator = torch.Generator().manual_seed(len(key))
    return torch.empty(shape, dtype=dtype).normal_(std=fan_in**-0.5, generator=generator)


def repeated(pattern: Tensor, count: int, start: int) -> Tensor:
    """`count` elements of an endless repetition of the pattern, from `start` on."""
    offset = start % len(pattern)
    times = -(-(count + offset) // len(pattern))
    return pattern.repeat(times, *[1] * (pattern.ndim - 1))[offset : offset + count]


def write_q4(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    nibbles = torch.randint(0, 256, (PATTERN // 32, 18), generator=torch.Generator().manual_seed(0)).byte()
    packed = {key: len(shape) == 2 and key.startswith(("double", "single")) for key, shape in shapes.items()}
    plain = {key: "F32" if len(shape) == 1 else "BF16" for key, shape in shapes.items()}
    layout = {key: ("Q4_0" if packed[key] else plain[key], shape) for key, shape in shapes.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, (key, shape) in enumerate(shapes.items()):
            if not packed[key]:
                yield key, small_values(key, shape, torch.float32 if len(shape) == 1 else torch.bfloat16)
                continue
            blocks = repeated(nibbles, shape[0] * shape[1] // 32, number * 7919).clone()
            scale = torch.tensor(shape[1] ** -0.5 / Q4_STEP, dtype=torch.float16)
            blocks[:, :2] = scale.reshape(1).view(torch.uint8)
            yield key, blocks.view(shape[0], -1)

    write_gguf(path, layout, tensors(), {"general.architecture": "flux", "general.quantization_version": 2})


def write_fp8(
    path: Path, shapes: dict[str, tuple[int, ...]], marks: tuple[str, ...], plain: torch.dtype
) -> None:
    """Scaled float8 for the matrices whose key holds one of `marks`."""
    drawn = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)) * 64
    pattern = drawn.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    scaled = [key for key, shape in shapes.items() if len(shape) == 2 and any(mark in key for mark in marks)]
    layout = {}
    for key, shape in shapes.items():
        layout[key] = (torch.float8_e4m3fn if key in set(scaled) else plain, shape)
    layout |= {f"{key}_scale": (torch.float32, ()) for key in scaled}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, (key, shape) in enumerate(shapes.items()):
            if layout[key][0] == plain:
                yield key, small_values(key, shape, plain)
            else:
                values = repeated(pattern, shape[0] * shape[1], number * 7919)
                yield key, values.view(torch.float8_e4m3fn).view(shape)
        for key in scaled:
            fan_in = shapes[key][1] * (64 if key.endswith("SelfAttention.q.weight") else 1)
            yield f"{key}_scale", torch.tensor(fan_in**-0.5 / 64)

    write_safetensors(path, layout, tensors(), metadata_for([key.removesuffix(".weight") for key in scaled]))


def make_model(folder: Path, quantisation: str, text: int = TEXT) -> None:
    """Writes the model's folder; a file that is there is kept. Prompts are padded to `text` tokens."""
    meta = {"operations": PlainOperations, "device": "meta"}
    transformer = shapes_of(Flux(TransformerParams(), **meta))
    parts = {
        f"flux1-{quantisation}.{'gguf' if quantisation == 'q4' else 'safetensors'}": lambda path: (
            write_q4(path, transformer)
            if quantisation == "q4"
            else write_fp8(path, transformer, ("double_blocks.", "single_blocks."), torch.bfloat16)
        ),
        "text_encoder_2/model.safetensors": lambda path: write_fp8(
            path,
            shapes_of(T5Encoder(T5Params(), **meta)),
            (
                ".SelfAttention.q",
                ".SelfAttention.k",
                ".SelfAttention.v",
                ".SelfAttention.o",
                ".DenseReluDense.",
            ),
            torch.bfloat16,
        ),
        "text_encoder/model.safetensors": lambda path: write_plain(
            path, ClipTextEncoder(ClipParams(), **meta)
        ),
        "ae.safetensors": lambda path: write_plain(path, Autoencoder(AutoencoderParams(), **meta)),
    }
    for name, write in parts.items():
        path = folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"writing {path}", file=sys.stderr)
            write(path)
    # Any vocabulary does for random weights; the lengths are the real ones.
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(BUNDLED["kontext-tiny"] / name, folder / name, dirs_exist_ok=True)
    config = folder / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": text}))


def write_plain(path: Path, module: torch.nn.Module) -> None:
    shapes = shapes_of(module)
    layout = {key: (torch.bfloat16, shape) for key, shape in shapes.items()}
    write_safetensors(path, layout, ((key, small_values(key, *layout[key][::-1])) for key in shapes), {})


def child(folder: Path, mode: str, steps: int, size: int) -> None:
    """One edit in this process; prints a JSON object."""
    from kontext_core.edit import edit_image
    from kontext_core.weights import offload
    from kontext_core.weights.load import load_model
    from kontext_core.weights.parts import open_part

    if mode == "resident":
        offload.SMALL = 2**62  # nothing is large: no pages are given back, nothing streams
    started = time.perf_counter()
    words = json.loads((folder / "tokenizer_2" / "tokenizer_config.json").read_text())
    model = load_model(folder, text_length=words["model_max_length"])
    loaded = time.perf_counter()
    ramp = torch.linspace(-1, 1, size)
    picture = torch.stack(
        [ramp.expand(size, size), ramp[:, None].expand(size, size), torch.zeros(size, size)]
    )[None]

    def on_step(info) -> None:
        print(f"{mode}: step {info.index + 1} of {info.num_steps}", file=sys.stderr, flush=True)

    result = edit_image(model, picture, "make it red", num_steps=steps, size=(size, size), on_step=on_step)
    finished = time.perf_counter()
    plan = model.plans.get("transformer")
    answer = {
        "parameters": open_part(model.files["transformer"], "transformer").numel,
        "sha256": hashlib.sha256(result.images.numpy().tobytes()).hexdigest(),
        "finite": bool(torch.isfinite(result.images).all()),
        "seconds": {"load": loaded - started, **result.seconds, "total": finished - started},
        "resident_weight_bytes": None if plan is None else plan.resident,
        "modulation_bytes": None if plan is None else plan.modulation,
    }
    print(json.dumps(answer))


def run_child(arguments: list[str]) -> dict:
    """Runs this file as a child and adds its peak memory as the system counted it."""
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the edit failed with status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return json.loads(output) | {"peak_rss_bytes": usage.ru_maxrss * unit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quantisation", choices=("q4", "fp8"), default="q4", help="of the transformer")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps (default: %(default)s)")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side (default: %(default)s)")
    parser.add_argument("--text", type=int, default=TEXT, help="text tokens (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "full-size", help="where the model is made"
    )
    parser.add_argument("--no-resident", action="store_true", help="leave out the second process")
    parser.add_argument("--keep", action="store_true", help="leave the model on disk")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", choices=("offload", "resident"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder if args.child else args.folder / args.quantisation
    if args.child:
        return child(folder, args.child, args.steps, args.size)
    started = time.perf_counter()
    make_model(folder, args.quantisation, args.text)
    made = time.perf_counter() - started
    common = ["--folder", str(folder), "--steps", str(args.steps), "--size", str(args.size), "--child"]
    asked = {"quantisation": args.quantisation, "steps": args.steps, "size": args.size, "text": args.text}
    report = run_child([*common, "offload"]) | asked
    report["seconds"]["make"] = made
    if not args.no_resident:
        resident = run_child([*common, "resident"])
        report["resident"] = {key: resident[key] for key in ("peak_rss_bytes", "seconds", "sha256")}
        report["same_picture"] = resident["sha256"] == report["sha256"]
    if not args.keep:
        shutil.rmtree(folder)
    print(json.dumps(report) if args.json else as_text(report))


def as_text(report: dict) -> str:
    lines = [
        f"transformer        {report['parameters']:,} parameters, {report['quantisation']}",
        f"peak memory        {report['peak_rss_bytes'] / 2**30:.2f} GiB",
        "seconds            " + ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items()),
    ]
    if "resident" in report:
        lines.append(f"all in memory      {report['resident']['peak_rss_bytes'] / 2**30:.2f} GiB")
        lines.append(f"same picture       {'yes, to the bit' if report['same_picture'] else 'NO'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
