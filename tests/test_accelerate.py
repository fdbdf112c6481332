"""Acceleration: exact where it skips nothing, right for batches, and it counts what it skips."""

from __future__ import annotations

import pytest
import torch

from kontext_core import latents
from kontext_core.accelerate import Accelerate, Reuse
from kontext_core.conditioning import PromptConditioning, make_references
from kontext_core.denoise import Denoiser
from kontext_core.edit import edit_image
from kontext_core.models.operations import block_operations
from kontext_core.models.transformer import Flux, TransformerParams
from kontext_core.presets import KONTEXT_TINY
from kontext_core.samplers import euler
from kontext_core.weights.load import load_model

PARAMS = TransformerParams(
    vec_in_dim=24, context_in_dim=40, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=(4, 14, 14)
)  # fmt: skip
GRID = torch.linspace(1, 0, 9)


@pytest.fixture(scope="module")
def network() -> Flux:
    torch.manual_seed(0)
    flux = Flux(PARAMS)
    with torch.no_grad():
        for name, parameter in flux.named_parameters():
            parameter.copy_(
                torch.ones_like(parameter) if name.endswith("scale") else 0.1 * torch.randn_like(parameter)
            )
    return flux.eval().requires_grad_(False)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoiser(network: Flux, accelerate: Accelerate | None, batch: int = 1, *, first: int = 0) -> Denoiser:
    """Over samples first, first + 1 … of a fixed set of prompts and references, target and context of 6×8 cells."""
    samples = range(first, first + batch)
    prompt = PromptConditioning(
        txt=torch.cat([draw(10 + i, 1, 5, 40) for i in samples]),
        vec=torch.cat([draw(20 + i, 1, 24) for i in samples]),
    )
    context = torch.cat([draw(30 + i, 1, 16, 6, 8) for i in samples])
    return Denoiser(
        network,
        prompt,
        make_references([context], (6, 8)),
        6,
        8,
        guidance=2.5,
        planned=GRID[:-1].tolist(),
        accelerate=accelerate,
    )


def noise(batch: int = 1, *, first: int = 0) -> torch.Tensor:
    return torch.cat([latents.pack(draw(40 + i, 1, 16, 6, 8)) for i in range(first, first + batch)])


def sample(network: Flux, accelerate: Accelerate | None, batch: int = 1, *, first: int = 0):
    used = denoiser(network, accelerate, batch, first=first)
    return euler(used, noise(batch, first=first), GRID), used.saved


ALMOST_OFF = [
    Accelerate(every=4, warmup=8),
    Accelerate(every=4, regions=1e-9, warmup=8),
    Accelerate(first_block=1e-9),
]


@pytest.mark.parametrize("accelerate", [None, Accelerate(), *ALMOST_OFF], ids=str)
def test_what_skips_nothing_is_exact(network, accelerate):
    plain, _ = sample(network, None)
    result, _ = sample(network, accelerate)
    assert torch.equal(result, plain)


def test_a_partial_evaluation_is_the_full_one_while_the_context_is_as_it_was(network):
    """At the same x and t the recorded keys and values are the very ones a full evaluation would compute."""
    used = denoiser(network, Accelerate(every=2, warmup=1))
    x = noise()
    full, part = used(x, 0.7), used(x, 0.7)
    assert (used.saved.full, used.saved.part) == (1, 1)
    # float32 sums over the same keys in another order
    assert torch.allclose(full, part, atol=1e-5 * full.abs().max())


def test_active_tokens_of_a_partial_evaluation_are_those_of_the_full_one(network):
    used = denoiser(network, Accelerate(every=2, warmup=1, regions=0.1))
    x = noise()
    used.reuse.reference = x - 0.7 * denoiser(network, None)(x, 0.7)
    used.reuse.reference[:, 0] += 1  # the first token is edited, all others are the reference's
    full, part = used(x, 0.7), used(x, 0.7)
    active = used.reuse.active
    assert active.tolist() == [0, 1, 4, 5], "the token and its neighbours in a grid of 3 rows and 4 columns"
    assert torch.allclose(full[:, active], part[:, active], atol=1e-5 * full.abs().max())
    # the others go on to the x_0 that the full evaluation predicted: at the same x and t that is the same velocity
    assert torch.allclose(full, part, atol=1e-4 * full.abs().max())


@pytest.mark.parametrize(
    "accelerate",
    [Accelerate(every=3), Accelerate(every=3, regions=1.2), Accelerate(first_block=2.0)],
    ids=["context", "regions", "first_block"],
)
def test_every_mode_saves_operations_and_stays_near(network, accelerate):
    plain, _ = sample(network, None)
    result, saved = sample(network, accelerate)
    assert 0.05 < saved.share < 1
    assert not torch.equal(result, plain)
    assert (result - plain).square().mean() < 0.5 * plain.square().mean()


@pytest.mark.parametrize(
    "accelerate",
    [Accelerate(every=3), Accelerate(every=3, regions=1.2), Accelerate(first_block=2.0)],
    ids=["context", "regions", "first_block"],
)
def test_a_second_sampling_uses_nothing_of_the_first(network, accelerate):
    used, fresh = denoiser(network, accelerate), denoiser(network, accelerate)
    euler(used, noise(first=5), GRID)
    assert torch.equal(euler(used, noise(), GRID), euler(fresh, noise(), GRID))
    assert used.saved.full + used.saved.part == 2 * (fresh.saved.full + fresh.saved.part)


