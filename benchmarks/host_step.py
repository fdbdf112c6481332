"""Our MODEL in a real ComfyUI's sampling beside a native MODEL of the same weights, and beside kontext_core alone.

A transformer of the published width and few blocks with random weights, an edit's tokens, sampled by ComfyUI's own
guider and Euler sampler. Seconds of one step; the models take turns. Both compute in the same dtype with PyTorch's
attention; "native, as it comes" is on a CPU what ComfyUI makes of the same file there: float32 weights and attention by
parts.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from measure import alternate, describe, largest_difference, machine, medians, ratios, table
from peers import import_comfyui

ROOT = Path(__file__).resolve().parents[1]
GUIDANCE = (
    2.0  # a thousand times 2.5 is no bfloat16 number, and the native model embeds what it is rounded to
)


def measure(
    side: int, text: int, steps: int, rounds: int, device: torch.device, dtype: torch.dtype, hidden: int
) -> dict[str, Any]:
    """Rows of kontext_core, our MODEL and the native one.

    Args:
        side: latent cells of the target's and the reference's sides.
        hidden: width of the transformer, a multiple of 128; 3072 is the published one.
    """
    if not import_comfyui():
        return {"comfyui": None, **machine(device, dtype)}
    _import_pack()
    import comfy.ldm.flux.math
    import comfy.ldm.modules.attention
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sample
    import comfy.samplers
    import comfy.supported_models
    from comfy.ldm.flux.model import Flux as NativeFlux
    from comfy.ldm.flux.model import FluxParams
    from kontext_pack.kontext_core import latents
    from kontext_pack.kontext_core.conditioning import PromptConditioning, make_references
    from kontext_pack.kontext_core.denoise import Denoiser
    from kontext_pack.kontext_core.models.transformer import Flux, TransformerParams
    from kontext_pack.kontext_core.samplers import euler
    from kontext_pack.nodes import host_model

    params = TransformerParams(hidden_size=hidden, num_heads=hidden // 128, depth=1, depth_single_blocks=2)
    generator = torch.Generator().manual_seed(0)
    core = Flux(params, dtype=dtype, device=device).eval().requires_grad_(False)
    for name, parameter in core.named_parameters():
        if name.endswith(".scale"):
            parameter.fill_(1.0)
        else:
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02
            parameter.copy_(torch.empty(parameter.shape).normal_(std=spread, generator=generator))

    def host(network, dtype=dtype):
        config = comfy.supported_models.Flux(host_model.unet_config(params))
        if network is NativeFlux and "txt_ids_dims" in FluxParams.__dataclass_fields__:
            config.unet_config["txt_ids_dims"] = []
        config.set_inference_dtype(dtype, None)
        model = comfy.model_base.Flux(config, device=torch.device("meta"), unet_model=network)
        state = {
            key: value.to(dtype) for key, value in core.state_dict().items()
        }  # shared where it is the same dtype
        if not any(key.endswith("_norm.scale") for key in model.diffusion_model.state_dict()):
            state = {key.replace("_norm.scale", "_norm.weight"): value for key, value in state.items()}
        model.diffusion_model.load_state_dict(state, strict=True, assign=True)
        model.diffusion_model.requires_grad_(False)
        model.device = device
        patcher = comfy.model_patcher.ModelPatcher(model, device, device)
        if network is not NativeFlux:
            model.diffusion_model.steps.watch(patcher)
        return patcher

    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    txt, vec = draw(1, text, params.context_in_dim), draw(1, params.vec_in_dim)
    reference, noise = draw(1, 16, side, side), draw(1, 16, side, side)
    grid = torch.linspace(1, 0, steps + 1)
    raw = reference / 0.3611 + 0.1159  # what the host scales by itself
    positive = [[txt, {"pooled_output": vec, "guidance": GUIDANCE, "reference_latents": [raw]}]]

    def through_host(model, attention=None):
        def run():
            kept = comfy.ldm.flux.math.optimized_attention
            comfy.ldm.flux.math.optimized_attention = attention or kept
            try:
                guider = comfy.samplers.CFGGuider(model)
                guider.inner_set_conds({"positive": positive})
                guider.set_cfg(1.0)
                sampler = comfy.samplers.ksampler("euler")
                return guider.sample(noise, torch.zeros_like(noise), sampler, grid, disable_pbar=True, seed=0)
            finally:
                comfy.ldm.flux.math.optimized_attention = kept

        return run

    def alone():
        denoiser = Denoiser(
            core,
            PromptConditioning(txt=txt, vec=vec),
            make_references([reference], (side, side)),
            side,
            side,
            guidance=GUIDANCE,
            planned=grid[:-1].tolist(),
        )
        return latents.unpack(euler(denoiser, latents.pack(noise).to(device), grid), side, side)

    ours, native = host(host_model.HostTransformer), host(NativeFlux)
    rivals = {"kontext_core": alone, "ours": through_host(ours), "native": through_host(native)}
    if device.type == "cpu":
        split = comfy.ldm.modules.attention.attention_sub_quad
        wide = native if dtype == torch.float32 else host(NativeFlux, torch.float32)
        rivals["native, as it comes"] = through_host(wide, split)
    with torch.inference_mode():
        expected = alone()
        print("host: outputs", file=sys.stderr)
        made = {name: run() for name, run in list(rivals.items())[1:]}
        # the host gives raw latents back
        worst = {
            name: largest_difference(name, (value.cpu() - 0.1159) * 0.3611, expected)
            for name, value in made.items()
        }
        times = alternate(rivals, rounds, warmup=0)
    seconds = {name: value / steps for name, value in medians(times).items()}
    return {
        "seconds_a_step": seconds,
        "ours_to_core": ratios(times, "kontext_core")["ours"],
        "ours_to_native": ratios(times, "native")["ours"],
        "ours_to_native_default": ratios(times, "native, as it comes")["ours"]
        if device.type == "cpu"
        else None,
        "max_abs_difference": worst,
        "blocks": {"double": 1, "single": 2},
        "hidden": hidden,
        "tokens": {"target": (side // 2) ** 2, "context": (side // 2) ** 2, "text": text},
        "steps": steps,
        **machine(device, dtype),
    }


def _import_pack() -> None:
    """This repository as a host imports it: a package under another name."""
    spec = importlib.util.spec_from_file_location(
        "kontext_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def as_text(report: dict[str, Any]) -> str:
    if "seconds_a_step" not in report:
        return "host: no ComfyUI here; set COMFYUI_PATH or run `python dev.py demo` once"
    tokens = report["tokens"]
    lines = [
        f"A sampling step in ComfyUI, 1 double and 2 single blocks {report['hidden']} wide, {tokens['target']} target, "
        f"{tokens['context']} context and {tokens['text']} text tokens; {describe(report)}",
        "",
    ]
    rows = [[name, f"{value:.3f} s"] for name, value in report["seconds_a_step"].items()]
    lines.append(table(["", "seconds a step"], rows))
    lines.append(
        f"\nour MODEL to kontext_core {report['ours_to_core']:.3f}, to a native MODEL {report['ours_to_native']:.3f}"
    )
    if report["ours_to_native_default"] is not None:
        lines[-1] += f", to a native MODEL as it comes {report['ours_to_native_default']:.3f}"
    return "\n".join(lines)
