"""Memory measures change no result: modulation tables, streamed blocks, pages given back, budgets kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.weights import offload
from kontext_core.weights.files import open_weights
from kontext_core.weights.load import build, load_model, load_transformer
from kontext_core.weights.offload import BlockStreamer, make_plan, modulation_layers
from kontext_core.weights.packed import PackedOperations
from kontext_core.weights.parts import open_part
from kontext_core.weights.quantize import quantize_file


@pytest.fixture(scope="module")
def files(tmp_path_factory, transformer):
    """The small transformer in bfloat16, scaled float8 and GGUF."""
    folder = tmp_path_factory.mktemp("offload")
    source = folder / "bf16.safetensors"
    save_file({key: value.clone() for key, value in transformer.state_dict().items()}, source)
    quantize_file(source, folder / "fp8.safetensors", type="fp8_scaled")
    quantize_file(source, folder / "q4.gguf", type="Q4_0")
    return {"bf16": source, "fp8": folder / "fp8.safetensors", "q4": folder / "q4.gguf"}


def inputs(params: TransformerParams, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "img": random(2, 6, params.in_channels),
        "img_ids": torch.arange(18.0).view(6, 3),
        "txt": random(2, 3, params.context_in_dim),
        "txt_ids": torch.zeros(3, 3),
        "timesteps": torch.full((2,), 0.6),
        "y": random(2, params.vec_in_dim),
        "guidance": torch.full((2,), 2.5),
    }


@pytest.mark.parametrize("kind", ["bf16", "fp8", "q4"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_schedules_tables_are_to_the_bit_those_of_its_steps(files, kind, batch):
    model = load_transformer(files[kind])
    times = torch.tensor([1.0, 0.8, 0.33, 0.1]).repeat_interleave(batch)
    y = torch.randn(batch, 64, generator=torch.Generator().manual_seed(0)).bfloat16().repeat(4, 1)
    guidance = torch.full((4 * batch,), 2.5)
    planned = model.modulation_tables(times, y, guidance, torch.bfloat16, group=batch)
    for step in range(4):
        rows = slice(step * batch, (step + 1) * batch)
        alone = model.modulation_tables(times[rows], y[rows], guidance[rows], torch.bfloat16)
        for ours, theirs in zip(_flat(planned.rows(rows.start, rows.stop)), _flat(alone), strict=True):
            assert torch.equal(ours, theirs)


def _flat(tables) -> list[torch.Tensor]:
    return [*(table for pair in tables.double for table in pair), *tables.single, tables.final]


def test_modulation_is_the_published_share_of_the_published_model():
    model = Flux(TransformerParams(), device="meta")
    layers = modulation_layers(model)
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == 3_247_448_064
    inside = {id(p) for layer in offload.layers_ahead(model) for p in layer.parameters()}
    assert inside > {id(p) for layer in layers for p in layer.parameters()}
    for key, parameter in model.named_parameters():
        assert offload.is_ahead(key) == (id(parameter) in inside), key
    plan = make_plan(model, None)
    everything = sum(p.numel() for p in model.parameters()) * 4
    assert plan.resident / everything < 0.74 and plan.resident + plan.modulation == everything


@pytest.mark.parametrize("kind", ["bf16", "fp8", "q4"])
@pytest.mark.parametrize("copies", [False, True], ids=["pages", "copies"])
@torch.no_grad()
def test_streamed_blocks_compute_the_same_bits_within_the_budget(files, kind, copies):
    """`copies` is a device's way of streaming, with the CPU's memory in the device's place."""
    file = open_weights(files[kind])
    model = build(open_part(file, "transformer"), operations=PackedOperations)
    arguments = inputs(model.params, torch.bfloat16)
    expected = model(**arguments)
    whole = make_plan(model, None).resident
    plan = make_plan(model, int(whole * 0.9))
    assert plan.streamed and plan.peak <= whole * 0.9
    cpu = torch.device("cpu")
    streamer = BlockStreamer(model, plan, cpu, file.maps, copies=copies)
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    live = []
    hooks = [
        block.register_forward_pre_hook(lambda *_: live.append(len(streamer.copies) + len(streamer.coming)))
        for block in offload.blocks_of(model)
    ]
    for _ in range(2):
        assert torch.equal(model(**arguments), expected)
    # One computes while another comes: never three.
    assert max(live) == (2 if copies and len(plan.streamed) > 1 else int(copies))
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    streamer.close()
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(**arguments), expected)