def test_samples_of_a_batch_do_not_mix(network):
    accelerate = Accelerate(every=3)
    together, _ = sample(network, accelerate, 3)
    for i in range(3):
        alone, _ = sample(network, accelerate, 1, first=i)
        assert torch.allclose(together[i], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    "accelerate", [Accelerate(every=3, regions=1.2), Accelerate(first_block=0.3)], ids=str
)
def test_a_batch_skips_only_what_no_sample_needs(network, accelerate):
    _, together = sample(network, accelerate, 3)
    alone = [sample(network, accelerate, 1, first=i)[1] for i in range(3)]
    assert together.share <= min(saved.share for saved in alone) + 1e-6


def test_saved_operations_are_those_of_the_tokens_that_ran(network):
    _, saved = sample(network, Accelerate(every=4, warmup=1))
    text, target, context = 5, 12, 12
    assert (saved.full, saved.part) == (2, 6)
    everything = block_operations(PARAMS, text + target + context, text + target + context)
    part = block_operations(PARAMS, text + target, text + target + context)
    assert saved.operations == 2 * everything + 6 * part
    assert saved.operations_of_all == 8 * everything
    assert "2 full and 6 partial" in str(saved)


def test_blocks_see_only_the_tokens_that_are_computed(network):
    seen = []
    handle = network.single_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    sample(network, Accelerate(every=4, warmup=1))
    handle.remove()
    assert seen == [29, 17, 17, 17, 29, 17, 17, 17]


def test_an_edit_takes_it_and_says_what_was_saved(random_tiny_folder):
    model = load_model(random_tiny_folder)
    picture = draw(1, 1, 3, 32, 48).clamp(-1, 1)
    plain = edit_image(model, picture, "x", num_steps=6, size=(48, 32))
    assert plain.saved is None
    quick = edit_image(model, picture, "x", num_steps=6, size=(48, 32), accelerate=Accelerate(every=3))
    assert quick.saved.part > 0 and quick.saved.share > 0
    # without references there is nothing to reuse
    alone = edit_image(model, None, "x", num_steps=3, size=(48, 32), accelerate=Accelerate(every=3))
    assert alone.saved.share == 0 and "there are no references" in str(alone.saved)


def test_a_region_that_cannot_be_left_out_is_told(random_tiny_folder):
    model = load_model(random_tiny_folder)
    options = {"num_steps": 4, "accelerate": Accelerate(every=2, regions=100.0)}
    alike = edit_image(model, draw(1, 1, 3, 32, 48).clamp(-1, 1), "x", size=(48, 32), **options).saved
    other = edit_image(model, draw(1, 1, 3, 32, 48).clamp(-1, 1), "x", size=(32, 32), **options).saved
    assert alike.notes == other.notes == (), "the picture is fitted to the size that is asked for"
    latent = draw(2, 1, 16, 6, 4)
    other = edit_image(model, None, "x", reference_latents=[latent], size=(48, 32), **options).saved
    assert other.notes == ("no region is left out, since the first reference has not the picture's size",)
    assert other.part > 0 and 0 < other.share < alike.share
    assert other.as_json()["notes"] == list(other.notes) and other.as_json()["part"] == other.part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"warmup": 0}, "warmup 0"),
        ({"regions": -1.0, "every": 2}, "regions is -1"),
        ({"regions": 0.5}, "set every to 2 or more"),
        ({"first_block": float("nan")}, "first_block nan"),
    ],
)
def test_settings_out_of_range_are_errors_that_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        Accelerate(**options)


@pytest.mark.parametrize(("every", "speedup"), [(4, 1.5), (8, 1.6)])
def test_of_an_edit_of_a_megapixel_reused_context_leaves_this_much_to_do(every, speedup):
    """By count, at the published sizes: 28 steps, 512 text tokens, 4,096 of the target and of one reference."""
    params = TransformerParams()
    text, side = 512, 64
    reuse = Reuse(Accelerate(every=every), params, num_text=text, grid=(side, side), num_context=side * side)
    keys, x = torch.zeros(1, 1, text + 2 * side * side, 1), torch.zeros(1, side * side, 1)
    for _ in range(28):
        part = reuse.begin()
        here = keys if part is None else keys[:, :, : text + side * side]
        for _ in range(params.depth + params.depth_single_blocks):
            attended = reuse.attend(lambda q, k, v: k, here, here, here)
            assert attended.shape == keys.shape, "every query sees all keys"
        reuse.finish(x, 0.5, x)
    assert 1 / (1 - reuse.saved.share) > speedup


def test_where_text_is_much_of_it_reusing_the_context_can_save_no_more_than_its_share():
    """kontext-tiny's 48 words, 64 cells and 64 of context: 1.57 at the most, however rarely they are computed."""
    params = KONTEXT_TINY.transformer
    assert 1.5 < block_operations(params, 176, 176) / block_operations(params, 112, 176) < 1.58
