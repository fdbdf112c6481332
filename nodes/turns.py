"""Kontext Turns: a list of instructions, done one after another.

The node becomes a chain of Kontext Edit nodes, so that each turn has the host's progress, preview, cancel and cache:
after a change to one line only the turns that depend on it are made again.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..kontext_core.turns import CHAINS, parse_turns
from . import host_expand
from .conditioning import FIT_TOOLTIP, GUIDANCE_TOOLTIP, PADDING_TOOLTIP
from .drift import TURNS_TOOLTIP
from .edit import FEW_STEP, MAX_SEED, KontextEdit
from .schema import ADVANCED, CATEGORY, make_schema

EXAMPLE = """Move the main subject to the left
Add more detail to the background, while keeping the composition exactly the same
Change the style to a watercolor painting, while keeping the composition exactly the same"""


class KontextTurns(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        link = {"extra_dict": host_expand.AS_LINK}
        return make_schema(
            node_id="KontextTurns",
            display_name="Kontext Turns",
            category=CATEGORY,
            description="Does several instructions one after another on one picture, hands the latent on without "
            "loss, gives every turn, and measures how far the rest of the picture drifts.",
            search_aliases=["iterative edit", "multi turn", "session", "edit chain", "branch"],
            inputs=[
                io.Model.Input("model", tooltip="From Kontext Load Model or ComfyUI's own loader.", **link),
                io.Clip.Input("clip", tooltip="Text encoders that belong to the model.", **link),
                io.Vae.Input("vae", tooltip="The model's autoencoder.", **link),
                io.Image.Input("image", tooltip="The first picture.", **link),
                io.String.Input("instructions", multiline=True, default=EXAMPLE, tooltip=TURNS_TOOLTIP),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Of the first turn; each turn adds 1 to the one it starts from.",
                ),
                io.Int.Input("steps", default=28, min=1, max=1000, tooltip="Number of steps of each turn."),
                io.Float.Input(
                    "guidance", default=2.5, min=0.0, max=100.0, step=0.1, tooltip=GUIDANCE_TOOLTIP
                ),
                io.Combo.Input(
                    "few_step",
                    options=FEW_STEP,
                    default="off",
                    tooltip="Steps with a distilled model or a turbo LoRA.",
                ),
                io.Combo.Input(
                    "chain",
                    options=list(CHAINS),
                    default="latents",
                    tooltip="What a turn hands to the next. latents: nothing is lost between turns; pictures: each "
                    "turn decodes, and the next one fits and encodes again.",
                ),
                io.Int.Input(
                    "turn",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="The turn that image and latent give; 0 for the last one.",
                ),
                io.Combo.Input(
                    "fit", options=["stretch", "crop", "pad", "keep"], default="stretch", tooltip=FIT_TOOLTIP
                ),
                io.String.Input("padding", default="mirror", tooltip=PADDING_TOOLTIP, **ADVANCED),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Adds the similarity of embeddings to the drift.",
                    **link,
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Every turn in order, as a batch."),
                io.Image.Output(display_name="image", tooltip="The turn that is chosen."),
                io.Latent.Output(display_name="latent", tooltip="Its latent, to go on from without loss."),
                io.Image.Output(display_name="drift", tooltip="The drift against the first picture, drawn."),
                io.String.Output(display_name="report", tooltip="The drift in numbers, a line a turn."),
                io.String.Output(
                    display_name="record",
                    tooltip="How the chosen turn was made, with all turns that led to it, for Kontext Save.",
                ),
            ],
            enable_expand=True,
        )

    @classmethod
    def validate_inputs(cls, instructions, turn) -> bool | str:
        """Say what is wrong before anything runs."""
        if instructions is None:
            return True
        try:
            count = len(parse_turns(instructions).turns)
        except ValueError as error:
            return str(error)
        if turn is not None and turn > count:
            return f"turn is {turn}, and there are {count} instructions"
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, image, instructions, seed, steps, guidance, few_step, chain, turn, fit, padding,
        clip_vision=None,
    ) -> io.NodeOutput:  # fmt: skip
        session = parse_turns(instructions, seed)
        chosen = turn or len(session.turns)
        if chosen > len(session.turns):
            raise ValueError(f"turn is {turn}, and there are {len(session.turns)} instructions")
        graph = host_expand.new_graph()
        common = {
            **host_expand.defaults(KontextEdit), "model": model, "clip": clip, "vae": vae, "steps": steps,
            "guidance": guidance, "few_step": few_step, "fit": fit, "padding": padding,
        }  # fmt: skip
        edits: list = []
        images = None
        for number, step in enumerate(session.turns, 1):
            inputs = {**common, "prompt": step.instruction, "seed": step.seed, "image": image}
            own = {"num_steps": "steps", "guidance": "guidance"}  # of a line, and the widgets they stand for
            inputs |= {own[name]: value for name, value in step.settings.items()}
            if step.parent is not None:
                before = edits[step.parent]
                inputs |= {"latent": before.out(1)} if chain == "latents" else {"image": before.out(0)}
                inputs |= {"record": before.out(3)}
            edits.append(graph.node("KontextEdit", id=f"turn{number}", **inputs))
            here = edits[-1].out(0)
            images = here if images is None else graph.node(
                "ImageBatch", id=f"batch{number}", image1=images, image2=here
            ).out(0)  # fmt: skip
        drift_inputs = {"original": image, "turns": images, "instructions": instructions}
        if clip_vision is not None:
            drift_inputs["clip_vision"] = clip_vision
        drift = graph.node("KontextDrift", id="drift", **drift_inputs)
        result = edits[chosen - 1]
        return io.NodeOutput(
            images,
            result.out(0),
            result.out(1),
            drift.out(0),
            drift.out(1),
            result.out(3),
            expand=graph.finalize(),
        )
