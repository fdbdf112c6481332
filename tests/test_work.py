"""A guard against work and memory that creep in: operations and allocations are counted, not seconds."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kontext_core import latents
from kontext_core.conditioning import PromptConditioning, make_references
from kontext_core.denoise import Denoiser
from kontext_core.models import transformer
from kontext_core.models.blocks import DoubleStreamBlock, SingleStreamBlock
from kontext_core.models.operations import block_operations, modulation_operations
from kontext_core.models.rope import rope_tables
from kontext_core.models.tiled import Scratch
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.samplers import euler

PARAMS = TransformerParams(
    vec_in_dim=24, context_in_dim=40, hidden_size=128, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=(8, 28, 28)
)  # fmt: skip
WIDTH, TEXT, SIDE = PARAMS.hidden_size, 6, 16

# PyTorch's counter does not know its own attention for the CPU.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    )
}


@pytest.fixture(scope="module")
def network() -> Flux:
    torch.manual_seed(0)
    return Flux(PARAMS).eval().requires_grad_(False)


def sampling(network: Flux, steps: int, batch: int = 1, references: int = 1):
    """A whole sampling, from the making of the tables to the last step."""
    prompt = PromptConditioning(txt=torch.randn(batch, TEXT, 40), vec=torch.randn(batch, 24))
    given = make_references([torch.randn(1, 16, SIDE, SIDE) for _ in range(references)], (SIDE, SIDE))
    x = latents.pack(torch.randn(batch, 16, SIDE, SIDE))
    grid = torch.linspace(1, 0, steps + 1)

    def run() -> torch.Tensor:
        planned = grid[:-1].tolist()
        return euler(Denoiser(network, prompt, given, SIDE, SIDE, guidance=2.5, planned=planned), x, grid)

    return run


def operations(run) -> int:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def expected(steps: int, batch: int = 1, references: int = 1) -> int:
    """What the sizes say: blocks and in- and outgoing layers every step, all else once a sampling."""
    target, context = (SIDE // 2) ** 2, references * (SIDE // 2) ** 2
    tokens = TEXT + target + context
    a_step = block_operations(PARAMS, tokens, tokens) + 2 * target * WIDTH * (64 + 64)
    once = 2 * WIDTH * (TEXT * 40 + context * 64)
    embedders = 2 * WIDTH * ((256 + WIDTH) * 2 + 24 + WIDTH)
    modulation = modulation_operations(PARAMS, 1) + embedders
    return batch * (steps * (a_step + modulation) + once)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_sampling_multiplies_what_its_sizes_say_and_nothing_twice(network, steps, references, batch):
    assert operations(sampling(network, steps, batch, references)) == expected(steps, batch, references)


def allocated(run, large: int) -> tuple[int, int]:
    """(the most bytes of new tensors alive at once, how many had `large` bytes or more), after a call to warm up."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = most = count = 0
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            count += event.nbytes() >= large
            most = max(most, now)
    return most, count


# Peaks in rows of the width, beside the memory that all blocks share (projections, q and k, hidden rows): what was
# modulated, what attention gave, and the result; a double-stream block's also v of both streams. What pieces and tables
# take beside that does not grow with the tokens: 2 MB.
@pytest.mark.parametrize(("kind", "rows", "num_large"), [("single", 3, 9), ("double", 4, 12)])
def test_a_blocks_memory_stays_at_its_few_large_tensors(kind, rows, num_large):
    torch.manual_seed(0)
    block = {"single": SingleStreamBlock, "double": DoubleStreamBlock}[kind](
        PARAMS, torch.nn, torch.float32, "cpu"
    )
    block.requires_grad_(False)
    text, image = 100, 1900
    rope = rope_tables(torch.zeros(text + image, 3), PARAMS.axes_dim, PARAMS.theta)
    scratch = Scratch()
    img, txt = torch.randn(1, image, WIDTH), torch.randn(1, text, WIDTH)

    def run() -> None:
        with torch.inference_mode():
            if kind == "single":
                block(torch.cat((txt, img), 1), torch.randn(1, 3 * WIDTH), rope, scratch=scratch)
            else:
                mods = torch.randn(2, 1, 6 * WIDTH)
                block(img, txt, mods[0], mods[1], rope, scratch=scratch)

    row = (text + image) * WIDTH * 4
    most, count = allocated(run, row // 2)
    assert most < rows * row + 2e6, f"{most / row:.1f} rows"
    assert count <= num_large, f"{count} large allocations"


def test_positions_are_turned_into_tables_once_a_sampling(network, monkeypatch):
    made = []
    monkeypatch.setattr(
        transformer, "rope_tables", lambda *given: (made.append(given[0].shape), rope_tables(*given))[1]
    )
    sampling(network, steps=4, batch=3, references=2)()
    assert made == [(TEXT + 3 * (SIDE // 2) ** 2, 3)]


def peak(network: Flux, **sizes: int) -> int:
    """The most bytes of new tensors alive at once in a sampling of these sizes."""
    return allocated(sampling(network, **sizes), large=2**30)[0]


# Attention's own law is its operations', quadratic in the tokens; its memory is theirs alone, as of all else.
@pytest.mark.parametrize("axis", ["batch", "references"])
def test_memory_grows_no_faster_than_the_tokens(network, axis):
    sizes = [{"steps": 2, axis: count} for count in (1, 2, 4)]
    one, two, four = (peak(network, **size) for size in sizes)
    assert two > 1.05 * one, "it is measured at all"
    assert four - two < 1.05 * 2 * (two - one), "what a sample or a reference adds is the same each time"


def test_memory_does_not_grow_with_the_steps_but_by_their_tables(network):
    table = (
        4 * (12 * PARAMS.depth + 3 * PARAMS.depth_single_blocks + 2) * WIDTH
    )  # bytes of a step's modulation
    few, many = peak(network, steps=2), peak(network, steps=10)
    assert many - few < 1.05 * 8 * table
