"""Kontext Preserve: the edit where it was meant, the original's own pixels everywhere else."""

from __future__ import annotations

from comfy_api.latest import io

from ..kontext_core.preserve import preserve
from . import host_compare, host_graph
from .schema import ADVANCED, CATEGORY, make_schema


class KontextPreserve(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextPreserve",
            display_name="Kontext Preserve",
            category=CATEGORY,
            description="Puts an edit back into its original inside a mask, its shift and tint undone. Every pixel "
            "outside the mask is the original's, bit for bit.",
            search_aliases=["inpaint composite", "masked edit", "keep untouched", "color match", "seam"],
            inputs=[
                io.Image.Input("original", tooltip="The picture before the edit; its transparency is kept."),
                io.Image.Input(
                    "edited",
                    tooltip="The picture after the edit, at the same size: from Kontext Edit or Kontext Restore.",
                ),
                io.Int.Input(
                    "feather",
                    default=8,
                    min=0,
                    max=256,
                    tooltip="Pixels inside the mask's edge over which the edit sets in.",
                ),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=0,
                    max=256,
                    tooltip="Pixels by which a mask that was found is widened. A connected mask is used as it is.",
                ),
                io.Float.Input(
                    "sensitivity",
                    default=1.0,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip="Of the search for what the edit changed, without a mask: 2 finds changes half as strong.",
                ),
                io.Boolean.Input(
                    "align",
                    default=True,
                    tooltip="Measures by what fraction of a pixel the edit has moved, and moves it back.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "match_color",
                    default=True,
                    tooltip="Measures the tint that the edit put on what it left alone, and takes it off.",
                    **ADVANCED,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the edit may show, at the original's size. Without one, what the edit "
                    "changed is found.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The original with the edit inside the mask."),
                io.Mask.Output(display_name="mask", tooltip="Where the image is not the original."),
                io.String.Output(
                    display_name="report", tooltip="Share edited, shift and tint, a line a picture."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, original, edited, feather, grow, sensitivity, align, match_color, mask=None
    ) -> io.NodeOutput:
        planes = [_planes(image, name) for image, name in ((original, "original"), (edited, "edited"))]
        if mask is not None and mask.dim() == 3 and len(mask) not in (1, len(edited)):
            raise ValueError(
                f"there are {len(mask)} masks for {len(edited)} pictures: connect one, or one each"
            )
        # In the host's own range and type, so that what is kept goes through no arithmetic.
        result = preserve(
            *planes,
            mask,
            feather=feather,
            grow=grow,
            sensitivity=sensitivity,
            align=align,
            match_color=match_color,
            bounds=(0.0, 1.0),
        )
        report = result.report()
        host_graph.tell(cls.hidden.unique_id, report.splitlines())
        image, mask = result.image.movedim(1, -1), result.mask[:, 0]
        return io.NodeOutput(image, mask, report, ui=host_compare.compare(original, image, mask))


def _planes(image, name: str):
    """IMAGE (B, H, W, C) as (B, 3 or 4, H, W), in its own range."""
    if image.dim() != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name} has shape {tuple(image.shape)}; an IMAGE is (B, H, W, C) with 1, 3 or 4 channels"
        )
    planes = image.movedim(-1, 1)
    return planes.expand(-1, 3, -1, -1) if planes.shape[1] == 1 else planes
