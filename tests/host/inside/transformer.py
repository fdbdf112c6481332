"""Our transformer and the host's own with the same random weights, called as the host's model_base calls them."""

from __future__ import annotations

from functools import partial

import pack
import torch

pack.load_pack()
import comfy.ldm.flux.math  # noqa: E402
import comfy.ldm.modules.attention as attention_modules  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy.ldm.flux.model import Flux as NativeFlux  # noqa: E402
from comfy.ldm.flux.model import FluxParams  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from custom_nodes_kontext.kontext_core.models.attention import attention as plain_attention  # noqa: E402
from custom_nodes_kontext.kontext_core.models.transformer import TransformerParams  # noqa: E402
from custom_nodes_kontext.nodes import host_model  # noqa: E402

PARAMS = TransformerParams(
    vec_in_dim=24, context_in_dim=40, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(8, 12, 12)
)  # fmt: skip


def build():
    """(ours, native) with equal weights."""
    config = host_model.unet_config(PARAMS)
    config.pop("image_model")
    torch.manual_seed(0)
    ours = host_model.HostTransformer(**config, operations=comfy.ops.disable_weight_init, dtype=torch.float32)
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    native = NativeFlux(**config, **newer, operations=comfy.ops.disable_weight_init, dtype=torch.float32)
    weights = {key: torch.randn(value.shape) * 0.1 for key, value in ours.state_dict().items()}
    ours.load_state_dict(weights)
    renamed = "double_blocks.0.img_attn.norm.query_norm.weight" in native.state_dict()
    if renamed:
        weights = {key.replace("_norm.scale", "_norm.weight"): value for key, value in weights.items()}
    native.load_state_dict(weights)
    return ours.eval(), native.eval()


OURS, NATIVE = build()


def inputs(batch: int = 1, rows: int = 6, columns: int = 8, references: tuple = ()) -> dict:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "x": draw(batch, 16, rows, columns),
        "timestep": torch.full((batch,), 0.7),
        "context": draw(batch, 5, 40),
        "y": draw(batch, 24),
        "guidance": torch.full((batch,), 2.5),
        "ref_latents": [draw(batch, 16, *size) for size in references] or None,
    }


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def compare(options=None, **changes) -> float:
    """Largest relative difference of a forward with these inputs; `options` makes transformer_options anew."""
    with torch.inference_mode():
        results = []
        for model in (OURS, NATIVE):
            arguments = inputs(
                **{k: changes[k] for k in ("batch", "rows", "columns", "references") if k in changes}
            )
            arguments.update(
                {k: v for k, v in changes.items() if k not in ("batch", "rows", "columns", "references")}
            )
            results.append(model(**arguments, transformer_options=options() if options else {}))
    return difference(*results)


def calls(name: str, options) -> dict:
    """What a patch saw from each model: how often it was called and with which keys."""
    seen = {}
    for label, model in (("ours", OURS), ("native", NATIVE)):
        log = []
        with torch.inference_mode():
            model(**inputs(references=((4, 4),)), transformer_options=options(log))
        seen[label] = log
    return {name: seen}


def replace_option(log=None):
    """A patches_replace patch on a block of each kind that changes what the block gets and gives."""

    def patch(arguments, extra):
        if log is not None:
            log.append(sorted(arguments))
        out = extra["original_block"](
            {**arguments, "img": arguments["img"] * 1.1, "vec": arguments["vec"] + 0.1}
        )
        return {**out, "img": out["img"] - 0.05}

    return {"patches_replace": {"dit": {("double_block", 1): patch, ("single_block", 0): patch}}}


def post_input_option(log=None):
    def patch(arguments):
        if log is not None:
            log.append(sorted(set(arguments) & {"img", "txt", "img_ids", "txt_ids"}))
        return {**arguments, "img": arguments["img"] * 1.2, "img_ids": arguments["img_ids"] + 1}

    return {"patches": {"post_input": [patch]}}


def wrapper_option(log=None):
    def wrapper(
        executor, x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs
    ):
        if log is not None:
            log.append([executor.class_obj.__class__.__mro__[-2].__name__, len(ref_latents or [])])
        return executor(
            x * 0.9, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs
        )

    return {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"test": [wrapper]}}}


