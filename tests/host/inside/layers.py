"""Packed files and modulation inside the host's memory management: what it may move, and what comes out.

Argument: a folder to write in.
"""

from __future__ import annotations

import os
from pathlib import Path

import pack

pack.load_pack()
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from custom_nodes_kontext.kontext_core.models.lora import read_lora  # noqa: E402
from custom_nodes_kontext.kontext_core.models.lora_apply import patch_state  # noqa: E402
from custom_nodes_kontext.kontext_core.models.t5 import T5Encoder, T5Params  # noqa: E402
from custom_nodes_kontext.kontext_core.models.transformer import Flux, TransformerParams  # noqa: E402
from custom_nodes_kontext.kontext_core.weights import convert  # noqa: E402
from custom_nodes_kontext.kontext_core.weights.load import build  # noqa: E402
from custom_nodes_kontext.kontext_core.weights.offload import is_ahead  # noqa: E402
from custom_nodes_kontext.kontext_core.weights.parts import open_part  # noqa: E402
from custom_nodes_kontext.kontext_core.weights.quantize import quantize_file  # noqa: E402
from custom_nodes_kontext.nodes import host, host_layers, host_lora  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

FOLDER = Path(pack.ARGUMENTS[0])
PARAMS = TransformerParams(
    in_channels=64, out_channels=64, vec_in_dim=32, context_in_dim=64, hidden_size=64, num_heads=2, depth=2,
    depth_single_blocks=2, axes_dim=(8, 12, 12),
)  # fmt: skip
LOWVRAM = 300_000  # bytes; some layers fit and some do not
CPU = torch.device("cpu")
KINDS = {"plain": "a.safetensors", "fp8_scaled": "b.safetensors", "Q8_0": "c.gguf"}
QKV, MOD, HOST = "double_blocks.1.img_attn.qkv", "single_blocks.0.modulation.lin", "diffusion_model."
torch.set_grad_enabled(False)


def write_files() -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(value.shape, generator=generator) * (0.1 if value.ndim > 1 else 0.02)
        + key.endswith("scale")
        for key, value in Flux(PARAMS, device="meta").state_dict().items()
    }
    save_file(state, FOLDER / KINDS["plain"])
    for kind in ("fp8_scaled", "Q8_0"):
        quantize_file(FOLDER / KINDS["plain"], FOLDER / KINDS[kind], type=kind)


def inputs(batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "x": draw(batch, 16, 6, 8),
        "timestep": torch.full((batch,), 0.7),
        "context": draw(batch, 5, 64),
        "y": draw(batch, 32),
        "guidance": torch.full((batch,), 2.5),
    }


def run(patcher, *, planned: bool = False, lowvram: int = 0) -> torch.Tensor:
    """Loads as the host does and computes once; `planned` inside a sampling that knows its schedule."""
    if lowvram:
        patcher.unpatch_model(CPU)
        patcher.patch_model(CPU, lowvram_model_memory=lowvram)
        assert patcher.model.model_lowvram and patcher.loaded_size() > 0, "part of it is to be left out"
    else:
        comfy.model_management.load_models_gpu([patcher])
    network = patcher.model.diffusion_model
    options = {}
    if planned:
        patcher.pre_run()
        options = {"sample_sigmas": torch.tensor([1.0, 0.7, 0.0])}
    out = network(**inputs(), transformer_options=options)
    if planned:
        patcher.cleanup()
    if lowvram:
        patcher.unpatch_model(CPU)
    return out


def plain_model(state: dict):
    """A MODEL of plain float32 weights."""
    save_file({key: value.contiguous() for key, value in state.items()}, FOLDER / "merged.safetensors")
    return host.load_model_file(FOLDER / "merged.safetensors", None, "merged")


def unpacked(kind: str) -> dict[str, torch.Tensor]:
    core = build(open_part(FOLDER / KINDS[kind], "transformer"), dtype=torch.float32, operations=torch.nn)
    return {key: value.clone() for key, value in core.state_dict().items()}


