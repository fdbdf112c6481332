"""The flow transformer against diffusers' FluxTransformer2DModel, random weights copied over key by key."""

from __future__ import annotations

import pytest
import rounding
import torch

from kontext_core import latents
from kontext_core.models.blocks import ModulationTables
from kontext_core.models.transformer import Flux, TransformerParams

diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install diffusers")

PARAMS = TransformerParams(
    in_channels=64,
    out_channels=64,
    vec_in_dim=24,
    context_in_dim=40,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 14, 14),
)


def to_diffusers(state: dict[str, torch.Tensor], params: TransformerParams) -> dict[str, torch.Tensor]:
    """BFL keys -> diffusers keys, written here on its own so that it checks the package's converter too."""
    out: dict[str, torch.Tensor] = {}
    renames = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    double = {
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    }
    split = {
        "img_attn.qkv": ("to_q", "to_k", "to_v"),
        "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }
    single = {
        "modulation.lin": "norm.linear",
        "linear2": "proj_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    }
    hidden = params.hidden_size
    for key, value in state.items():
        stem, leaf = key.rsplit(".", 1)
        leaf = "weight" if leaf == "scale" else leaf
        if stem in renames:
            out[f"{renames[stem]}.{leaf}"] = value
        elif stem == "final_layer.adaLN_modulation.1":
            shift, scale = value.chunk(2)
            out[f"norm_out.linear.{leaf}"] = torch.cat((scale, shift))
        elif stem.startswith("double_blocks."):
            _, index, rest = stem.split(".", 2)
            prefix = f"transformer_blocks.{index}"
            if rest in split:
                for name, part in zip(split[rest], value.chunk(3), strict=True):
                    out[f"{prefix}.attn.{name}.{leaf}"] = part
            else:
                out[f"{prefix}.{double[rest]}.{leaf}"] = value
        else:
            _, index, rest = stem.split(".", 2)
            prefix = f"single_transformer_blocks.{index}"
            if rest == "linear1":
                q, k, v, mlp = value.split((hidden, hidden, hidden, params.mlp_hidden))
                for name, part in (("attn.to_q", q), ("attn.to_k", k), ("attn.to_v", v), ("proj_mlp", mlp)):
                    out[f"{prefix}.{name}.{leaf}"] = part
            else:
                out[f"{prefix}.{single[rest]}.{leaf}"] = value
    return out


def random_pair(*, guidance: bool) -> tuple[Flux, torch.nn.Module]:
    """Our model and diffusers' with the same random weights, large enough that every layer matters."""
    from dataclasses import replace

    params = replace(PARAMS, guidance_embed=guidance)
    torch.manual_seed(0)
    ours = Flux(params)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) + 0.5
                if name.endswith("scale")
                else 0.15 * torch.randn_like(parameter)
            )
    theirs = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=24,
        guidance_embeds=guidance,
        axes_dims_rope=params.axes_dim,
    )
    theirs.load_state_dict(to_diffusers(ours.state_dict(), params), strict=True)
    return ours.eval(), theirs.eval()


def inputs(target: tuple[int, int], context: tuple[int, int] | None, *, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    img, ids = latents.pack(draw(batch, 16, *target)), latents.position_ids(*target)
    if context is not None:
        img = torch.cat((img, latents.pack(draw(batch, 16, *context))), dim=1)
        ids = torch.cat((ids, latents.position_ids(*context, index=1)))
    return {
        "img": img,
        "img_ids": ids,
        "txt": draw(batch, 7, 40),
        "txt_ids": latents.text_ids(7),
        "timesteps": torch.tensor([0.93, 0.21])[:batch],
        "y": draw(batch, 24),
    }


def run_theirs(model: torch.nn.Module, data: dict, guidance: torch.Tensor | None) -> torch.Tensor:
    return model(
        hidden_states=data["img"],
        encoder_hidden_states=data["txt"],
        pooled_projections=data["y"],
        timestep=data["timesteps"],
        img_ids=data["img_ids"],
        txt_ids=data["txt_ids"],
        guidance=guidance,
        return_dict=False,
    )[0]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("guidance", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize(
    ("target", "context"),
    [((8, 8), None), ((8, 8), (8, 8)), ((6, 10), (12, 4))],
    ids=["text", "edit", "unequal"],
)
@torch.no_grad()
def test_equals_diffusers_in_float32(target, context, guidance):
    ours, theirs = random_pair(guidance=guidance)
    data = inputs(target, context)
    scale = torch.tensor([2.5, 4.0]) if guidance else None
    result = ours(**data, guidance=scale)
    expected = run_theirs(theirs, data, scale)
    # float32 sums in another order through 5 blocks: a few hundred roundings of 6e-8
    assert relative(result, expected) < 2e-5


@torch.no_grad()
def test_bfloat16_is_as_near_to_diffusers_in_float32_as_roundings_allow():
    ours, theirs = (rounding.with_bfloat16_weights(model) for model in random_pair(guidance=True))
    data, scale = inputs((8, 8), (8, 8)), torch.tensor([2.5, 4.0])
    data |= {key: data[key].bfloat16().float() for key in ("img", "txt", "y")}
    bound, exact = rounding.bfloat16_bound([theirs], lambda: run_theirs(theirs, data, scale))
    half = {key: value.bfloat16() if key in ("img", "txt", "y") else value for key, value in data.items()}
    error = rounding.relative(ours.bfloat16()(**half, guidance=scale), exact)
    # 0.0096 of 0.028. diffusers itself is at 0.45: it rounds the time, of which ours is float32.
    assert bound / 4 < error < bound, (error, bound)  # a bound that anything meets would say nothing


@torch.no_grad()
def test_num_target_returns_the_target_tokens_alone():
    ours, _ = random_pair(guidance=True)
    data, scale = inputs((8, 8), (4, 4)), torch.tensor([2.5, 4.0])
    assert torch.equal(ours(**data, guidance=scale, num_target=16), ours(**data, guidance=scale)[:, :16])


@torch.no_grad()
def test_tables_for_a_whole_schedule_give_each_steps_output():
    ours, _ = random_pair(guidance=True)
    data, scale = inputs((8, 8), (4, 4), batch=1), torch.tensor([2.5])
    times = torch.tensor([1.0, 0.7, 0.2])
    tables = ours.modulation_tables(times, data["y"].expand(3, -1), scale.expand(3))
    prepared = ours.prepare(data["txt"], data["txt_ids"], data["img_ids"])
    assert isinstance(tables, ModulationTables)
    for step in range(3):
        plain = ours(**{**data, "timesteps": times[step : step + 1]}, guidance=scale)
        quick = ours(
            data["img"],
            None,
            None,
            None,
            None,
            None,
            prepared=prepared,
            modulation=tables.rows(step, step + 1),
        )
        # a matrix product of 3 rows may round differently from one of 1 row
        assert relative(quick, plain) < 1e-5


def test_a_missing_guidance_is_an_error_that_says_so():
    ours, _ = random_pair(guidance=True)
    with pytest.raises(ValueError, match="pass guidance"):
        ours(**inputs((4, 4), None))
