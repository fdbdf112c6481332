"""Our T5 encoder against transformers' T5EncoderModel, on random weights."""

from __future__ import annotations

import pytest
import torch

from kontext_core.models import t5
from kontext_core.models.t5 import DUPLICATE_KEYS, T5Encoder, T5Params, params_from_shapes

SIZES = [
    T5Params(vocab_size=97, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4),
    T5Params(
        vocab_size=53, d_model=40, d_kv=7, d_ff=33, num_layers=3, num_heads=5
    ),  # odd heads, inner != d_model
    T5Params(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=3,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=40,
    ),
]


def make_reference(params: T5Params, scale: float = 1.0):
    """transformers' model with weights random enough that norms and bias table matter too."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=params.vocab_size,
        d_model=params.d_model,
        d_kv=params.d_kv,
        d_ff=params.d_ff,
        num_layers=params.num_layers,
        num_heads=params.num_heads,
        relative_attention_num_buckets=params.relative_attention_num_buckets,
        relative_attention_max_distance=params.relative_attention_max_distance,
        layer_norm_epsilon=params.eps,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = T5EncoderModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif "relative_attention_bias" in name:
            parameter.normal_()
        elif name != "shared.weight":
            parameter.mul_(scale)
    return model


def our_state(reference) -> dict[str, torch.Tensor]:
    return {key: value for key, value in reference.state_dict().items() if key not in DUPLICATE_KEYS}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("params", SIZES, ids=["tiny", "odd", "few-buckets"])
@pytest.mark.parametrize("length", [1, 9, 200])
def test_hidden_states_equal_transformers(params, length):
    reference = make_reference(params)
    model = T5Encoder(params)
    model.load_state_dict(our_state(reference), strict=True)
    ids = torch.randint(0, params.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    # Same operations in another order: a few float32 roundings (6e-8) over at most 3 layers.
    assert relative_error(model(ids), reference(ids).last_hidden_state) < 2e-6


def test_a_mask_hides_the_same_tokens_as_in_transformers():
    params = SIZES[0]
    reference = make_reference(params)
    model = T5Encoder(params)
    model.load_state_dict(our_state(reference), strict=True)
    ids = torch.randint(0, params.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    ours, theirs = model(ids, mask), reference(ids, attention_mask=mask).last_hidden_state
    assert relative_error(ours, theirs) < 2e-6
    assert relative_error(model(ids)[0], theirs[0]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_transformers_is(dtype):
    params = SIZES[0]
    reference = make_reference(params)
    model = T5Encoder(params, dtype=dtype)
    model.load_state_dict(our_state(reference), strict=True)
    rounded = make_reference(params)
    rounded.load_state_dict({k: v.to(dtype) for k, v in reference.state_dict().items()})
    ids = torch.randint(0, params.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    truth = rounded(ids).last_hidden_state  # the rounded weights, computed in float32
    theirs = make_reference(params).to(dtype)
    theirs.load_state_dict({k: v.to(dtype) for k, v in reference.state_dict().items()})
    ours = model(ids)
    assert ours.dtype == dtype
    # Each sublayer rounds its input, its inner values and its output: about 6 roundings of u = eps/2 in each
    # of 2 x num_layers sublayers and one at the end, adding up as independent errors; softmax and gelu can
    # magnify by about their condition, allowed for by a factor of 4.
    unit = torch.finfo(dtype).eps / 2
    bound = 4 * unit * (6 * 2 * params.num_layers + 1) ** 0.5
    error = relative_error(ours, truth)
    assert error < bound
    # Our residual stream is float32, theirs is not: never worse than theirs by more than noise.
    assert error < 1.2 * relative_error(theirs(ids).last_hidden_state, truth)


def test_float16_survives_a_feed_forward_beyond_its_range():
    params = SIZES[0]
    reference = make_reference(params)
    for name, parameter in reference.named_parameters():
        if "wo" in name:
            parameter.mul_(3e4)
        if "wi" in name:
            parameter.mul_(30)
    ids = torch.randint(0, params.vocab_size, (1, 20), generator=torch.Generator().manual_seed(1))
    state = {key: value.half() for key, value in our_state(reference).items()}
    model = T5Encoder(params, dtype=torch.float16)
    model.load_state_dict(state, strict=True)
    exact = T5Encoder(params)
    exact.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
    stream = []
    exact.encoder.block[0].layer[1].DenseReluDense.register_forward_hook(lambda m, a, out: stream.append(out))
    expected = exact(ids)
    assert stream[0].abs().max() > torch.finfo(torch.float16).max
    assert relative_error(model(ids), expected) < 1e-2


def test_gradients_reach_every_weight_and_match_transformers():
    params = SIZES[1]
    reference = make_reference(params).requires_grad_(True)
    model = T5Encoder(params)
    model.load_state_dict(our_state(reference), strict=True)
    ids = torch.randint(0, params.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    model(ids).square().mean().backward()
    reference(ids).last_hidden_state.square().mean().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        # The loss of a normalised vector is nearly flat: gradients are small differences, so 1e-3 of their
        # norm.
        assert relative_error(parameter.grad, theirs[name].grad) < 1e-3, name


def test_init_weights_is_seeded_and_keeps_the_output_at_unit_scale():
    params = SIZES[0]
    models = [T5Encoder(params) for _ in range(2)]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    out = models[0](torch.arange(20)[None])
    assert 0.9 < out.std() < 1.1  # the final norm makes it one


def test_t5_xxl_has_the_published_parameter_count():
    model = T5Encoder(T5Params(), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_762_310_656


@pytest.mark.parametrize("params", SIZES[:2], ids=["tiny", "odd"])
def test_sizes_are_read_off_the_shapes(params):
    shapes = {key: tuple(value.shape) for key, value in T5Encoder(params, device="meta").state_dict().items()}
    assert params_from_shapes(shapes) == params
    shapes["encoder.embed_tokens.weight"] = shapes.pop("shared.weight")
    assert params_from_shapes(shapes) == params


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="num_heads is 0"):
        T5Params(num_heads=0)
    with pytest.raises(ValueError, match="must be even"):
        T5Params(relative_attention_num_buckets=7)
    with pytest.raises(ValueError, match=r"v1\.0"):
        params_from_shapes({"encoder.block.0.layer.1.DenseReluDense.wi.weight": (4, 4)})
    with pytest.raises(ValueError, match=r"not a T5 v1\.1 encoder"):
        params_from_shapes({"img_in.weight": (4, 4)})
    assert set(t5.DUPLICATE_KEYS.values()) <= set(T5Encoder(SIZES[0]).state_dict())
