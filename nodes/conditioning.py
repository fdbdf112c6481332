"""Prompt and reference pictures as CONDITIONING, for our nodes and for the host's."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..kontext_core import geometry, images
from ..kontext_core.conditioning import CONVENTIONS
from . import host, host_graph
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
    def execute(cls, conditioning, vae, image, fit, padding, convention, width, height) -> io.NodeOutput:
        picture, _ = images.from_comfy(image)
        plan = plan_fit(picture.shape, fit, padding, width, height, host.preferred_area(vae))
        fitted = images.to_comfy(geometry.apply(plan, picture))
        latent = host_graph.encode(vae, fitted)
        host_graph.tell(cls.hidden.unique_id, [plan.report()])
        return io.NodeOutput(
            host_graph.with_reference(conditioning, latent, convention), {"samples": latent}, plan, fitted
        )


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
        pad_color=parse_padding(padding),
    )


def asked_size(width: int, height: int) -> tuple[int, int] | None:
    """(width, height) of the widgets; None when both are 0."""
    if bool(width) != bool(height):
        raise ValueError(
            f"width is {width} and height {height}: give both, or 0 for both to have them chosen"
        )
    return (width, height) if width else None


def parse_padding(padding: str) -> tuple[int, int, int] | None:
    """#rrggbb as numbers; None for mirror."""
    text = padding.strip().lower()
    if text in ("", "mirror"):
        return None
    digits = text.removeprefix("#")
    if len(digits) != 6 or any(digit not in "0123456789abcdef" for digit in digits):
        raise ValueError(f"padding is {padding!r}; use mirror, or a colour such as #808080")
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))
