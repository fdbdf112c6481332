"""Compiled blocks: the eager answers, and nothing is compiled anew for another size, prompt or set of weights."""

from __future__ import annotations

import logging

import pytest
import torch
from compiler import needs_compiler

from kontext_core import latents
from kontext_core.accelerate import Accelerate
from kontext_core.conditioning import PromptConditioning, make_references
from kontext_core.denoise import Denoiser
from kontext_core.models import regional
from kontext_core.models.lora import read_lora
from kontext_core.models.lora_apply import apply
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.samplers import euler

PARAMS = TransformerParams(
    vec_in_dim=24, context_in_dim=40, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=(4, 14, 14)
)  # fmt: skip


def network() -> Flux:
    torch.manual_seed(0)
    flux = Flux(PARAMS)
    with torch.no_grad():
        for name, parameter in flux.named_parameters():
            parameter.copy_(
                torch.ones_like(parameter) if name.endswith("scale") else 0.1 * torch.randn_like(parameter)
            )
    return flux.eval().requires_grad_(False)


def inputs(rows: int, columns: int, text: int, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    ids = latents.position_ids(2 * rows, 2 * columns)
    guidance = torch.tensor([2.5])
    return (
        draw(1, rows * columns, 64), ids, draw(1, text, 40), latents.text_ids(text), torch.tensor([0.7]), draw(1, 24),
        guidance,
    )  # fmt: skip


@needs_compiler
@torch.inference_mode()
def test_two_graphs_serve_all_blocks_sizes_prompts_and_weights():
    eager, compiled = network(), network()
    torch._dynamo.reset()
    with regional.CompileClock() as clock:
        assert regional.compile_blocks(compiled) and regional.is_compiled(compiled)
        first = compiled(*inputs(4, 6, 5))
    assert clock.graphs == 2, "one of the double-stream blocks and one of the single-stream blocks"
    # float32 sums that fuse otherwise
    assert torch.allclose(first, eager(*inputs(4, 6, 5)), atol=1e-5)
    with regional.CompileClock() as again:
        for size in ((6, 4, 5), (5, 7, 9), (4, 6, 5)):
            assert torch.allclose(compiled(*inputs(*size, seed=3)), eager(*inputs(*size, seed=3)), atol=1e-5)
        for model in (compiled, eager):  # as a LoRA does it: other values in the same parameters
            for block in model.single_blocks:
                block.linear1.weight.data = block.linear1.weight.data * 1.1
        assert torch.allclose(compiled(*inputs(4, 6, 5)), eager(*inputs(4, 6, 5)), atol=1e-5)
    assert again.graphs == 0
    regional.undo(compiled)
    assert not regional.is_compiled(compiled)
    assert torch.equal(compiled(*inputs(4, 6, 5)), eager(*inputs(4, 6, 5)))


@needs_compiler
@pytest.mark.parametrize(
    "accelerate",
    [None, pytest.param(Accelerate(every=3, first_block=0.1, warmup=1), marks=pytest.mark.slow)],
    ids=["plain", "accelerated"],  # the attention that records is not compiled, so the graphs are more
)
def test_after_a_batch_was_seen_loras_and_other_batches_compile_nothing(accelerate):
    eager, compiled = network(), network()
    torch._dynamo.reset()
    assert regional.compile_blocks(compiled)
    up, down = torch.randn(2, 64, 2, generator=torch.Generator().manual_seed(1)).unbind()
    key = "lora_unet_double_blocks_0_img_attn_proj"
    lora = read_lora(
        {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down.t().contiguous()}, name="t"
    )

    def sample(model: Flux, batch: int, seed: int = 0) -> torch.Tensor:
        draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
        prompt = PromptConditioning(txt=draw(batch, 5, 40), vec=draw(batch, 24))
        given, grid = make_references([draw(1, 16, 6, 8)], (6, 8)), torch.linspace(1, 0, 6)
        options = {"guidance": 2.5, "planned": grid[:-1].tolist(), "accelerate": accelerate}
        return euler(Denoiser(model, prompt, given, 6, 8, **options), draw(batch, 12, 64), grid)

    # float32 sums that fuse otherwise, over five steps
    assert torch.allclose(sample(compiled, 2), sample(eager, 2), atol=1e-4)
    plain = sample(eager, 3, seed=7)
    with regional.CompileClock() as clock:
        for loras in ([(lora, 1.0)], []):
            for model in (compiled, eager):
                apply({"transformer": model}, loras)
            found = sample(compiled, 3, seed=7)
            assert torch.allclose(found, sample(eager, 3, seed=7), atol=1e-4)
            assert torch.allclose(found, plain, atol=1e-4) == (not loras)
    assert clock.graphs == 0


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(regional, "compiler_problem", lambda _: "no C++ compiler was found")
    model = network()
    with caplog.at_level(logging.WARNING, logger="kontext"):
        assert not regional.compile_blocks(model)
    assert "not compiled" in caplog.text and "no C++ compiler was found" in caplog.text
    assert not regional.is_compiled(model)
