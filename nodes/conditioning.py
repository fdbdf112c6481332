"""Prompt and reference pictures as CONDITIONING, for our nodes and for the host's."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn import functional

from ..kontext_core import geometry, images, latents
from ..kontext_core.conditioning import CONVENTIONS
from . import host, host_graph, host_references
from .schema import ADVANCED, CATEGORY, KontextGeometry, make_schema

GUIDANCE_TOOLTIP = (
    "How closely the model follows the words: its own, embedded guidance, not CFG. 2.5 is usual for editing; "
    "leave the sampler's cfg at 1."
)
TEXT_LENGTH_TOOLTIP = (
    "Tokens that the T5 encoder is given, padding included: 0 takes the text encoders' own number (512 for FLUX.1 "
    "Kontext). 256 gives what ComfyUI's own text encode node gives."
)
FIT_TOOLTIP = (
    "How the picture meets the model's size. stretch: all of it, sides scaled each by itself (as the model was "
    "trained); crop: the middle, in proportion; pad: all of it, in proportion, with borders; keep: its own size "
    "to the nearest 16 pixels. All come back exactly through Kontext Restore."
)
PADDING_TOOLTIP = "What pad puts around the picture: mirror, or a colour such as #808080."
CONVENTION_TOOLTIP = (
    "Where several references are placed. offset: side by side, ComfyUI's default; index: one behind the other, "
    "the paper's; uxo: on a diagonal. With one reference offset and index are the same."
)
SIZE_TOOLTIP = "{} in pixels, a multiple of 16. 0 for both takes the model's preferred size nearest in shape."


def fit_inputs() -> list[io.Input]:
    """The widgets that say how a picture meets the model; the same in every node that fits one."""
    return [
        io.Combo.Input("fit", options=list(geometry.POLICIES), default="stretch", tooltip=FIT_TOOLTIP),
        io.String.Input("padding", default="mirror", tooltip=PADDING_TOOLTIP, **ADVANCED),
        io.Combo.Input(
            "convention", options=list(CONVENTIONS), default="offset", tooltip=CONVENTION_TOOLTIP, **ADVANCED
        ),
        io.Int.Input("width", default=0, min=0, max=16384, step=16, tooltip=SIZE_TOOLTIP.format("Width")),
        io.Int.Input("height", default=0, min=0, max=16384, step=16, tooltip=SIZE_TOOLTIP.format("Height")),
    ]


class KontextPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextPrompt",
            display_name="Kontext Prompt",
            category=CATEGORY,
            description="Encodes an instruction word by word as written, brackets and all, and sets the guidance.",
            search_aliases=["clip text encode flux", "instruction", "flux guidance"],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="Text encoders, from Kontext Load Text Encoders or ComfyUI's own loaders."
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to change: “Change the car to red, keep everything else the same”.",
                ),
                io.Float.Input(
                    "guidance", default=2.5, min=0.0, max=100.0, step=0.1, tooltip=GUIDANCE_TOOLTIP
                ),
                io.Int.Input(
                    "text_length", default=0, min=0, max=512, tooltip=TEXT_LENGTH_TOOLTIP, **ADVANCED
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="The prompt with its guidance.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, text, guidance, text_length) -> io.NodeOutput:
        conditioning, warnings = host_graph.encode_prompt(clip, text, text_length)
        host_graph.tell(cls.hidden.unique_id, warnings)
        result = host_graph.with_values(conditioning, {"guidance": guidance})
        return io.NodeOutput(result, ui=ui.PreviewText("\n".join(warnings)) if warnings else None)


class KontextReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextReference",
            display_name="Kontext Reference",
            category=CATEGORY,
            description="Adds a picture to edit or to take from to the conditioning. Chain them for several pictures.",
            search_aliases=["reference latent", "flux kontext image scale", "image edit"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning", tooltip="From Kontext Prompt, or from another Kontext Reference."
                ),
                io.Vae.Input("vae", tooltip="Encodes the picture."),
                io.Image.Input(
                    "image", tooltip="The picture; a batch gives each picture of the sampled batch its own."
                ),
                *fit_inputs(),
                io.Float.Input(
                    "strength",
                    optional=True,
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Factor on the attention that the picture gets: 1 as trained, less for a hint of it, 0 for "
                    "none.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "start",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the steps after which the picture is seen: 0 from the first, 0.5 from half on.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "end",
                    optional=True,
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the steps after which it is seen no more: 1 to the last.",
                    **ADVANCED,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the picture is seen, at the picture's own size: the rest of it is ignored.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="With this picture as its last reference."
                ),
                io.Latent.Output(
                    display_name="latent", tooltip="The encoded picture: what to sample at the same size."
                ),
                KontextGeometry.Output(
                    display_name="geometry", tooltip="How the picture was fitted, for Kontext Restore."
                ),
                io.Image.Output(display_name="fitted", tooltip="The picture as the model sees it."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, conditioning, vae, image, fit, padding, convention, width, height, strength=1.0, start=0.0, end=1.0,
        mask=None,
    ) -> io.NodeOutput:  # fmt: skip
        picture, _ = images.from_comfy(image)
        plan = plan_fit(picture.shape, fit, padding, width, height, host.preferred_area(vae))
        fitted = images.to_comfy(geometry.apply(plan, picture))
        settings = host_references.ReferenceSettings(
            convention=convention,
            strength=strength,
            mask=None if mask is None else token_mask(mask, plan, picture.shape),
            start=start,
            end=end,
        )
        latent = host_graph.encode(vae, fitted)
        seen = host_references.with_settings(
            host_graph.with_reference(conditioning, latent, convention), settings
        )
        counts = [tokens_of(*reference.shape[-2:]) for reference in seen[0][1]["reference_latents"]]
        total = f"{' + '.join(map(str, counts))} reference tokens"
        host_graph.tell(cls.hidden.unique_id, [plan.report(), total])
        return io.NodeOutput(seen, {"samples": latent}, plan, fitted)


def tokens_of(rows: int, columns: int) -> int:
    """Tokens of a latent of so many cells; the model fills up an odd number of them."""
    return -(-rows // latents.PATCH) * -(-columns // latents.PATCH)


def token_mask(mask: Tensor, plan: geometry.Geometry, shape: tuple[int, ...]) -> Tensor:
    """MASK (H, W) or (B, H, W) of a picture, fitted as the picture is, as (B, tokens) in 0..1. Borders are not seen.

    Raises:
        ValueError: the mask is of another size, or there is nothing white in it.
    """
    mask = mask[None] if mask.dim() == 2 else mask
    if mask.shape[-2:] != shape[-2:] or len(mask) not in (1, shape[0]):
        raise ValueError(
            f"the mask is {mask.shape[-1]}×{mask.shape[-2]} ({len(mask)}) and the picture {shape[-1]}×{shape[-2]} "
            f"({shape[0]}): connect a mask of the picture's own size"
        )
    planes = (mask.float() * 2 - 1)[:, None].expand(-1, 3, -1, -1)
    fitted = geometry.apply(replace(plan, pad_color=(0, 0, 0) if plan.policy == "pad" else None), planes)
    seen = functional.avg_pool2d((fitted[:, :1] + 1) / 2, geometry.MULTIPLE).clamp(0, 1).flatten(1)
    if not (seen > 0).any(1).all():
        raise ValueError(
            "the mask is black: nothing of the picture would be seen. Set strength to 0 to leave it out"
        )
    return seen


def plan_fit(shape, fit: str, padding: str, width: int, height: int, area: int) -> geometry.Geometry:
    """How a picture (B, C, H, W) meets the size that the widgets ask for.

    Raises:
        ValueError: only one of width and height is given, a size that is no multiple of 16, or no such colour.
    """
    return geometry.fit(
        (shape[-1], shape[-2]),
        fit,
        asked_size(width, height) or "auto",
        max_area=area,
        pad_color=geometry.parse_padding(padding),
    )


def asked_size(width: int, height: int) -> tuple[int, int] | None:
    """(width, height) of the widgets; None when both are 0."""
    if bool(width) != bool(height):
        raise ValueError(
            f"width is {width} and height {height}: give both, or 0 for both to have them chosen"
        )
    return (width, height) if width else None
