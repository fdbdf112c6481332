"""The core's transformer inside ComfyUI's `model_base.Flux`, with every patch point that its own FLUX has.

Other packs reach into a model in known places: DIFFUSION_MODEL wrappers, `patches_replace["dit"]`,
`post_input`, control residuals, `rope_options`, attention overrides and attention patches. They work on this
model as on a native one because `forward` below calls them in the same order with the same arguments. Weights
keep the published names, so LoRAs, weight patches and offloading find them.

Source: Comfy-Org/ComfyUI comfy/ldm/flux/model.py (0.3.75 and 0.33), comfy/model_base.py `Flux`.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import comfy.cli_args
import comfy.ldm.common_dit
import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.ops
import comfy.patcher_extension
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kontext_core import latents
from ..kontext_core.conditioning import place_references
from ..kontext_core.models.attention import Attention
from ..kontext_core.models.backends import choose_attention
from ..kontext_core.models.rope import Rope
from ..kontext_core.models.tiled import Scratch, is_plain
from ..kontext_core.models.transformer import Flux, ModulationTables, TransformerParams, timestep_embedding
from .host_steps import StepCache, planned_step

ZERO_TIME = "index_timestep_zero"  # references modulated as clean pictures (t = 0); placed as "index"


def unet_config(params: TransformerParams) -> dict[str, Any]:
    """What the host keeps of a model's sizes; channels are counted before the 2×2 patches."""
    patch = latents.PATCH**2
    return {
        "image_model": "flux",
        "in_channels": params.in_channels // patch,
        "out_channels": params.out_channels // patch,
        "patch_size": latents.PATCH,
        "vec_in_dim": params.vec_in_dim,
        "context_in_dim": params.context_in_dim,
        "hidden_size": params.hidden_size,
        "mlp_ratio": params.mlp_ratio,
        "num_heads": params.num_heads,
        "depth": params.depth,
        "depth_single_blocks": params.depth_single_blocks,
        "axes_dim": list(params.axes_dim),
        "theta": params.theta,
        "qkv_bias": params.qkv_bias,
        "guidance_embed": params.guidance_embed,
    }


def _calls_attention_patches() -> bool:
    """Whether this host's own FLUX calls attn1_patch; an older one ignores it, and so do we then."""
    try:
        return "attn1_patch" in inspect.getsource(comfy.ldm.flux.layers.DoubleStreamBlock.forward)
    except OSError:  # a host without its sources
        return False


ATTENTION_PATCHES = _calls_attention_patches()


def _host_attention_is_last_resort() -> bool:
    """Whether the host attends by parts only because nobody chose: on a CPU it does, though PyTorch's is faster."""
    chosen = comfy.ldm.flux.math.optimized_attention
    args = comfy.cli_args.args
    asked = args.use_split_cross_attention or args.use_quad_cross_attention
    return not asked and chosen is comfy.ldm.modules.attention.attention_sub_quad


LAST_RESORT = _host_attention_is_last_resort()


def _is_plain(layer: nn.Module, x: Tensor) -> bool:
    """As `tiled.is_plain`, and for the host's layers while they have nothing to cast, to bring or to patch."""
    plain = comfy.ops.disable_weight_init.Linear
    if type(layer).forward is not plain.forward:
        return is_plain(layer, x)
    asked = ("comfy_cast_weights", "comfy_force_cast_weights", "weight_function", "bias_function", "_v")
    if any(getattr(layer, name, None) for name in asked):
        return False
    same = layer.bias is not None and layer.weight.dtype == layer.bias.dtype == x.dtype
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return same and layer.weight.device == x.device and not hooks


class _Call(NamedTuple):
    """What the blocks of one call share.

    Attributes:
        vec, pe: what patches are given; a block that gets these very tensors back may use `tables` and `rope`.
        pe: in the host's form; None while no patch is there to read it.
        segments: for references told t = 0.
        attend: in place of the host's attention, while no patch overrides that one.
    """

    vec: Tensor
    tables: ModulationTables | None
    pe: Tensor | None
    rope: Rope
    segments: _Segments | None
    scratch: Scratch
    attend: Attention | None