def lora_tensors() -> dict[str, torch.Tensor]:
    """One packed layer, one modulation layer with its bias, one plain layer, in names that everybody knows."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer, rows in ((QKV, 192), (MOD, 192), ("img_in", 64)):
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(3, 64, generator=generator) * 0.3
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(rows, 3, generator=generator) * 0.3
    tensors[f"diffusion_model.{MOD}.diff_b"] = torch.randn(192, generator=generator) * 0.3
    return tensors


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def case(kind: str) -> dict:
    patcher = host.load_model_file(FOLDER / KINDS[kind], None, kind)
    network, answer = patcher.model.diffusion_model, {}
    state = unpacked(kind)
    answer["keys"] = sorted(network.state_dict()) == sorted(state)
    names = [name.replace(".packed", ".weight") for name, _ in network.named_parameters()]
    answer["parameters"] = sorted(names) == sorted(key for key in state if not is_ahead(key))
    answer["size"] = (
        patcher.model_size() == host_layers.loaded_bytes(patcher.model) == patcher.clone().model_size()
    )
    answer["stored"] = str(network.get_submodule(QKV).weight.dtype)
    # What the host moves, moves; what is aside stays.
    devices = {}
    network.to("meta")
    for key, value in network.state_dict(keep_vars=True).items():
        devices.setdefault("aside" if is_ahead(key) else "loaded", set()).add(value.device.type)
    answer["devices"] = {name: sorted(found) for name, found in devices.items()}

    patcher = host.load_model_file(FOLDER / KINDS[kind], None, kind)
    plain = run(patcher)
    answer["forward"] = difference(plain, run(plain_model(state)))
    answer["planned"] = difference(run(patcher, planned=True), plain)
    answer["halves"] = difference(run(patcher.clone(), lowvram=LOWVRAM), plain)

    lora = read_lora(lora_tensors())
    expected = run(plain_model(patch_state(state, [(lora, 0.8)])[0]))
    answer["lora_matters"] = difference(plain, expected)
    save_file(lora_tensors(), FOLDER / "lora.safetensors")
    ours, _, report = host_lora.add_lora(patcher, None, FOLDER / "lora.safetensors", 0.8, 0.0)
    answer["matched"] = [len(report.matched), len(report.unmatched)]
    native, _ = comfy.sd.load_lora_for_models(patcher, None, lora_tensors(), 0.8, 0.0)
    for name, patched in (("ours", ours), ("native", native)):
        answer[f"{name}_lora"] = difference(run(patched), expected)
        answer[f"{name}_lora_planned"] = difference(run(patched, planned=True), expected)
        answer[f"{name}_lora_halves"] = difference(run(patched.clone(), lowvram=LOWVRAM), expected)
    kept = ours.model.diffusion_model.get_submodule(QKV)
    run(ours)
    answer["stored_with_lora"] = str(kept.weight.dtype)
    answer["off_again"] = bool(torch.equal(run(patcher), plain))

    # The host's saving nodes write values, the LoRA in them.
    comfy.sd.save_checkpoint(str(FOLDER / "saved.safetensors"), ours)
    saved = host.load_model_file(FOLDER / "saved.safetensors", None, "saved")
    answer["saved"] = difference(run(saved), expected)

    # Nodes that merge models ask for weights as values.
    merged = plain_model(state)
    merged.add_patches(patcher.get_key_patches(HOST), 1.0, 0.0)
    answer["merged"] = difference(run(merged), plain)
    return answer


def t5_case() -> dict:
    """A packed T5 in a CLIP keeps its bytes and encodes as the core does."""
    params = T5Params(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    save_file(T5Encoder(params).state_dict(), FOLDER / "t5.safetensors")
    quantize_file(FOLDER / "t5.safetensors", FOLDER / "t5.gguf", type="Q8_0")
    core = build(open_part(FOLDER / "t5.gguf", "t5"), dtype=torch.float32)
    from custom_nodes_kontext.nodes.host_clip import _in_host_layers

    module = _in_host_layers(T5Encoder, core)
    ids = torch.arange(12)[None]
    kinds = {str(p.dtype) for name, p in module.named_parameters() if name.endswith("packed")}
    return {"stored": sorted(kinds), "difference": difference(module(ids), core(ids))}


def lists_case() -> dict:
    """GGUF files and models in shards are in the loaders' lists and load by their names."""
    convert.SHARD_BYTES = 200_000
    convert.convert_file(FOLDER / KINDS["plain"], FOLDER / "sharded", to="diffusers")
    folder_paths.add_model_folder_path("diffusion_models", str(FOLDER))
    names = host.list_models("diffusion_models")
    stored = host.load_model("c.gguf").model.diffusion_model.get_submodule(QKV).weight.dtype
    shards = len(list((FOLDER / "sharded").glob("*-of-*.safetensors")))
    index = next(name for name in names if name.startswith("sharded"))
    before = [host.fingerprint("diffusion_models", name) for name in (index, index, "c.gguf")]
    os.utime(next(iter((FOLDER / "sharded").glob("*-of-*.safetensors"))), (1, 1))
    after = [host.fingerprint("diffusion_models", name) for name in (index, index, "c.gguf")]
    return {
        "seen to change": [a != b for a, b in zip(before, after, strict=True)],
        "listed": [name for name in ("a.safetensors", "c.gguf") if name in names],
        "stored": str(stored),
        "shards": shards,
        "sharded": [Path(name).name for name in names if name.startswith("sharded")],
        "difference": difference(run(host.load_model(index)), run(host.load_model("a.safetensors"))),
    }


write_files()
pack.answer({**{kind: case(kind) for kind in KINDS}, "t5": t5_case(), "lists": lists_case()})