@torch.no_grad()
def test_an_error_in_a_block_puts_its_weights_back(files):
    file = open_weights(files["bf16"])
    model = build(open_part(file, "transformer"), operations=PackedOperations)
    plan = make_plan(model, int(make_plan(model, None).resident * 0.9))
    streamer = BlockStreamer(model, plan, torch.device("cpu"), file.maps, copies=True)
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}

    def fail(*_) -> None:
        raise RuntimeError("out of memory")

    streamed = offload.blocks_of(model)[plan.streamed[-1]]
    next(
        child for child in streamed.modules() if isinstance(child, torch.nn.Linear)
    ).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**inputs(model.params, torch.bfloat16))
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    streamer.close()


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_one(files):
    model = load_transformer(files["bf16"])
    with pytest.raises(ValueError, match=r"budget of 1,000 bytes is too small.*is the least"):
        make_plan(model, 1000)


@torch.no_grad()
def test_a_whole_model_within_a_budget_edits_to_the_same_bits(model_folder, monkeypatch):
    from kontext_core.edit import edit_image

    picture = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    options = {"num_steps": 2, "seed": 3, "size": (48, 32)}
    plain = edit_image(load_model(model_folder), picture, "make it red", **options)
    whole = make_plan(load_transformer(model_folder / "flux1-small.safetensors"), None).resident
    model = load_model(model_folder, budget=int(whole * 0.9))
    assert model.plans["transformer"].streamed
    budgeted = edit_image(model, picture, "make it red", **options)
    assert torch.equal(plain.latent, budgeted.latent)
    # The autoencoder works in bands here, whose sums are taken in another order.
    assert (plain.images - budgeted.images).abs().max() < 1e-3
    # As for large files: text encoders and modulation give their pages back.
    monkeypatch.setattr(offload, "SMALL", 0)
    large = edit_image(load_model(model_folder), picture, "make it red", **options)
    assert torch.equal(plain.latent, large.latent)


SCRIPT = """
import resource, sys, torch
sys.path.insert(0, sys.argv[2])
from kontext_core.weights import offload
from kontext_core.weights.load import build, load_transformer
from kontext_core.weights.parts import open_part
from kontext_core.weights.packed import PackedOperations

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
part = open_part(sys.argv[1], "transformer")
model = build(part, operations=PackedOperations)
part.file.file.release(0, part.file.file.size)
before = resident()
if sys.argv[3] == "offload":
    offload.attach(model, part.file.maps, device=torch.device("cpu"), budget=None)
with torch.inference_mode():
    times, y = torch.tensor([1.0, 0.5]), torch.zeros(2, 64, dtype=torch.bfloat16)
    tables = model.modulation_tables(times, y, torch.full((2,), 2.5), torch.bfloat16, group=1)
    print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux gives pages back at once")
def test_modulation_weights_leave_no_memory_taken(tmp_path):
    params = TransformerParams(
        vec_in_dim=64, context_in_dim=64, hidden_size=1024, num_heads=8, depth=3, depth_single_blocks=3,
        axes_dim=(16, 56, 56),
    )  # fmt: skip
    path = tmp_path / "a.safetensors"
    save_file(Flux(params).bfloat16().state_dict(), path)
    model = Flux(params, device="meta")
    modulation = 2 * sum(p.numel() for layer in modulation_layers(model) for p in layer.parameters())
    root = str(Path(__file__).parents[2])

    def grown(how: str) -> int:
        command = [sys.executable, "-c", SCRIPT, str(path), root, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # What the plain way takes and the other does not is modulation's weights; a tenth is left for buffers.
    assert grown("plain") - grown("offload") > 0.9 * modulation
