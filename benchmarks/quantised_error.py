"""What each quantisation costs: `python benchmarks/quantised_error.py [--json] [--model PATH]`.

One velocity of the transformer from packed weights against the same in float32 from the unquantised file, as a
relative error, ours beside diffusers' for the GGUF types that it reads and ComfyUI's own loader for scaled float8.
Without --model, on a random transformer of the published width with one double- and two single-stream blocks;
with it, on that file (kontext-tiny's too).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import peers  # noqa: E402
import torch  # noqa: E402

from kontext_core import latents  # noqa: E402
from kontext_core.models.transformer import Flux, TransformerParams  # noqa: E402
from kontext_core.weights.convert import convert_file  # noqa: E402
from kontext_core.weights.load import load_transformer  # noqa: E402
from kontext_core.weights.quantize import quantize_file  # noqa: E402
from kontext_core.weights.safetensors_file import write_safetensors  # noqa: E402

SIDE = 8  # tokens a side of the target, and of the context
KINDS = ("bf16", "fp8_scaled", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0", "Q3_K", "Q2_K")


def write_random(path: Path, depth: int = 1, depth_single_blocks: int = 2) -> None:
    """A bfloat16 file of the published width, normal weights."""
    params = TransformerParams(depth=depth, depth_single_blocks=depth_single_blocks)
    layout = {
        key: (torch.bfloat16, tuple(p.shape)) for key, p in Flux(params, device="meta").named_parameters()
    }
    generator = torch.Generator().manual_seed(0)

    def draw(key: str) -> torch.Tensor:
        dtype, shape = layout[key]
        if len(shape) == 1:
            return torch.full(shape, 1.0 if key.endswith("scale") else 0.01, dtype=dtype)
        return torch.empty(shape, dtype=dtype).normal_(std=shape[1] ** -0.5, generator=generator)

    write_safetensors(path, layout, ((key, draw(key)) for key in layout))


def inputs(params: TransformerParams) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    target, context = (latents.position_ids(2 * SIDE, 2 * SIDE, index=index) for index in (0, 1))
    return {
        "img": random(1, 2 * SIDE * SIDE, params.in_channels),
        "img_ids": torch.cat((target, context)),
        "txt": random(1, 32, params.context_in_dim),
        "txt_ids": torch.zeros(32, 3),
        "timesteps": torch.tensor([0.6]),
        "y": random(1, params.vec_in_dim),
        "guidance": torch.tensor([2.5]) if params.guidance_embed else None,
    }


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖/‖b‖ over the target's tokens, the first SIDE² of (B, N, C)."""
    a, b = a[:, : SIDE * SIDE].float(), b[:, : SIDE * SIDE]
    return ((a - b).norm() / b.norm()).item()


@torch.inference_mode()
def diffusers_error(path: Path, config: Path, arguments: dict, exact: torch.Tensor) -> float | None:
    """The same GGUF file in diffusers; None where diffusers or what it needs is not installed."""
    try:
        from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

        model = FluxTransformer2DModel.from_single_file(
            str(path),
            config=str(config),
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        )
    except ImportError:
        return None
    out = model(
        hidden_states=arguments["img"],
        encoder_hidden_states=arguments["txt"],
        pooled_projections=arguments["y"],
        timestep=arguments["timesteps"],
        guidance=arguments["guidance"],
        img_ids=arguments["img_ids"],
        txt_ids=arguments["txt_ids"],
    ).sample
    return relative(out, exact)


@torch.inference_mode()
def comfyui_error(path: Path, arguments: dict, exact: torch.Tensor) -> float | None:
    """The same safetensors file through ComfyUI's own loader, computing in float32; None where it is not there."""
    if not peers.import_comfyui("--fp32-unet"):
        return None
    import comfy.model_management
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model(str(path))
    comfy.model_management.load_model_gpu(patcher)
    tokens = arguments["img"].split(SIDE * SIDE, dim=1)
    target, context = (latents.unpack(part, 2 * SIDE, 2 * SIDE) for part in tokens)
    out = patcher.model.diffusion_model(
        target,
        timestep=arguments["timesteps"],
        context=arguments["txt"],
        y=arguments["y"],
        guidance=arguments["guidance"],
        ref_latents=[context],
        transformer_options={},
    )
    return relative(latents.pack(out.float()), exact)


@torch.inference_mode()
def measure(source: Path, folder: Path, kinds: Sequence[str]) -> list[dict]:
    exact_model = load_transformer(source, dtype=torch.float32)
    arguments = inputs(exact_model.params)
    exact = exact_model(**arguments)
    del exact_model
    rows = []
    if "bf16" in kinds:
        half = load_transformer(source, dtype=torch.bfloat16)
        # Times stay float32, as when sampling: 0.6 rounded to bfloat16 is another time.
        cast = {key: arguments[key].bfloat16() for key in ("img", "txt", "y")}
        error = relative(half(**arguments | cast), exact)
        rows.append({"kind": "bf16", "bytes": source.stat().st_size, "ours": error})
        del half
    config = convert_file(source, folder / "transformer", to="diffusers")
    published = load_transformer(source).params.hidden_size == 3072
    for kind in kinds:
        if kind == "bf16":
            continue
        gguf = not kind.startswith("fp8")
        started = time.perf_counter()
        path = quantize_file(source, folder / f"{kind}.{'gguf' if gguf else 'safetensors'}", type=kind)
        seconds = time.perf_counter() - started
        row = {"kind": kind, "bytes": path.stat().st_size, "seconds_to_write": seconds}
        row["ours"] = relative(load_transformer(path, dtype=torch.float32)(**arguments), exact)
        row["diffusers"] = row["comfyui"] = None
        if kind == "fp8_scaled" and published:
            row["comfyui"] = comfyui_error(path, arguments, exact)
        if gguf and published:  # diffusers splits fused layers at the published width only
            row["diffusers"] = diffusers_error(path, config, arguments, exact)
        path.unlink()
        rows.append(row)
        print(f"{kind} done", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", type=Path, help="an unquantised transformer file instead of random weights"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="which (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = args.model or folder / "bf16.safetensors"
        if args.model is None:
            write_random(source)
        rows = measure(source, folder, args.kinds)
    if args.json:
        return print(json.dumps(rows))
    print(f"{'':12}{'MB':>8}{'ours':>10}{'diffusers':>11}{'ComfyUI':>10}   relative error of a velocity")
    for row in rows:
        theirs = ["" if row.get(name) is None else f"{row[name]:.5f}" for name in ("diffusers", "comfyui")]
        print(f"{row['kind']:12}{row['bytes'] / 1e6:8.1f}{row['ours']:10.5f}{theirs[0]:>11}{theirs[1]:>10}")


if __name__ == "__main__":
    main()
