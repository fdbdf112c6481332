"""Compiled blocks: the eager answers, and nothing is compiled anew for another size, prompt or set of weights."""

from __future__ import annotations

import logging

import pytest
import torch

from kontext_core import latents
from kontext_core.models import regional
from kontext_core.models.transformer import Flux, TransformerParams

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


@pytest.mark.skipif(
    regional.compiler_problem("cpu") is not None, reason="needs a C++ compiler, as torch.compile does"
)
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


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(regional, "compiler_problem", lambda _: "no C++ compiler was found")
    model = network()
    with caplog.at_level(logging.WARNING, logger="kontext"):
        assert not regional.compile_blocks(model)
    assert "not compiled" in caplog.text and "no C++ compiler was found" in caplog.text
    assert not regional.is_compiled(model)
