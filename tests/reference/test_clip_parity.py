"""Our CLIP text encoder against transformers' CLIPTextModel, on random weights."""

from __future__ import annotations

import pytest
import torch

from kontext_core.models.clip import IGNORABLE_KEYS, ClipParams, ClipTextEncoder, params_from_shapes

SIZES = [
    ClipParams(
        vocab_size=99,
        hidden_size=128,
        intermediate_size=96,
        num_layers=2,
        num_heads=2,
        max_length=77,
        eos_token_id=98,
    ),
    ClipParams(
        vocab_size=60,
        hidden_size=45,
        intermediate_size=31,
        num_layers=3,
        num_heads=5,
        max_length=12,
        eos_token_id=59,
    ),
]


def make_reference(params: ClipParams):
    """transformers' model with every weight random, biases and norms included."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=params.vocab_size,
        hidden_size=params.hidden_size,
        intermediate_size=params.intermediate_size,
        num_hidden_layers=params.num_layers,
        num_attention_heads=params.num_heads,
        max_position_embeddings=params.max_length,
        hidden_act="quick_gelu",
        layer_norm_eps=params.eps,
        bos_token_id=params.eos_token_id - 1,
        eos_token_id=params.eos_token_id,
        pad_token_id=params.eos_token_id,
    )
    model = CLIPTextModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif "embedding" in name:
            parameter.normal_()
    return model


def our_state(reference) -> dict[str, torch.Tensor]:
    """Published names; newer transformers drop the `text_model.` in memory but not in files."""
    prefix = "text_model."
    return {
        key if key.startswith(prefix) else prefix + key: value
        for key, value in reference.state_dict().items()
        if not key.endswith("position_ids")
    }


def make_ids(params: ClipParams, rows: int = 3) -> torch.Tensor:
    """Random rows that end at different places and are padded with the end token."""
    ids = torch.randint(
        0, params.vocab_size - 2, (rows, params.max_length), generator=torch.Generator().manual_seed(1)
    )
    for row in range(rows):
        ids[row, 2 + 3 * row :] = params.eos_token_id
    return ids


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("params", SIZES, ids=["tiny", "odd"])
def test_hidden_states_and_pooled_equal_transformers(params):
    reference = make_reference(params)
    model = ClipTextEncoder(params)
    model.load_state_dict(our_state(reference), strict=True)
    ids = make_ids(params)
    hidden, pooled = model(ids)
    expected = reference(ids)
    # Same operations in another order: a few float32 roundings over at most 3 layers.
    assert relative_error(hidden, expected.last_hidden_state) < 2e-6
    assert relative_error(pooled, expected.pooler_output) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_transformers_is(dtype):
    params = SIZES[0]
    reference = make_reference(params).to(dtype)
    model = ClipTextEncoder(params, dtype=dtype)
    model.load_state_dict(our_state(reference), strict=True)
    ids = make_ids(params)
    hidden, pooled = model(ids)
    assert hidden.dtype == pooled.dtype == dtype
    theirs = reference(ids)
    truth = reference.float()(ids)
    # About 8 roundings of u = eps/2 in each of 2 x num_layers sublayers, residual sums included, adding up as
    # independent errors, with a factor of 4 for what softmax and the norms magnify.
    bound = 4 * (torch.finfo(dtype).eps / 2) * (8 * 2 * params.num_layers) ** 0.5
    assert relative_error(hidden, truth.last_hidden_state) < bound
    assert relative_error(pooled, truth.pooler_output) < bound
    assert relative_error(hidden, truth.last_hidden_state) < 1.2 * relative_error(
        theirs.last_hidden_state, truth.last_hidden_state
    )


def test_tokens_after_the_end_do_not_change_the_pooled_output():
    params = SIZES[0]
    model = ClipTextEncoder(params)
    model.init_weights(torch.Generator().manual_seed(0))
    ids = make_ids(params, rows=1)
    other = ids.clone()
    other[0, 10:] = 5
    assert torch.allclose(model(ids)[1], model(other)[1], atol=1e-6)


def test_gradients_match_transformers():
    params = SIZES[1]
    reference = make_reference(params).requires_grad_(True)
    model = ClipTextEncoder(params)
    model.load_state_dict({key: value.detach() for key, value in our_state(reference).items()}, strict=True)
    ids, weight = (
        make_ids(params),
        torch.randn(params.hidden_size, generator=torch.Generator().manual_seed(2)),
    )
    (model(ids)[1] @ weight).sum().backward()
    (reference(ids).pooler_output @ weight).sum().backward()
    theirs = {
        key if key.startswith("text_model.") else f"text_model.{key}": p
        for key, p in reference.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if "k_proj.bias" in name:  # softmax does not see it: its gradient is rounding noise around zero
            continue
        assert relative_error(parameter.grad, theirs[name].grad) < 1e-4, name


def test_init_weights_is_seeded():
    models = [ClipTextEncoder(SIZES[0]) for _ in range(2)]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_clip_l_has_the_published_parameter_count():
    model = ClipTextEncoder(ClipParams(), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 123_060_480
    assert not set(IGNORABLE_KEYS) & set(model.state_dict())


def test_sizes_are_read_off_the_shapes():
    for params, heads in ((ClipParams(), None), (SIZES[0], None), (SIZES[1], 5)):
        model = ClipTextEncoder(params, device="meta")
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert params_from_shapes(shapes, num_heads=heads) == params


def test_errors_name_what_is_wrong():
    model = ClipTextEncoder(SIZES[1])
    with pytest.raises(ValueError, match="at most 12"):
        model(torch.full((1, 13), 59))
    with pytest.raises(ValueError, match="no end-of-text token"):
        model(torch.zeros((1, 12), dtype=torch.long))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        ClipParams(num_heads=7)
    with pytest.raises(ValueError, match="not a CLIP text encoder"):
        params_from_shapes({"shared.weight": (3, 4)})
