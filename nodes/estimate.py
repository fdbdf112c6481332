"""Kontext Estimate: tokens, memory and time of a sampling, before it runs."""

from __future__ import annotations

from comfy_api.latest import io, ui

from . import host_estimate, host_graph
from .schema import CATEGORY, make_schema


class KontextEstimate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextEstimate",
            display_name="Kontext Estimate",
            category=CATEGORY,
            description="Counts the tokens of a prompt with its references, and estimates the memory and the time that "
            "sampling with them takes. Samples nothing.",
            search_aliases=["token count", "vram estimate", "memory", "how long"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will sample; ours or one that ComfyUI loaded."
                ),
                io.Conditioning.Input("conditioning", tooltip="The prompt with all its references."),
                io.Latent.Input("latent", tooltip="The latent that will be sampled."),
                io.Int.Input(
                    "steps", default=28, min=1, max=1000, tooltip="Number of steps to count the time for."
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="Tokens, memory and time, a line each."),
                io.Int.Output(display_name="tokens", tooltip="All tokens: target, references and text."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, conditioning, latent, steps) -> io.NodeOutput:
        found = host_estimate.estimate(model, conditioning, latent["samples"], steps)
        report = found.report()
        host_graph.tell(cls.hidden.unique_id, report.splitlines())
        return io.NodeOutput(report, found.tokens, ui=ui.PreviewText(report))
