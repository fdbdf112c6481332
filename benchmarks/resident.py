"""Weights in memory while sampling: `python benchmarks/resident.py [--json] [--blocks 2]`.

Two tables. The first counts bytes at FLUX.1 Kontext [dev]'s sizes, without any weights, for each precision: what we
keep (everything but modulation and its embedders, and the tables of 28 steps) against the same weights whole, as
diffusers and ComfyUI keep them; both are built and their parameters counted where they are installed. The second
loads one random bfloat16 file of the published width and block kinds (1:2, as in the model) into each, in a process
of its own, computes two steps, and reads from the operating system how much larger the process has become since its
imports.

diffusers and ComfyUI do not map what they load in the same way on every system: figures are of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402

from kontext_core.models.transformer import Flux, TransformerParams  # noqa: E402
from kontext_core.weights.ggml_types import TYPES  # noqa: E402
from kontext_core.weights.offload import is_ahead  # noqa: E402
from kontext_core.weights.packed import PlainOperations  # noqa: E402

STEPS = 28
TEXT, SIDE = 8, 4  # tokens of the measured steps: weights are what counts
PRECISIONS = ("bf16", "fp8", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
RIVALS = ("ours", "diffusers", "comfyui")


def stored_bytes(key: str, shape: tuple[int, ...], precision: str) -> int:
    """A weight's bytes in a file that `kontext quantize` writes: what is not a block's matrix stays in float."""
    count = torch.Size(shape).numel()
    if precision == "bf16":
        return count * 2
    if len(shape) == 2 and key.startswith(("double_blocks.", "single_blocks.")):
        return count if precision == "fp8" else shape[0] * TYPES[precision].row_bytes(shape[1])
    return count * (4 if len(shape) == 1 and precision != "fp8" else 2)


def table_bytes(params: TransformerParams, steps: int, itemsize: int) -> int:
    """All shifts, scales and gates of a schedule."""
    return steps * (params.depth * 12 + params.depth_single_blocks * 3 + 2) * params.hidden_size * itemsize


def count_diffusers() -> int | None:
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError:
        return None
    with torch.device("meta"):
        return sum(p.numel() for p in FluxTransformer2DModel(guidance_embeds=True).parameters())


def count_comfyui() -> int | None:
    import peers

    if not peers.import_comfyui():
        return None
    import comfy.ldm.flux.model
    import comfy.ops

    sizes = {**vars(TransformerParams()), "axes_dim": [16, 56, 56], "patch_size": 2}
    sizes |= {"in_channels": 16, "out_channels": 16}
    model = comfy.ldm.flux.model.Flux(**sizes, operations=comfy.ops.disable_weight_init, device="meta")
    return sum(parameter.numel() for parameter in model.parameters())


def at_full_size() -> dict:
    """Bytes by precision, and what the others count."""
    params = TransformerParams()
    model = Flux(params, operations=PlainOperations, device="meta")
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    tables = table_bytes(params, STEPS, 2)
    rows = []
    for precision in PRECISIONS:
        sizes = {key: stored_bytes(key, shape, precision) for key, shape in shapes.items()}
        whole = sum(sizes.values())
        kept = sum(size for key, size in sizes.items() if not is_ahead(key))
        rows.append(
            {"precision": precision, "whole": whole, "ours": kept + tables, "ratio": (kept + tables) / whole}
        )
    counted = {
        "ours": sum(parameter.numel() for parameter in model.parameters()),
        "diffusers": count_diffusers(),
        "comfyui": count_comfyui(),
    }
    return {"parameters": counted, "tables": tables, "rows": rows}


def resident() -> int:
    """Bytes that this process has in memory now, pages of mapped files included."""
    import psutil

    return psutil.Process().memory_info().rss


def child(rival: str, folder: Path) -> None:
    """Loads the file, computes two steps and prints how much the process grew."""
    torch.set_grad_enabled(False)
    # The libraries' own pages count before, not after: every rival multiplies, norms and attends.
    for dtype in (torch.float32, torch.bfloat16):
        small = TransformerParams(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1)
        warm = Flux(small).to(dtype)
        given = {key: value.to(dtype) for key, value in tokens(small).items()}
        ids, times = torch.zeros(SIDE**2, 3), torch.tensor([0.5])
        warm(given["img"], ids, given["txt"], torch.zeros(TEXT, 3), times, given["y"], times)
    del warm
    answer = {"ours": measure_ours, "diffusers": measure_diffusers, "comfyui": measure_comfyui}[rival](folder)
    print(json.dumps(answer))


def tokens(params: TransformerParams) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"img": (1, SIDE**2, 64), "txt": (1, TEXT, params.context_in_dim), "y": (1, params.vec_in_dim)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def measure_ours(folder: Path) -> dict | None:
    from kontext_core.conditioning import PromptConditioning
    from kontext_core.denoise import Denoiser
    from kontext_core.schedules import timesteps
    from kontext_core.weights import offload
    from kontext_core.weights.files import open_weights
    from kontext_core.weights.load import build
    from kontext_core.weights.packed import PackedOperations
    from kontext_core.weights.parts import open_part

    before = resident()
    file = open_weights(folder / "model.safetensors")
    model = build(open_part(file, "transformer"), dtype=torch.float32, operations=PackedOperations)
    offload.attach(model, file.maps, device=torch.device("cpu"), budget=None)
    given = tokens(model.params)
    grid = timesteps(STEPS, SIDE**2)[:-1].tolist()
    prompt = PromptConditioning(txt=given["txt"], vec=given["y"])
    denoiser = Denoiser(model, prompt, None, 2 * SIDE, 2 * SIDE, guidance=2.5, planned=grid)
    for t in grid[:2]:
        denoiser(given["img"], t)
    return {"bytes": resident() - before, "parameters": sum(p.numel() for p in model.parameters())}


def measure_diffusers(folder: Path) -> dict | None:
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError:
        return None
    before = resident()
    model = FluxTransformer2DModel.from_pretrained(str(folder / "transformer"), torch_dtype=torch.bfloat16)
    given = {key: value.bfloat16() for key, value in tokens(TransformerParams()).items()}
    for t in (1.0, 0.9):
        model(
            hidden_states=given["img"],
            encoder_hidden_states=given["txt"],
            pooled_projections=given["y"],
            timestep=torch.tensor([t]),
            guidance=torch.tensor([2.5]),
            img_ids=torch.zeros(SIDE**2, 3),
            txt_ids=torch.zeros(TEXT, 3),
        )
    return {"bytes": resident() - before, "parameters": sum(p.numel() for p in model.parameters())}


def measure_comfyui(folder: Path) -> dict | None:
    import peers

    if not peers.import_comfyui():
        return None
    import comfy.model_management
    import comfy.sd

    before = resident()
    options = {"dtype": torch.bfloat16}  # on a CPU it would make float32 of the weights otherwise
    patcher = comfy.sd.load_diffusion_model(str(folder / "model.safetensors"), model_options=options)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    model = patcher.model.diffusion_model
    given = {key: value.bfloat16() for key, value in tokens(TransformerParams()).items()}
    x = torch.randn(1, 16, 2 * SIDE, 2 * SIDE).bfloat16()
    for t in (1.0, 0.9):
        model(x, torch.tensor([t]), context=given["txt"], y=given["y"], guidance=torch.tensor([2.5]))
    return {"bytes": resident() - before, "parameters": sum(p.numel() for p in model.parameters())}


def measured(blocks: int) -> dict:
    """Growth of a process of each, over one file."""
    from quantised_error import write_random

    from kontext_core.weights.convert import convert_file

    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random(folder / "model.safetensors", depth=blocks, depth_single_blocks=2 * blocks)
        result["file_bytes"] = (folder / "model.safetensors").stat().st_size
        convert_file(folder / "model.safetensors", folder / "transformer", to="diffusers")
        for rival in RIVALS:
            command = [sys.executable, __file__, "--child", rival, str(folder)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
            if run.returncode:
                raise SystemExit(f"{rival} failed with status {run.returncode}")
            result[rival] = json.loads(run.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--blocks",
        type=int,
        default=1,
        help="double-stream blocks of the measured file (default: %(default)s)",
    )
    parser.add_argument("--no-measure", action="store_true", help="only count")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", nargs=2, metavar=("RIVAL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]))
    report = {"full_size": at_full_size()}
    if not args.no_measure:
        report["measured"] = measured(args.blocks)
    print(json.dumps(report) if args.json else as_text(report))


def as_text(report: dict) -> str:
    full = report["full_size"]
    count = ", ".join(
        f"{name} {number:,}" if number is not None else f"{name} not installed"
        for name, number in full["parameters"].items()
    )
    lines = [f"parameters of the transformer: {count}"]
    lines.append(f"{'':8}{'whole, GB':>11}{'ours, GB':>11}{'ratio':>9}   {STEPS} steps of tables included")
    for row in full["rows"]:
        lines.append(
            f"{row['precision']:8}{row['whole'] / 1e9:11.2f}{row['ours'] / 1e9:11.2f}{row['ratio']:9.4f}"
        )
    if "measured" in report:
        found = report["measured"]
        lines.append(f"measured after two steps, a bfloat16 file of {found['file_bytes'] / 1e6:,.0f} MB")
        for rival in RIVALS:
            row = found[rival]
            if row is None:
                lines.append(f"  {rival:10} not installed")
                continue
            ratio = found["ours"]["bytes"] / row["bytes"]
            lines.append(f"  {rival:10}{row['bytes'] / 1e6:9,.0f} MB   ours is {ratio:.3f} of it")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
