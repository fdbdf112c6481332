"""Kontext Guard: stops at the first NaN or black picture, and says where it began."""

from __future__ import annotations

from comfy_api.latest import io

from . import host_guard
from .schema import CATEGORY, make_schema


class KontextGuard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextGuard",
            display_name="Kontext Guard",
            category=CATEGORY,
            description="Stops at the first NaN or black picture instead of saving it, and says what to try. In a "
            "model the block and its dtype are named, for a picture the stage. Costs nothing while all is well.",
            search_aliases=["nan", "black image", "debug", "check"],
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="Watched while it samples: the first bad block is named."
                ),
                io.Latent.Input("latent", optional=True, tooltip="Checked for NaN and infinite values."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Checked for NaN and for black pictures. With its latent connected too it is known whether "
                    "the VAE's decode was at fault.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, watched."),
                io.Latent.Output(display_name="latent", tooltip="The latent, unchanged."),
                io.Image.Output(display_name="image", tooltip="The picture, unchanged."),
            ],
        )

    @classmethod
    def execute(cls, model=None, latent=None, image=None) -> io.NodeOutput:
        if model is None and latent is None and image is None:
            raise ValueError("nothing is connected: connect a model, a latent or an image to be guarded")
        if latent is not None:
            host_guard.check_latent(latent["samples"])
        if image is not None:
            host_guard.check_image(image, latent_is_finite=latent is not None)
        return io.NodeOutput(None if model is None else host_guard.guarded(model), latent, image)
