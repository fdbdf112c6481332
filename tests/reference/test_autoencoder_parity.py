"""The autoencoder against diffusers' AutoencoderKL, and its published sizes."""

from __future__ import annotations

import pytest
import rounding
import torch

from kontext_core.models.autoencoder import Autoencoder, AutoencoderParams, params_from_shapes

SMALL = AutoencoderParams(ch=32, ch_mult=(1, 2, 4, 4))


def diffusers_names(key: str, num_levels: int) -> str:
    """A BFL key -> the AutoencoderKL key, written apart from the converter the package ships."""
    side, rest = key.split(".", 1)
    parts = rest.split(".")
    if parts[0] in ("down", "up"):
        level = int(parts[1])
        level = level if parts[0] == "down" else num_levels - 1 - level
        if parts[2] == "block":
            tail = ".".join(parts[4:]).replace("nin_shortcut", "conv_shortcut")
            return f"{side}.{parts[0]}_blocks.{level}.resnets.{parts[3]}.{tail}"
        return f"{side}.{parts[0]}_blocks.{level}.{parts[2]}rs.0.{'.'.join(parts[3:])}"
    if parts[0] == "mid":
        if parts[1].startswith("block_"):
            return f"{side}.mid_block.resnets.{int(parts[1][-1]) - 1}.{'.'.join(parts[2:])}"
        name = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}[parts[2]]
        return f"{side}.mid_block.attentions.0.{name}.{parts[3]}"
    return f"{side}.{rest.replace('norm_out', 'conv_norm_out')}"


def reference_of(autoencoder: Autoencoder):
    diffusers = pytest.importorskip("diffusers")
    params = autoencoder.params
    levels = len(params.ch_mult)
    reference = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(params.ch * mult for mult in params.ch_mult),
        layers_per_block=params.num_res_blocks,
        latent_channels=params.z_channels,
        norm_num_groups=params.num_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    state = {}
    for key, value in autoencoder.state_dict().items():
        name = diffusers_names(key, levels)
        # diffusers keeps the attention's 1x1 convolutions as linear layers.
        state[name] = value[:, :, 0, 0] if ".attentions." in name and value.ndim == 4 else value
    reference.load_state_dict(state, strict=True)
    return reference.eval()


def random_autoencoder(params: AutoencoderParams, seed: int = 0) -> Autoencoder:
    """Random weights, norms and biases included, so that no swapped pair goes unseen."""
    torch.manual_seed(seed)
    autoencoder = Autoencoder(params).eval()
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return autoencoder


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize(
    "params, size",
    [
        (SMALL, (64, 48)),
        (AutoencoderParams(ch=16, ch_mult=(1, 2, 4, 8)), (40, 72)),
        (AutoencoderParams(ch=128, num_res_blocks=1), (24, 16)),
    ],
    ids=["published shape, narrow", "the bundled model's", "full width"],
)
@torch.no_grad()
def test_encoding_and_decoding_equal_autoencoder_kl(params, size):
    ours = random_autoencoder(params)
    theirs = reference_of(ours)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((2, 3, *size), generator=generator) * 2 - 1
    mean, logvar = ours.moments(images)
    posterior = theirs.encode(images).latent_dist
    # fp32 sums in another order: about 1e-6; 1e-5 is ten times sharper than what is asked for.
    assert relative_error(mean, posterior.mean) < 1e-5
    assert relative_error(logvar, posterior.logvar) < 1e-5
    latents = torch.randn((2, 16, size[0] // 8, size[1] // 8), generator=generator)
    assert relative_error(ours.decode_raw(latents), theirs.decode(latents).sample) < 1e-5


@torch.no_grad()
def test_bfloat16_is_as_near_to_autoencoder_kl_in_float32_as_roundings_allow():
    ours = rounding.with_bfloat16_weights(random_autoencoder(SMALL))
    theirs = reference_of(ours)
    generator = torch.Generator().manual_seed(1)
    images = (torch.rand((1, 3, 64, 64), generator=generator) * 2 - 1).bfloat16()
    latents = torch.randn((1, 16, 8, 8), generator=generator).bfloat16()
    ways = {
        "encode": (lambda: theirs.encode(images.float()).latent_dist.mean, lambda: ours.encode_raw(images)),
        "decode": (lambda: theirs.decode(latents.float()).sample, lambda: ours.decode_raw(latents)),
    }
    bounds = {name: rounding.bfloat16_bound([theirs], exact) for name, (exact, _) in ways.items()}
    ours.bfloat16(), theirs.bfloat16()
    rounded = {"encode": theirs.encode(images).latent_dist.mean, "decode": theirs.decode(latents).sample}
    for name, (bound, exact) in bounds.items():
        got = ways[name][1]()
        error, theirs_error = (rounding.relative(value, exact) for value in (got, rounded[name]))
        # Two independent roundings of the same sums: half as much again is allowed for chance.
        assert error < 1.5 * theirs_error and rounding.relative(got, rounded[name]) < 2.5 * theirs_error
        # 0.0060 of 0.018 and 0.017 of 0.047; a bound that anything meets would say nothing
        assert bound / 4 < error < bound, (name, error, bound)


def test_the_published_autoencoder_has_its_published_size():
    autoencoder = Autoencoder(device="meta")
    encoder = sum(p.numel() for p in autoencoder.encoder.parameters())
    decoder = sum(p.numel() for p in autoencoder.decoder.parameters())
    assert (encoder, decoder) == (34_274_208, 49_545_475)
    shapes = {key: tuple(value.shape) for key, value in autoencoder.state_dict().items()}
    assert params_from_shapes(shapes) == AutoencoderParams()
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (512, 256, 1, 1)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["decoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)


@torch.no_grad()
def test_scaling_happens_in_encode_and_decode_only():
    autoencoder = random_autoencoder(SMALL)
    images = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw, scaled = autoencoder.encode_raw(images), autoencoder.encode(images)
    assert torch.allclose(scaled, 0.3611 * (raw - 0.1159), atol=1e-6)
    assert torch.allclose(autoencoder.decode(scaled), autoencoder.decode_raw(raw), atol=1e-4)


def test_a_picture_of_the_wrong_size_is_named():
    autoencoder = Autoencoder(SMALL, device="meta")
    with pytest.raises(ValueError, match=r"\(1, 3, 20, 16\).*multiples of 8"):
        autoencoder.encode(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\).*16"):
        autoencoder.decode(torch.zeros(1, 4, 2, 2))
