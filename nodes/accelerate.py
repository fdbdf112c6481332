"""Kontext Accelerate: ways to skip work between steps, each off unless asked for."""

from __future__ import annotations

from comfy_api.latest import io

from ..kontext_core.accelerate import Accelerate
from . import host_accelerate, host_compile, host_graph
from .schema import ADVANCED, CATEGORY, make_schema


class KontextAccelerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="KontextAccelerate",
            display_name="Kontext Accelerate",
            category=CATEGORY,
            description="Skips work between steps, at some cost in exactness that each setting names. As they stand "
            "nothing is skipped. Works on our models and on FLUX models that ComfyUI loaded; says after sampling what "
            "was saved.",
            search_aliases=["speed", "faster", "cache", "teacache", "first block cache", "wavespeed"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A FLUX.1 Kontext model, ours or one that ComfyUI loaded, LoRAs and all."
                ),
                io.Int.Input(
                    "reuse_context",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Computes the references' tokens in every n-th step only, and uses what they gave in "
                    "between. 1: in each step, exact. 4 saves about a third of an edit's time. Keeps keys and values: "
                    "about 3 GB for a reference of one megapixel in bfloat16.",
                ),
                io.Float.Input(
                    "skip_regions",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Between those steps, leaves out the parts of the picture that the edit does not touch: "
                    "where what is predicted is this near to the first reference. 0: nothing is left out; 0.3 is "
                    "careful. Needs reuse_context of 2 or more, and a picture of the reference's size.",
                ),
                io.Float.Input(
                    "first_block",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Skips all blocks but the first where the first one's change is within this part of the "
                    "last computed step's. 0: never; 0.05 is careful, 0.1 saves more.",
                ),
                io.Int.Input(
                    "warmup",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="Steps at the start that are computed in full: they decide the layout.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    tooltip="Compiles the blocks with torch.compile at the first sampling, which takes from seconds to "
                    "minutes, and keeps them for every size, prompt and LoRA after it. Pays for large pictures; needs "
                    "a compiler on this machine.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, accelerated, for any sampler.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, reuse_context, skip_regions, first_block, warmup, compile=False) -> io.NodeOutput:
        if skip_regions > 0 and reuse_context == 1:
            raise ValueError(
                "skip_regions leaves tokens out between the steps that reuse_context counts: set reuse_context to 2 or "
                "more (4 is usual), or skip_regions to 0"
            )
        settings = Accelerate(
            every=reuse_context, regions=skip_regions, first_block=first_block, warmup=warmup
        )
        report = host_graph.Report(cls.hidden.unique_id)
        model = host_accelerate.accelerated(model, settings, report)
        if compile:
            model = host_compile.compiled(model, report)
        return io.NodeOutput(model)
