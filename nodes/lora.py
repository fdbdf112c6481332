"""Kontext Load LoRA: any FLUX LoRA format onto any FLUX model, with a report of what matched."""

from __future__ import annotations

from comfy_api.latest import io, ui

from . import host, host_graph, host_lora
from .schema import CATEGORY, make_schema


class KontextLoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextLoadLora",
            display_name="Kontext Load LoRA",
            category=CATEGORY,
            description="Puts a LoRA onto a FLUX model, ours or one that ComfyUI loaded: LoRA, LoHa, LoKr, DoRA and "
            "differences in every naming scheme. Says which layers matched, and stops when none did.",
            search_aliases=["lora loader", "lycoris", "dora", "turbo", "hyper"],
            inputs=[
                io.Model.Input("model", tooltip="From Kontext Load Model or ComfyUI's own loader."),
                io.Combo.Input(
                    "lora",
                    options=host_lora.list_loras(),
                    tooltip="A LoRA for FLUX.1 in models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How much of it goes onto the model; 0 for none, below 0 for its opposite.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How much of it goes onto the text encoders, where it has layers for them.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Text encoders, for a LoRA that changes them too; most change the model only.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA on it."),
                io.Clip.Output(
                    display_name="clip", tooltip="The text encoders with the LoRA on them, if connected."
                ),
                io.String.Output(
                    display_name="report", tooltip="The format, and which layers did not match and why."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model, lora, strength, strength_clip, clip=None):
        return host.fingerprint("loras", lora)

    @classmethod
    def execute(cls, model, lora, strength, strength_clip, clip=None) -> io.NodeOutput:
        path = host.find_file("loras", lora)
        model, clip, report = host_lora.add_lora(model, clip, path, strength, strength_clip)
        lines = str(report).splitlines()
        host_graph.tell(cls.hidden.unique_id, lines[:6])
        return io.NodeOutput(model, clip, str(report), ui=ui.PreviewText(str(report)))