class HostTransformer(Flux):
    """`kontext_core`'s Flux as the host builds and calls it.

    Args:
        image_model: what `unet_config` gives, and further keys the host may add; only the sizes are used.
        operations: the host's layers.
    """

    def __init__(self, image_model=None, patch_size=2, dtype=None, device=None, operations=None, **sizes):
        patch = patch_size * patch_size
        sizes["in_channels"] *= patch
        sizes["out_channels"] *= patch
        sizes["axes_dim"] = tuple(sizes["axes_dim"])
        known = TransformerParams.__dataclass_fields__
        params = TransformerParams(**{key: value for key, value in sizes.items() if key in known})
        super().__init__(params, operations=operations, dtype=dtype, device=device)
        # Read by the host and by other packs.
        self.dtype = dtype
        self.patch_size = patch_size
        self.in_channels, self.out_channels = params.in_channels, params.out_channels
        self.hidden_size, self.num_heads = params.hidden_size, params.num_heads
        self.pe_embedder = comfy.ldm.flux.layers.EmbedND(
            dim=params.hidden_size // params.num_heads, theta=params.theta, axes_dim=list(params.axes_dim)
        )
        self.steps = StepCache()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: list[Tensor] | None = None,
        control: dict | None = None,
        transformer_options: dict | None = None,
        **kwargs,
    ) -> Tensor:
        """Velocity (B, C, h, w) at x (B, C, h, w), through the DIFFUSION_MODEL wrappers."""
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)

    def _forward(
        self,
        x,
        timestep,
        context,
        y=None,
        guidance=None,
        ref_latents=None,
        control=None,
        transformer_options=None,
        **kwargs,
    ) -> Tensor:
        self._check(x, context, y)
        options = dict(transformer_options or {})
        height, width = x.shape[-2:]
        target = self._pad(x)
        rows, columns = target.shape[-2:]
        method = kwargs.get("ref_latents_method", "offset")
        references = [self._pad(reference) for reference in ref_latents or ()]
        convention = "index" if method == ZERO_TIME else method if method in ("index", "uxo") else "offset"
        ids = [latents.position_ids(rows, columns)]
        ids += place_references([tuple(r.shape[-2:]) for r in references], (rows, columns), convention)
        ids = torch.cat([_apply_rope_options(part, options.get("rope_options")) for part in ids]).to(x.device)
        tokens = [latents.pack(part) for part in (target, *references)]
        num_target = tokens[0].shape[1]
        if references:
            options["reference_image_num_tokens"] = [part.shape[1] for part in tokens[1:]]
        sampling = self.steps.sampling(options)
        embedded = [self.img_in(tokens[0])]
        if references:
            given = torch.cat(tokens[1:], dim=1)
            embed = partial(self.img_in, given)
            embedded.append(embed() if sampling is None else sampling.references.get((given,), embed))
        text = partial(self.txt_in, context)
        out = self._blocks(
            sampling,
            torch.cat(embedded, dim=1),
            ids.expand(len(x), -1, -1),
            text() if sampling is None else sampling.texts.get((context,), text),
            timestep,
            y,
            guidance,
            control,
            options,
            kwargs.get("attention_mask"),
            num_target=num_target,
            zero_time=method == ZERO_TIME and bool(references),
        )
        return latents.unpack(out, rows, columns)[..., :height, :width]

    def _check(self, x: Tensor, context: Tensor, y: Tensor | None) -> None:
        params = self.params
        if context.shape[-1] != params.context_in_dim:
            raise ValueError(
                f"these text encoders give {context.shape[-1]} numbers a token and this model takes "
                f"{params.context_in_dim}: load the text encoders that belong to the model"
            )
        if y is not None and y.shape[-1] < params.vec_in_dim:
            raise ValueError(
                f"this CLIP gives a pooled vector of {y.shape[-1]} numbers and the model takes "
                f"{params.vec_in_dim}: load the text encoders that belong to the model"
            )
        if x.ndim != 4:
            raise ValueError(f"a latent of shape {tuple(x.shape)} is not a picture's (B, C, h, w)")

    def _pad(self, latent: Tensor) -> Tensor:
        return comfy.ldm.common_dit.pad_to_patch_size(latent, (self.patch_size, self.patch_size))

    def _vector(self, timestep: Tensor, y: Tensor | None, guidance: Tensor | None, dtype) -> Tensor:
        """The modulation vector. Without guidance none is added: the host has a node that asks for that."""
        vec = self.time_in(timestep_embedding(timestep, 256).to(dtype))
        repeats = len(timestep) // len(y) if y is not None else 1
        if self.params.guidance_embed and guidance is not None:
            embedded = timestep_embedding(guidance, 256).to(dtype)
            vec = vec + self.guidance_in(embedded.repeat(len(vec) // len(embedded), 1))
        if y is None:
            y = vec.new_zeros(len(vec), self.params.vec_in_dim)
        return vec + self.vector_in(y[:, : self.params.vec_in_dim].repeat(repeats, 1).to(dtype))

    def _blocks(
        self,
        sampling,
        img,
        img_ids,
        txt,
        timestep,
        y,
        guidance,
        control,
        options,
        mask,
        *,
        num_target,
        zero_time,
    ) -> Tensor:
        """img (B, N+M, hidden) and txt (B, L, hidden) embedded -> velocity tokens (B, N, out_channels)."""
        patches = options.get("patches", {})
        replace = options.get("patches_replace", {}).get("dit", {})
        batch = len(img)
        vector = partial(self._vector, y=y, guidance=guidance, dtype=img.dtype)
        if zero_time:
            vec, tables = vector(torch.cat((timestep, timestep * 0))), None
        else:
            vec, tables = planned_step(self, sampling, timestep, img.dtype, (y, guidance), vector)
        txt_ids = img_ids.new_zeros(batch, txt.shape[1], 3)
        for patch in patches.get("post_input", ()):
            out = patch(
                {
                    "img": img,
                    "txt": txt,
                    "img_ids": img_ids,
                    "txt_ids": txt_ids,
                    "transformer_options": options,
                }
            )
            img, txt, img_ids, txt_ids = out["img"], out["txt"], out["img_ids"], out["txt_ids"]
        ids = torch.cat((txt_ids, img_ids), dim=1)
        seen = bool(replace) or (ATTENTION_PATCHES and bool(patches.get("attn1_patch")))
        num_text = txt.shape[1]
        call = _Call(
            vec=vec,
            tables=tables,
            pe=self.pe_embedder(ids) if seen else None,
            rope=self.steps.rope(self, ids),
            segments=_Segments(batch, num_text, num_target, img.shape[1] - num_target) if zero_time else None,
            scratch=Scratch(_is_plain),
            attend=self._attention_here(img, ids.shape[1]),
        )

        options.update(total_blocks=len(self.double_blocks), block_type="double")
        for index in range(len(self.double_blocks)):
            options["block_index"] = index
            arguments = {
                "img": img,
                "txt": txt,
                "vec": vec,
                "pe": call.pe,
                "attn_mask": mask,
                "transformer_options": options,
            }
            run = partial(self._double, index, call)
            if ("double_block", index) in replace:
                out = replace["double_block", index](arguments, {"original_block": run})
            else:
                out = run(arguments)
            img, txt = out["img"], out["txt"]
            img = _add_control(img, control, "input", index, 0)
        if img.dtype == torch.float16:
            img = torch.nan_to_num(img, nan=0.0, posinf=65504, neginf=-65504)

        x = torch.cat((txt, img), dim=1)
        options.update(total_blocks=len(self.single_blocks), block_type="single")
        options["img_slice"] = [num_text, x.shape[1]]
        for index in range(len(self.single_blocks)):
            options["block_index"] = index
            arguments = {
                "img": x,
                "vec": vec,
                "pe": call.pe,
                "attn_mask": mask,
                "transformer_options": options,
            }
            run = partial(self._single, index, call)
            if ("single_block", index) in replace:
                x = replace["single_block", index](arguments, {"original_block": run})["img"]
            else:
                x = run(arguments)["img"]
            x = _add_control(x, control, "output", index, num_text)
        if tables is None:
            modulation = self.final_layer.adaLN_modulation[1](F.silu(vec[:batch]))
        else:
            modulation = tables.final
        return self.final_layer(x[:, num_text : num_text + num_target], modulation)

    def _attention_here(self, img: Tensor, num_tokens: int) -> Attention | None:
        """On a CPU what the core measures as the fastest, unless the host was told to attend by parts."""
        pytorch = comfy.ldm.flux.math.optimized_attention is comfy.ldm.modules.attention.attention_pytorch
        if img.device.type != "cpu" or not (LAST_RESORT or pytorch):
            return None
        head_dim = self.hidden_size // self.num_heads
        return choose_attention("auto", img.device, img.dtype, head_dim=head_dim, num_tokens=num_tokens)

    def _double(self, index: int, call: _Call, arguments: dict) -> dict:
        """A double-stream block on what a patch hands to `original_block`."""
        block = self.double_blocks[index]
        if call.tables is not None and arguments["vec"] is call.vec:
            img_mod, txt_mod = call.tables.double[index]
        else:
            silu = F.silu(arguments["vec"])
            img_mod, txt_mod = block.img_mod(silu), block.txt_mod(silu)
        if call.segments is not None:
            img_mod, txt_mod = call.segments.image(img_mod), call.segments.text(txt_mod)
        img, txt = arguments["img"], arguments["txt"]
        rope, attend = self._rope_and_attention(call, arguments, txt.shape[1])
        mask = arguments.get("attn_mask")
        img, txt = block(img, txt, img_mod, txt_mod, rope, attend, mask, call.scratch)
        if txt.dtype == torch.float16:
            txt = torch.nan_to_num(txt, nan=0.0, posinf=65504, neginf=-65504)
        return {"img": img, "txt": txt}

    def _single(self, index: int, call: _Call, arguments: dict) -> dict:
        block = self.single_blocks[index]
        if call.tables is not None and arguments["vec"] is call.vec:
            mod = call.tables.single[index]
        else:
            mod = block.modulation(F.silu(arguments["vec"]))
        if call.segments is not None:
            mod = call.segments.joined(mod)
        num_text = arguments["transformer_options"]["img_slice"][0]
        rope, attend = self._rope_and_attention(call, arguments, num_text)
        x = block(arguments["img"], mod, rope, attend, arguments.get("attn_mask"), call.scratch)
        if x.dtype == torch.float16:
            x = torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504)
        return {"img": x}

    def _rope_and_attention(self, call: _Call, arguments: dict, num_text: int):
        """(tables for the block, its attention): ours, unless a patch wants to see or has changed what is turned."""
        options = arguments["transformer_options"]
        patches = options.get("patches", {})
        watched = ATTENTION_PATCHES and (patches.get("attn1_patch") or patches.get("attn1_output_patch"))
        if watched or arguments["pe"] is not call.pe:
            return None, partial(self._attend, arguments, num_text)
        if call.attend is not None and "optimized_attention_override" not in options:
            return call.rope, call.attend
        return call.rope, partial(_host_attention, options)

    def _attend(self, arguments: dict, num_text: int, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        """The host's rotation and attention, with its overrides and other packs' attention patches."""
        options = arguments["transformer_options"]
        pe, patches = arguments["pe"], options.get("patches", {}) if ATTENTION_PATCHES else {}
        extra = {**options, "img_slice": [num_text, q.shape[2]]}
        for patch in patches.get("attn1_patch", ()):
            out = patch(q, k, v, pe=pe, attn_mask=mask, extra_options=extra)
            q, k, v = out.get("q", q), out.get("k", k), out.get("v", v)
            pe, mask = out.get("pe", pe), out.get("attn_mask", mask)
        out = comfy.ldm.flux.math.attention(q, k, v, pe=pe, mask=mask, transformer_options=options)
        for patch in patches.get("attn1_output_patch", ()):
            out = patch(out, extra)
        return out


def _host_attention(options: dict, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The attention that the host chose, on turned queries and keys."""
    return comfy.ldm.flux.math.attention(q, k, v, pe=None, mask=mask, transformer_options=options)


class _Segments:
    """Modulation by token when references are told t = 0: rows 0..B-1 are for t, rows B..2B-1 for t = 0."""

    def __init__(self, batch: int, num_text: int, num_target: int, num_context: int):
        self.batch, self.num_text = batch, num_text
        self.num_target, self.num_context = num_target, num_context

    def _spread(self, mod: Tensor, num_first: int) -> Tensor:
        now, clean = mod[: self.batch, None], mod[self.batch :, None]
        return torch.cat((now.expand(-1, num_first, -1), clean.expand(-1, self.num_context, -1)), dim=1)

    def image(self, mod: Tensor) -> Tensor:
        return self._spread(mod, self.num_target)

    def text(self, mod: Tensor) -> Tensor:
        return mod[: self.batch]

    def joined(self, mod: Tensor) -> Tensor:
        return self._spread(mod, self.num_text + self.num_target)


def _add_control(x: Tensor, control: dict | None, side: str, index: int, start: int) -> Tensor:
    """A ControlNet's residual for one block, on the image tokens from `start` on."""
    residuals = () if control is None else control.get(side, ())
    if index >= len(residuals) or residuals[index] is None:
        return x
    add = residuals[index]
    x = x.clone()
    x[:, start : start + add.shape[1]] += add
    return x


def _apply_rope_options(ids: Tensor, options: dict | None) -> Tensor:
    """Scale ids (N, 3) about their first position and shift them, as the host's RoPE node asks."""
    if options is None:
        return ids
    scale = torch.tensor([1.0, options.get("scale_y", 1.0), options.get("scale_x", 1.0)])
    shift = torch.tensor([options.get(f"shift_{axis}", 0.0) for axis in "tyx"])
    return ids[0] + (ids - ids[0]) * scale + shift