def override_option(log=None):
    def override(function, q, k, v, heads, *args, **kwargs):
        if log is not None:
            options = kwargs["transformer_options"]
            log.append(
                [options["block_type"], options["block_index"], options["total_blocks"], heads, list(q.shape)]
            )
        return function(q, k, v * 1.1, heads, *args, **kwargs)

    return {"optimized_attention_override": override}


def attention_patch_option(log=None):
    """attn1_patch and attn1_output_patch, which hosts call since 2026; older ones ignore them."""

    def patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
        if log is not None:
            log.append(["patch", list(q.shape), extra_options["block_type"], extra_options["img_slice"]])
        return {"q": q * 1.1, "k": k, "v": v}

    def output(out, extra_options):
        if log is not None:
            log.append(["output", list(out.shape), extra_options["block_index"]])
        return out * 0.9

    return {"patches": {"attn1_patch": [patch], "attn1_output_patch": [output]}}


def control() -> dict:
    generator = torch.Generator().manual_seed(3)
    residual = lambda: torch.randn(1, 12, 64, generator=generator)  # noqa: E731
    return {"input": [residual(), None], "output": [None, residual()]}


def rope_option():
    return {"rope_options": {"scale_x": 1.5, "scale_y": 0.5, "shift_x": 2.0, "shift_y": 1.0, "shift_t": 0.5}}


def mask() -> torch.Tensor:
    tokens = 5 + 12
    keep = torch.ones(1, tokens, tokens)
    keep[..., 2:4] = 0
    return keep.log()


two = ((4, 4), (6, 2))
result = {
    "plain": compare(),
    "batch": compare(batch=2, references=two),
    "no_guidance": compare(guidance=None),
    "no_pooled": compare(y=None),
    "odd": compare(rows=5, columns=7),
    "mask": compare(attention_mask=mask()),
    "control": compare(control=control()),
    "rope_options": compare(rope_option),
    **{
        f"references_{method}": compare(references=two, ref_latents_method=method)
        for method in ("offset", "index", "uxo")
    },
    "replace": compare(replace_option, references=two),
    "post_input": compare(post_input_option, references=two),
    "wrapper": compare(wrapper_option, references=two),
    "override": compare(override_option, references=two),
    "attention_patches": compare(attention_patch_option, references=two),
    "attention_patches_called": host_model.ATTENTION_PATCHES,
    "calls": {
        **calls("replace", replace_option),
        **calls("post_input", post_input_option),
        **calls("wrapper", wrapper_option),
        **calls("override", override_option),
        **calls("attention_patches", attention_patch_option),
    },
}


def zero_time(t: float) -> float:
    """How far references told t = 0 move the result from references told t, both placed by index."""
    with torch.inference_mode():
        results = [
            OURS(**{**inputs(references=two), "timestep": torch.tensor([t])}, ref_latents_method=method)
            for method in (host_model.ZERO_TIME, "index")
        ]
    return difference(*results)


result["zero_time"] = {"at_0": zero_time(0.0), "at_1": zero_time(1.0)}
with torch.inference_mode():
    arguments = {**inputs(), "context": torch.randn(1, 5, 41)}
    try:
        OURS(**arguments)
        result["wrong_text"] = ""
    except ValueError as error:
        result["wrong_text"] = str(error)


def blocks_by_the_core(chosen, options=None) -> int:
    """How many blocks attend by the core's choice where the host has chosen this attention."""
    called = []

    def counted(q, k, v, mask=None):
        called.append(q.shape)
        return plain_attention(q, k, v, mask)

    kept = comfy.ldm.flux.math.optimized_attention, host_model.choose_attention
    comfy.ldm.flux.math.optimized_attention = chosen
    host_model.choose_attention = lambda name, *_, **__: {"auto": counted}[name]
    try:
        with torch.inference_mode():
            OURS(**inputs(), transformer_options=options or {})
    finally:
        comfy.ldm.flux.math.optimized_attention, host_model.choose_attention = kept
    return len(called)


by_parts = partial(attention_modules.attention_sub_quad)  # somebody's own choice, though it computes the same
result["by_the_core"] = {
    "pytorch": blocks_by_the_core(attention_modules.attention_pytorch),
    "overridden": blocks_by_the_core(attention_modules.attention_pytorch, override_option()),
    "other": 0 if host_model.LAST_RESORT else blocks_by_the_core(by_parts),
}
pack.answer(result)
