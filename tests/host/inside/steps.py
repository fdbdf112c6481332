"""Samplings with our MODEL in the host: how often what never changes is computed, and that nothing goes stale."""

from __future__ import annotations

import pack
import torch

pack.load_pack()
import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy.ldm.flux.model import Flux as NativeFlux  # noqa: E402
from comfy.ldm.flux.model import FluxParams  # noqa: E402
from custom_nodes_kontext.kontext_core.models.transformer import TransformerParams  # noqa: E402
from custom_nodes_kontext.nodes import host_model, host_sampling, host_steps  # noqa: E402

PARAMS = TransformerParams(
    vec_in_dim=24, context_in_dim=40, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(8, 12, 12)
)  # fmt: skip
SIGMAS = torch.tensor([1.0, 0.8, 0.55, 0.25, 0.0])


def build(network) -> comfy.model_patcher.ModelPatcher:
    """MODEL of this class over the same random weights."""
    config = comfy.supported_models.Flux(host_model.unet_config(PARAMS))
    if network is NativeFlux and "txt_ids_dims" in FluxParams.__dataclass_fields__:
        config.unet_config["txt_ids_dims"] = []
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.Flux(config, device=torch.device("cpu"), unet_model=network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.diffusion_model.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(drawn + 1 if parameter.ndim == 1 and "_norm." in name else drawn)
            parameter.requires_grad_(False)
    model.device = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    if network is not NativeFlux:
        model.diffusion_model.steps.watch(patcher)
    return patcher


OURS, NATIVE = build(host_model.HostTransformer), build(NativeFlux)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positive(seed: int = 5, reference: int | None = 6, guidance: float = 2.5) -> list:
    values = {"pooled_output": draw(seed + 100, 1, 24), "guidance": guidance}
    if reference is not None:
        values["reference_latents"] = [draw(reference, 1, 16, 8, 6)]
    return [[draw(seed, 1, 5, 40), values]]


@torch.inference_mode()
def sample(model, conditioning=None, batch: int = 1, sampler: str = "euler") -> torch.Tensor:
    return host_sampling.sample(
        model,
        conditioning or positive(),
        draw(1, batch, 16, 8, 6),
        torch.zeros(batch, 16, 8, 6),
        host_sampling.make_sampler(sampler),
        SIGMAS,
        seed=0,
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def counted(layers: dict[str, torch.nn.Module], run) -> dict[str, int]:
    """How often each layer is called while something runs."""
    calls = dict.fromkeys(layers, 0)

    def hook(name):
        def count(*_):
            calls[name] += 1

        return count

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    run()
    for handle in handles:
        handle.remove()
    return calls


def rows_of(layer: torch.nn.Module, run) -> int:
    """How many rows a layer multiplies while something runs."""
    rows = []
    handle = layer.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].shape[0]))
    run()
    handle.remove()
    return sum(rows)


def main() -> None:
    network = OURS.model.diffusion_model
    layers = {
        "text": network.txt_in,
        "modulation": network.double_blocks[0].img_mod.lin,
        "final": network.final_layer.adaLN_modulation[1],
        "pictures": network.img_in,
        "blocks": network.single_blocks[1],
    }
    network.steps.ropes.entries.clear()
    made, rope_tables = [], host_steps.rope_tables
    host_steps.rope_tables = lambda *given: (made.append(1), rope_tables(*given))[1]
    result = {"calls": counted(layers, lambda: sample(OURS)), "steps": len(SIGMAS) - 1}
    result["calls"]["rope"] = len(made)
    for size in range(2, 12):
        network.steps.rope(network, torch.zeros(1, size, 3))
    result["ropes_kept"] = len(network.steps.ropes.entries)
    host_steps.rope_tables = rope_tables
    result["kept_after"] = network.steps._sampling is not None
    # six prompts that the host cannot join into one call, one after the other in every step
    lengths = (5, 6, 7, 11, 13, 17)
    many = [[draw(200 + n, 1, n, 40), values] for n in lengths for _, values in positive(seed=n)]
    result["many_rows"] = rows_of(layers["modulation"], lambda: sample(OURS, many))
    result["many"] = difference(sample(OURS, many), sample(NATIVE, many))
    # a table in parts, of which two prompts have one each at hand
    kept, host_steps.MAX_ROWS = host_steps.MAX_ROWS, 2
    result["parts_rows"] = rows_of(layers["modulation"], lambda: sample(OURS, many[:2]))
    result["parts"] = difference(sample(OURS, many[:2]), sample(NATIVE, many[:2]))
    host_steps.MAX_ROWS = kept
    result["plain"] = difference(sample(OURS), sample(NATIVE))
    result["batch"] = difference(sample(OURS, batch=3), sample(NATIVE, batch=3))
    result["heun"] = difference(sample(OURS, sampler="heun"), sample(NATIVE, sampler="heun"))
    result["no_reference"] = difference(
        sample(OURS, positive(reference=None)), sample(NATIVE, positive(reference=None))
    )
    # one thing changes after the other, in one process over the same network
    changes = {
        "prompt": positive(seed=50),
        "picture": positive(reference=60),
        "guidance": positive(guidance=5.0),
    }
    result["changed"] = {
        name: difference(sample(OURS, new), sample(NATIVE, new)) for name, new in changes.items()
    }
    patched = []
    for model in (OURS, NATIVE):
        clone = model.clone()
        keys = ("txt_in.weight", "double_blocks.0.img_mod.lin.weight", "img_in.weight")
        patches = {
            f"diffusion_model.{key}": ("diff", (draw(9, *network.get_parameter(key).shape) * 0.1,))
            for key in keys
        }
        assert set(clone.add_patches(patches, 1.0)) == set(patches)
        patched.append(sample(clone))
    result["changed"]["weights"] = difference(*patched)
    result["weights_matter"] = difference(patched[0], sample(OURS))
    result["changed"]["weights_back"] = difference(sample(OURS), sample(NATIVE))
    pack.answer(result)


if __name__ == "__main__":
    main()
