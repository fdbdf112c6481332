"""The way back: a result at the size and framing its picture came in."""

from __future__ import annotations

from comfy_api.latest import io

from ..kontext_core import geometry as core
from ..kontext_core import images
from .schema import CATEGORY, KontextGeometry, make_schema


class KontextRestore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextRestore",
            display_name="Kontext Restore",
            category=CATEGORY,
            description="Brings an edit back to the size and framing of its original, with no shift and no zoom.",
            search_aliases=["uncrop", "original size", "paste back"],
            inputs=[
                io.Image.Input("image", tooltip="The decoded result, at the size that was sampled."),
                KontextGeometry.Input(
                    "geometry", tooltip="From the Kontext Reference that fitted the original."
                ),
                io.Image.Input(
                    "original",
                    optional=True,
                    tooltip="The original picture: fills what crop cut off, and gives back its transparency.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="At the original's size and framing.")],
        )

    @classmethod
    def execute(cls, image, geometry, original=None) -> io.NodeOutput:
        result, _ = images.from_comfy(image)
        return io.NodeOutput(restore(result, geometry, original))


def restore(result, geometry: core.Geometry, original):
    """IMAGE of a result (B, 3, H', W') in [-1, 1] at the original's size, with the original's alpha if it has one."""
    source = alpha = None
    if original is not None:
        source, alpha = images.from_comfy(original)
        if len(source) not in (1, len(result)):
            raise ValueError(
                f"the batch of originals has {len(source)} pictures and the result {len(result)}: "
                "connect one original, or as many as there are results"
            )
    return images.to_comfy(core.invert(geometry, result, source), alpha)
